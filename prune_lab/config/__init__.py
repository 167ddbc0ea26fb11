"""The options of a run as plain checked values, one file per group of conf/."""
