"""`prune-lab verdict`: whether a lottery ticket is one, by stated rules."""
