"""One file per operation; `backends` loads the libraries that replace one."""
