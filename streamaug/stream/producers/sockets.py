"""Sockets over which processes of one user on one machine hand each other messages with descriptors.

They have names that no file system knows (Linux's abstract ones), so that nothing is left behind, random ones.
"""

import array
import contextlib
import json
import os
import secrets
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamaug.errors import StreamaugError

_CREDENTIALS = struct.Struct("3i")  # process, user, group
_MESSAGE_NBYTES = 65536
_DESCRIPTORS = 8  # in one message, at most


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a connection: the one that connected, or that listened first."""

    pid: int  # 0 where this process cannot see it
    pidfd: int | None

    @classmethod
    def of(cls, connection: socket.socket) -> "Peer":
        """Raises StreamaugError when it is another user's."""
        size = _CREDENTIALS.size
        pid, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if user != os.geteuid():
            raise StreamaugError(f"process {pid} of user {user} is at the other end of a socket of this user's")
        with contextlib.suppress(OSError):
            return cls(pid, os.pidfd_open(pid))
        return cls(pid, None)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether it ends within so many seconds; a forked child of its own may keep the connection open."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)


def listen() -> tuple[socket.socket, str]:
    """A listening socket, and its address."""
    name = f"streamaug-{secrets.token_hex(16)}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listening.bind("\0" + name)
        listening.listen(socket.SOMAXCONN)
    except BaseException:
        listening.close()
        raise
    return listening, name


def was_shut_down(listening: socket.socket) -> bool:
    """Whether nobody can connect to it any more, in whichever process that was done."""
    poll = select.poll()
    poll.register(listening, 0)
    return bool(poll.poll(0))


def connect(address: str) -> socket.socket:
    """Raises ConnectionRefusedError when nobody listens there any more."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        connection.connect("\0" + address)
    except BaseException:
        connection.close()
        raise
    return connection


def hang_up(connection: socket.socket) -> None:
    """Close it for good, also where a forked child holds it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def send(connection: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionError):  # that the other end is gone is noticed elsewhere
        socket.send_fds(connection, [json.dumps(message).encode()], fds)


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """A message and its descriptors; None when the connection has ended. Raises BlockingIOError when there is none."""
    fds = array.array("i")
    room = socket.CMSG_LEN(_DESCRIPTORS * fds.itemsize)
    try:
        data, ancillary, _, _ = connection.recvmsg(_MESSAGE_NBYTES, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None, []
    for _, kind, contents in ancillary:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(contents[: len(contents) - len(contents) % fds.itemsize])
    return (json.loads(data) if data else None), list(fds)
