"""Named points of the ring's protocol at which a producer can be made to kill itself, for tests.

STREAMAUG_FAULT="mid_write:3" kills the first incarnation of a producer when it reaches that point with its
batch number 3. The points: before_ready, before_order, mid_write (called by an engine), after_make,
before_publish, after_publish.
"""

import os
import signal

_armed: tuple[str, int] | None = None
_number = 0


def arm(setting: str | None) -> None:
    """Read the setting ("point:number"); without one, no point ever fires."""
    global _armed
    if setting:
        point, _, number = setting.partition(":")
        _armed = point, int(number or 0)


def at(number: int) -> None:
    """The batch number that is being worked on."""
    global _number
    _number = number


def fault(point: str) -> None:
    if _armed is not None and _armed == (point, _number):
        os.kill(os.getpid(), signal.SIGKILL)
