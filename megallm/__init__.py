"""megallm: a 3D-parallel trainer for large language models."""
