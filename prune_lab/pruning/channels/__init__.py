"""Channels: which belong together, which can be removed, what they cost, and their removal."""
