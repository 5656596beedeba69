"""One file per operation; `backends` is the one table of optional libraries."""
