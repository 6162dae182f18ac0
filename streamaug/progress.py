"""Where preparation reports how far it is."""

import logging
import time
from typing import Protocol

log = logging.getLogger("streamaug")

_LONG_SECONDS = 5.0  # from which on a phase is worth a line
_BETWEEN_SECONDS = 15.0


class Progress(Protocol):
    """Where progress goes: `demo.view` has a live and a plain one."""

    def phase(self, name: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1, **figures: float | None) -> None: ...


class Silent:
    def phase(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1, **figures: float | None) -> None:
        pass


class Logged:
    """Lines in the log for phases that take long; as warnings, since a script that set up no logging shows only those.

    note: what is added to the first line.
    """

    def __init__(self, note: str = ""):
        self._note = note
        self.phase("")

    def phase(self, name: str, total: int | None = None) -> None:
        self._name, self._total, self._done = name, total, 0
        self._began = time.monotonic()
        self._next = self._began + _LONG_SECONDS

    def advance(self, n: int = 1, **figures: float | None) -> None:
        self._done += n
        now = time.monotonic()
        if not self._total or not 0 < self._done < self._total or now < self._next:
            return
        left = clock((now - self._began) * (self._total - self._done) / self._done)
        share = f"{self._done:,}/{self._total:,} ({self._done / self._total:.0%})"
        log.warning("preparing the stream: %s: %s, %s left%s", self._name, share, left, self._note)
        self._note, self._next = "", now + _BETWEEN_SECONDS


def clock(seconds: float) -> str:
    """4.2 s, 42 s, 3:07 min or 1:02:45 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
