"""Scales of batch normalisation as scores: penalty, thresholds, masks, statistics."""
