"""`prune-lab verdict`: whether a network has a winning lottery ticket, by stated rules."""
