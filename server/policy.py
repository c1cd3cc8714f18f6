"""What to do with clients that fail, and with rounds that fall short; every decision is an event on record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from textwrap import shorten
from typing import Any

from fedmm.config.schema import PolicyConfig
from fedmm.errors import RunError
from server.admission import Refusal


@dataclass(frozen=True)
class Event:
    """Something that went wrong, or was decided about it."""

    round: int
    kind: str
    client: int | None
    reason: str
    decision: str

    def record(self) -> dict[str, Any]:
        """As plain values for the manifest."""
        return asdict(self)


@dataclass
class Policy:
    """Applies a `PolicyConfig` and remembers refusals in a row.

    Attributes:
        config: The rules.
        events: All events so far.
        refusals: Client -> refusals in a row.
        banned: Client -> first round in which it may take part again.
    """

    config: PolicyConfig
    events: list[Event] = field(default_factory=list)
    refusals: dict[int, int] = field(default_factory=dict)
    banned: dict[int, int] = field(default_factory=dict)

    def allowed(self, client: int, round: int) -> bool:
        """Whether a client may be selected in this round."""
        return self.banned.get(client, 0) <= round

    def refused(self, refusal: Refusal, round: int, attempt: int) -> bool:
        """Record a refusal; True if the client is to be asked again."""
        again = attempt < self.config.retries
        decision = f"asked again ({attempt + 1} of {self.config.retries})" if again else "left out of the round"
        self.events.append(Event(round, refusal.kind, refusal.client, refusal.reason, decision))
        if not again:
            self._count(refusal.client, round)
        return again

    def late(self, client: int, round: int) -> None:
        """Record that a client did not answer before the deadline."""
        reason = f"no reply within {self.config.deadline_s} s"
        self.events.append(Event(round, "late", client, reason, "left out of the round"))
        self._count(client, round)

    def admitted(self, client: int) -> None:
        """A good reply ends a row of refusals."""
        self.refusals.pop(client, None)

    def _count(self, client: int, round: int) -> None:
        self.refusals[client] = self.refusals.get(client, 0) + 1
        if self.config.quarantine_after and self.refusals[client] >= self.config.quarantine_after:
            until = round + 1 + self.config.quarantine_rounds
            self.banned[client] = until
            self.refusals.pop(client)
            reason = f"{self.config.quarantine_after} refusals in a row"
            self.events.append(Event(round, "quarantine", client, reason, f"left out until round {until}"))

    def left_out(self, refusals: Sequence[Refusal], round: int, split: str) -> None:
        """Record whose reports are missing in the figures of a split."""
        for r in refusals:
            self.events.append(Event(round, r.kind, r.client, r.reason, f"not in {split} figures"))

    def enough(self, asked: int, used: int, round: int) -> bool:
        """Whether a round's updates may be aggregated.

        Raises:
            RunError: The round fell short and the policy is to fail.
        """
        least = max(1, ceil(self.config.min_replies * asked - 1e-9))
        if used >= least:
            return True
        reason = f"{used} of {asked} asked clients contributed, at least {least} must"
        if self.config.on_short == "accept" and used > 0:
            self.events.append(Event(round, "short", None, reason, "accepted what came"))
            return True
        if self.config.on_short == "fail":
            last = next((e.reason for e in reversed(self.events) if e.kind != "short"), "none is on record")
            self.events.append(Event(round, "short", None, reason, "ended the run"))
            raise RunError(
                f"{reason}; last reason: {shorten(last, 300)}",
                where=f"round {round}",
                remedy="cure the clients and go on with --resume, or relax policy.min_replies, policy.on_short or "
                "policy.retries",
            )
        self.events.append(Event(round, "short", None, reason, "kept the old model"))
        return False

    def state(self) -> dict[str, Any]:
        """As plain values, for the checkpoint."""
        return {
            "events": [e.record() for e in self.events],
            "refusals": {str(k): v for k, v in self.refusals.items()},
            "banned": {str(k): v for k, v in self.banned.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's `state`."""
        self.events = [Event(**e) for e in state["events"]]
        self.refusals = {int(k): v for k, v in state["refusals"].items()}
        self.banned = {int(k): v for k, v in state["banned"].items()}
