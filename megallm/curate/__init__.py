"""Curation: raw text to clean text, with a reason for every decision. Imports `base` and `data`
only, never torch.
"""
