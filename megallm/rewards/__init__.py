"""Rewards of sampled answers: functions of any trainer, a table, workers, a sandbox for code."""
