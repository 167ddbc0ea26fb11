"""Tools that any program needs; nothing here knows of pruning."""
