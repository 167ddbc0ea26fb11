"""Scores of weights from gradients and curvature."""
