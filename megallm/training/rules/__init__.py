"""Rules between the fields of a configuration: a file a section, and one for what a trainer
adds.
"""
