"""The `megallm` command."""
