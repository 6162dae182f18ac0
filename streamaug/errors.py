"""The errors users see: each names what was given, what is accepted, and the nearest thing that works."""

import difflib
from collections.abc import Iterable


class StreamaugError(Exception):
    """Something failed while running. The command line prints the message alone and exits with 1."""

    exit_code = 1


class UsageError(StreamaugError):
    """What was given cannot be used: a configuration, a file, an argument. Exits with 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that cannot be used; the message carries the file and the key's path."""


class DataError(UsageError):
    """Images, labels or a folder that cannot be used."""


class ModelError(UsageError):
    """A model folder, its weights or its scheduler cannot be used."""


class BankError(UsageError):
    """A latent bank that cannot be opened, written or used with this model or loader."""


class BankWriteError(BankError):
    """A bank could not be written to the end, for want of disk: make room and go on. Exits with 1."""

    exit_code = 1


class MismatchError(UsageError):
    """Two sides that must agree (model, bank, loader) do not; the message describes both."""


class StateError(UsageError):
    """A saved state that belongs to another configuration; the message carries both values."""


class MemoryTooSmall(UsageError):
    """The ring or a batch does not fit; the message says how much is needed, or what fits, and what helps."""


class ProducerError(StreamaugError):
    """A producer raised or died for good; the message carries the remote traceback or its last words."""


class EverythingRejected(StreamaugError):
    """Too many batches in a row without one accepted image; the message has acceptance by class and reason."""


class MissingExtra(UsageError):
    """An optional dependency is not installed; the message has the line that installs it."""

    def __init__(self, package: str, extra: str):
        super().__init__(f'{package} is not installed; install it with: pip install "streamaug[{extra}]"')


def nearest(given: str, known: Iterable[str]) -> str:
    """The known name closest to `given` as ' (did you mean ...?)', or an empty string."""
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
