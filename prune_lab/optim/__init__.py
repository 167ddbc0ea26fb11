"""Optimizers, among them those with a sparsity of their own, and learning rates."""
