"""Megatron-LM's launch scripts and flags as configurations of megallm."""
