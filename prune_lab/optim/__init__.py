"""Optimizers, including those that sparsify by themselves, and learning rates."""
