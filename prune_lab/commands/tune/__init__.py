"""Hyper-parameter search: the space, the objectives, the study on disk and what a trial reports. Imports no torch."""
