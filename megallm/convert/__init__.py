"""In and out of Hugging Face folders: reversible rules per family, streamed, without running
anybody's code.
"""
