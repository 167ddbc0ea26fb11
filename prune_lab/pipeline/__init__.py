"""One run: match its budget, validate it, reuse, resume or run its phases, write its results."""
