"""Engine: the only thing trainers see."""
