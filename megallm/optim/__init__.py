"""Gradient buckets, clipping and sharded update rules."""
