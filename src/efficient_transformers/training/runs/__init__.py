"""Several runs, tables of their results, and publishing."""
