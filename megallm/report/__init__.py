"""What a run folder tells: a page, and a view on a terminal. Reads files only."""
