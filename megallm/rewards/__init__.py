"""Rewards of sampled answers: functions by signature, a table of them, worker processes, a sandbox for code."""
