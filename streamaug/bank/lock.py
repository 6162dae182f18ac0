"""One writer at a time: a lock on a bank's folder that ends with the process that holds it."""

import fcntl
from pathlib import Path
from typing import BinaryIO

from streamaug.bank.files import LOCK, WORK
from streamaug.errors import BankError


def lock(folder: Path) -> BinaryIO:
    """Create the bank's folder and its work folder, and lock them until the file returned is closed.

    The kernel drops the lock when the process ends, however it ends. Raises BankError when another process holds it
    or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / WORK).mkdir(exist_ok=True)
    except BlockingIOError:
        file.close()
        raise BankError(f"{folder}: another process is writing this bank; wait for it to end") from None
    except OSError as error:
        file.close()
        raise _unwritable(folder, error) from None
    return file


def _unwritable(folder: Path, error: OSError) -> BankError:
    return BankError(f"{folder}: cannot be written: {error.strerror}; choose a writable folder (bank.path)")
