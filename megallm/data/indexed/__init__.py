"""Indexed datasets, Megatron-LM's `.bin` and `.idx`: reading, checking, splitting, merging."""
