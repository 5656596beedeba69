"""The run folder: its lease, its records, what a person sees, and signals."""
