"""Starting ranks: local processes, torchrun, Slurm."""
