"""The error that the user can fix."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong option or input of the user. The message is one line and needs no traceback."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option
        """dotted name of the option, if the error is about a single one"""
