"""One folder per sub-command on finished runs or many runs; each has a `main` in its `command` file."""
