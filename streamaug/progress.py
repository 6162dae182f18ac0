"""Where preparation reports how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Where progress goes: `demo.view` has a live and a plain one."""

    def phase(self, name: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1, **figures: float | None) -> None: ...


class Silent:
    def phase(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1, **figures: float | None) -> None:
        pass
