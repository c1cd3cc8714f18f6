"""What watches a run. Callbacks are told; they cannot change a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedmm.io.run_directory import Row


@dataclass(frozen=True)
class RoundReport:
    """One finished round.

    Attributes:
        round: From 1.
        rounds: How many there will be.
        rows: Its measurements.
        validation: Figures (`server.measure.figures`), if this round was validated.
        seconds: Since the round began.
    """

    round: int
    rounds: int
    rows: Sequence[Row]
    validation: dict[str, Any] | None
    seconds: float


class Callback:
    """Base of all callbacks; override what you want to hear of."""

    def started(self, first_round: int, rounds: int) -> None:
        """Clients are connected; `first_round` is 1, or later on resumption."""

    def replied(self, done: int, asked: int) -> None:
        """A reply came."""

    def finished_round(self, report: RoundReport) -> None:
        """A round is complete and its checkpoint written."""

    def ended(self, summary: dict[str, Any]) -> None:
        """The run came to its end."""
