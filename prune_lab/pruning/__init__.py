"""The building blocks of methods; none of them depends on a run."""
