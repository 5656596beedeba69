"""Layout, shards, process groups, collectives, parallel layers and the pipeline."""
