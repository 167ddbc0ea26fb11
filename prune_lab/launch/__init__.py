"""The runs of one command: in turn, in other processes, on a cluster, or together in one process."""
