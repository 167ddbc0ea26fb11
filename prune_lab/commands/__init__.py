"""One folder per sub-command over finished or many runs; each has a `main` in its `command` file."""
