"""The transformer decoder, its configuration and its division into pipeline stages."""
