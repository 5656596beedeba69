"""Layout-free checkpoints: pieces of logical tensors, hashed, committed atomically."""
