"""The command line as typed: help, completion, lists and dispatch to commands. Nothing below imports it."""

from prune_lab.cli.command import main

__all__ = ["main"]
