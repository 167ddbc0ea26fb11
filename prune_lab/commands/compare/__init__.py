"""From many runs to an answer: prune-lab compare. Nothing here imports torch."""
