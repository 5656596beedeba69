"""Megatron-LM's order of samples and its blends."""
