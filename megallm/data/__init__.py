"""From text to token batches; usable without the rest of megallm."""
