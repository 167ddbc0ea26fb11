"""Masks over weights: selection, distribution over layers, schedules, history."""
