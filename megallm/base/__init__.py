"""Configuration, errors, keyed randomness, files, devices: what everything else stands on."""
