"""Who holds which records of a queue, until when, and under which token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from peaknet_predict.queues.records import Entry, Record


@dataclass(slots=True)
class _Holder:
    deadline: float
    tokens: set[int] = field(default_factory=set)
    # The last request and what it was granted, for a client whose answer was lost.
    sequence: int = -1
    granted: list[int] = field(default_factory=list)


class LeaseBook:
    """Leases on records: each under a token of its own, each belonging to a holder.

    A holder that is silent for longer than ``lease_s`` loses all it holds. A token is given out
    once and means nothing after its lease has ended.

    Parameters
    ----------
    lease_s
        How long a holder may be silent.
    first_token
        Tokens count from here: a number that no earlier life of the queue can have reached, so that
        old tokens are recognised.
    """

    def __init__(self, lease_s: float, first_token: int) -> None:
        self.lease_s = lease_s
        self._next_token = first_token
        self._leases: dict[int, tuple[Entry, str]] = {}
        self._holders: dict[str, _Holder] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._leases)

    def hear(self, holder: str, now: float) -> None:
        """Note that a holder is alive."""
        deadline = now + self.lease_s
        known = self._holders.get(holder)
        if known is None:
            self._holders[holder] = _Holder(deadline)
        else:
            known.deadline = deadline

    def grant(
        self, holder: str, sequence: int, entries: Iterable[Entry]
    ) -> list[tuple[int, Entry]]:
        """Lease entries to a holder that has been heard, as the answer to its request."""
        granted = list(enumerate(entries, self._next_token))
        self._next_token += len(granted)
        of_holder = self._holders[holder]
        of_holder.sequence, of_holder.granted = sequence, [token for token, _ in granted]
        of_holder.tokens.update(of_holder.granted)
        for token, entry in granted:
            self._leases[token] = entry, holder
            self.nbytes += entry.nbytes
        return granted

    def granted(self, holder: str, sequence: int) -> list[tuple[int, Entry]] | None:
        """Return what a request was granted and still holds; None for a new request."""
        of_holder = self._holders[holder]
        if of_holder.sequence != sequence:
            return None
        return [
            (token, self._leases[token][0])
            for token in of_holder.granted
            if token in of_holder.tokens
        ]

    def end(self, token: int) -> Entry | None:
        """End a lease; None if the token is not current."""
        lease = self._leases.pop(token, None)
        if lease is None:
            return None
        entry, holder = lease
        self.nbytes -= entry.nbytes
        self._holders[holder].tokens.discard(token)
        return entry

    def end_all(self, tokens: Iterable[int]) -> tuple[dict[int, Entry], list[int]]:
        """End leases; return their records, and the tokens that were not current."""
        ended = {token: self.end(token) for token in dict.fromkeys(tokens)}
        entries = {token: entry for token, entry in ended.items() if entry is not None}
        return entries, [token for token in ended if token not in entries]

    def holder_of(self, token: int) -> str | None:
        """Return who holds under a token; None if it is not current."""
        lease = self._leases.get(token)
        return None if lease is None else lease[1]

    def record_of(self, token: int) -> Record | None:
        """Return what is held under a token; None if it is not current."""
        lease = self._leases.get(token)
        return None if lease is None else lease[0].record

    def held_alone(self, holder: str) -> Entry | None:
        """Return the record that a holder holds, if it holds exactly one."""
        known = self._holders.get(holder)
        if known is None or len(known.tokens) != 1:
            return None
        (token,) = known.tokens
        return self._leases[token][0]

    def holds_nothing(self, holder: str) -> bool:
        """Whether a holder holds nothing."""
        known = self._holders.get(holder)
        return known is None or not known.tokens

    def silent(self, now: float) -> list[tuple[str, list[int]]]:
        """Return the holders whose time is over, with their tokens in order, and forget them."""
        over = [name for name, holder in self._holders.items() if holder.deadline < now]
        silent = [(name, sorted(self._holders[name].tokens)) for name in over]
        for name, tokens in silent:
            if not tokens:
                del self._holders[name]
        return [(name, tokens) for name, tokens in silent if tokens]
