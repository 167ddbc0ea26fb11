"""What any program needs and no pruning knows."""
