"""Run configuration, its validation, and the training loops."""
