"""Messages between ranks beside torch.distributed: what a rank was asked for, that it has failed, that it has ended.

Collectives cannot carry these: a rank that waits in one for a rank that has failed hears nothing. Here rank 0 has a
hub, every other rank a connection to it, and a thread of each rank reads. When a process ends, its operating system
closes its connections, so the others know at once. When a machine is lost, TCP's keepalive ends the
connection within half a minute.

A message is a line of JSON. Work is divided into sections, such as one request, which all ranks count alike.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: A rank whose machine does not answer is lost after (seconds until the first probe, between probes, probes).
KEEPALIVE = (10, 5, 4)
#: Seconds to connect to the hub.
CONNECTING = 60.0


@dataclass(frozen=True)
class End:
    """How a section has ended on a rank.

    Attributes:
        error: the class and the message of the exception that ended it; empty if it was done.
        follows: whether it only followed from the failure of another rank.
    """

    error: str
    follows: bool


class InterruptedWorkError(RuntimeError):
    """Another rank has failed in this section, or has ended."""


class Channel:
    """The connections of one rank.

    Args:
        rank: this rank.
        count: the number of ranks.
        noticed: called in another thread when a rank has failed in a section, or has ended.
    """

    def __init__(self, rank: int, count: int, noticed: Callable[[], None]) -> None:
        self.rank = rank
        self.count = count
        self._noticed = noticed
        self._changed = threading.Condition()  # reentrant
        self._connections: dict[int, _Connection] = {}
        self._values: dict[tuple[int, int], dict[int, Any]] = {}
        self._ends: dict[int, dict[int, End]] = {}
        self._left: set[int] = set()
        self._closing = False

    # Connecting

    def open_hub(self, host: str) -> str:
        """Open the hub, on rank 0. Returns what `connect` of the other ranks takes."""
        try:
            server = socket.create_server((host, 0))
        except OSError:  # the name of this machine is one that only the others know it by
            server = socket.create_server(("", 0))
        token = secrets.token_hex(16)
        threading.Thread(target=self._accept, args=(server, token), name="omni ranks", daemon=True).start()
        return json.dumps([host, server.getsockname()[1], token])

    def wait_for_all(self) -> None:
        """Wait for the connections of all other ranks, on rank 0.

        Raises:
            RuntimeError: one has not come in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._connections) == self.count - 1, CONNECTING):
                raise RuntimeError(f"{self.count - 1 - len(self._connections)} ranks have not connected to rank 0")

    def connect(self, address: str) -> None:
        """Connect to the hub, on every rank but 0."""
        host, port, token = json.loads(address)
        made = socket.create_connection((host, port), CONNECTING)
        made.settimeout(None)
        connection = _Connection(made)
        connection.send({"rank": self.rank, "token": token})
        self._attach(0, connection)

    def _accept(self, server: socket.socket, token: str) -> None:
        with server:
            while len(self._connections) < self.count - 1:
                accepted = server.accept()[0]
                accepted.settimeout(CONNECTING)
                connection = _Connection(accepted)
                hello = connection.receive() or {}
                rank, given = hello.get("rank"), str(hello.get("token"))
                expected = isinstance(rank, int) and 0 < rank < self.count and rank not in self._connections
                if expected and hmac.compare_digest(given.encode(), token.encode()):
                    accepted.settimeout(None)
                    self._attach(int(str(rank)), connection)
                else:
                    connection.close()

    def _attach(self, rank: int, connection: _Connection) -> None:
        with self._changed:
            self._connections[rank] = connection
            self._changed.notify_all()
        threading.Thread(target=self._read, args=(rank, connection), name="omni ranks", daemon=True).start()

    # Receiving

    def _read(self, rank: int, connection: _Connection) -> None:
        while (message := connection.receive()) is not None:
            self._relay(message, rank)
            self._take(message)
        if not self._closing:
            left = {"kind": "left", "rank": rank}
            self._relay(left, rank)
            self._take(left)

    def _relay(self, message: dict[str, Any], origin: int) -> None:
        if self.rank == 0:
            for rank, connection in list(self._connections.items()):
                if rank != origin:
                    connection.send(message)

    def _take(self, message: dict[str, Any]) -> None:
        rank, kind = int(message["rank"]), message["kind"]
        with self._changed:
            if kind == "value":
                self._values.setdefault((message["section"], message["number"]), {})[rank] = message["value"]
            elif kind == "end":
                self._ends.setdefault(message["section"], {})[rank] = End(message["error"], message["follows"])
            else:
                self._left.add(rank)
            self._changed.notify_all()
        if kind != "value" and rank != self.rank:
            self._noticed()

    def _send(self, message: dict[str, Any]) -> None:
        message = {"rank": self.rank, **message}
        for connection in list(self._connections.values()):
            connection.send(message)
        self._take(message)

    # Used by a rank's work

    def gather(self, section: int, number: int, value: Any, patience: float) -> list[Any]:
        """The values that the ranks have given, by rank; waits for all of them.

        Args:
            section: the section.
            number: which of the section's values it is.
            value: this rank's; anything that JSON holds.
            patience: seconds to wait.

        Raises:
            InterruptedWorkError: a rank has failed in this section, has ended, or has not come in time.
        """
        self._send({"kind": "value", "section": section, "number": number, "value": value})
        found = self._values[section, number]
        deadline = time.monotonic() + patience
        with self._changed:
            while len(found) < self.count:
                if self.troubled(section):
                    raise InterruptedWorkError("another rank has failed")
                if time.monotonic() > deadline:
                    missing = next(rank for rank in range(self.count) if rank not in found)
                    raise InterruptedWorkError(f"rank {missing} has not come within {patience:.0f} s")
                self._changed.wait(0.5)
        return [found[rank] for rank in range(self.count)]

    def troubled(self, section: int) -> bool:
        """Whether another rank has failed in this section, or has ended before the section was over."""
        with self._changed:
            ends = self._ends.get(section, {})
            failed = any(end.error for rank, end in ends.items() if rank != self.rank)
            return failed or any(rank not in ends for rank in self._left)

    @property
    def left(self) -> list[int]:
        """The ranks that have ended."""
        return sorted(self._left)

    def done(self, section: int) -> None:
        """Tell the others that this rank has done its part of a section."""
        self._send({"kind": "end", "section": section, "error": "", "follows": False})

    def failed(self, section: int, error: str, follows: bool, patience: float) -> dict[int, End]:
        """Tell the others that this rank has failed, and wait until each has failed or ended, too.

        Returns:
            How the section has ended, by rank, for those that have told it in time.
        """
        self._send({"kind": "end", "section": section, "error": error, "follows": follows})
        self.wait_for_ends(section, patience)
        with self._changed:
            return dict(self._ends[section])

    def wait_for_ends(self, section: int, patience: float) -> None:
        """Wait until the section is over on all ranks, but no longer than so many seconds."""
        with self._changed:
            # Without rank 0, which passes the messages on, nothing more will be heard.
            self._changed.wait_for(
                lambda: 0 in self._left or len({*self._ends.get(section, ()), *self._left}) == self.count, patience
            )

    def forget(self, section: int) -> None:
        """Drop what was kept for the sections before this one."""
        with self._changed:
            self._values = {key: values for key, values in self._values.items() if key[0] >= section}
            self._ends = {number: ends for number, ends in self._ends.items() if number >= section}

    def close(self) -> None:
        """Close the connections. The other ranks see that this one has ended."""
        self._closing = True
        for connection in self._connections.values():
            connection.close()


class _Connection:
    """Lines of JSON over a socket."""

    def __init__(self, socket_: socket.socket) -> None:
        socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE, strict=True):
            if hasattr(socket, name):  # not on every system
                socket_.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket = socket_
        self._lines = socket_.makefile("r", encoding="utf-8")
        self._turn = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the other side has ended, nothing happens: the reader notices it."""
        with self._turn, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the other side has ended."""
        try:
            line = self._lines.readline()
            return dict(json.loads(line)) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._socket.close()
