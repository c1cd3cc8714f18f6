"""One error tree: each message says what is wrong, where, why, and what to do about it.

The exit codes are the command line's promise (see the README); the command line turns any
`FedmmError` into one line on standard error and its `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedmmError(Exception):
    """Base of every error that a user can cause or cure.

    Args:
        what: What is wrong, in one clause.
        where: The config path, file or client concerned.
        remedy: What the user can do.
    """

    exit_code: int = 4

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        cure = f" ({self.remedy})" if self.remedy else ""
        return f"{place}{self.what}{cure}"


class ConfigError(FedmmError):
    """The configuration is not valid; nothing was loaded or run."""

    exit_code = 2


class DataError(FedmmError):
    """Data is missing, unreadable, or its hash is not the recorded one."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint is missing, corrupt, or belongs to another configuration."""


class RunError(FedmmError):
    """A run could not be started or could not go on."""


class Interrupted(FedmmError):
    """The user stopped the run; its last checkpoint is complete and `--resume` continues it."""

    exit_code = 6


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?'-style help for a misspelt name, with the whole list as a fall-back."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"choose from: {', '.join(options)}"
