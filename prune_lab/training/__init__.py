"""Running one phase: the only training loop, the only evaluation, and their device and precision."""
