"""Pure functions from per-token scalars to sums."""
