"""The ranks: how they come together, and what happens when one of them fails.

Work is done in sections that all ranks enter and leave together, such as one request. At its begin, the ranks compare
what they were asked for. If a rank fails in it, the others are told (`omni_runtime.parallel.channel`). They have a
moment to fail by themselves: often, all ranks raise the same error at the same place, and then nothing is lost. If not,
their collectives are broken off, every rank raises a `RankError` that names the rank and its error, and the process
groups are made anew for the next section.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import stat
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from omni_runtime.parallel.channel import Channel, End, InterruptedWorkError
from omni_runtime.parallel.degrees import Degrees, Place, launched

#: Device type → the backend of its collectives.
BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl", "cpu": "gloo"}
#: Seconds that a rank has to fail by itself, after another one has failed.
GRACE = 1.0
#: The same, after another process has ended.
GRACE_AFTER_END = 0.2
#: Seconds that a failing rank waits to hear how the others have ended.
ENDING = 30.0
#: Seconds that a rank waits for another one, in a collective or at the begin of a section.
PATIENCE = 600.0
#: The dimensions of the ranks, the outermost first: ranks that exchange most are neighbours.
DIMENSIONS = ("cfg", "ring", "ulysses", "tensor")


class RankError(RuntimeError):
    """A rank has failed, and with it the work of all ranks."""


def place() -> Place | None:
    """This process among the ranks; None if it is alone."""
    found = launched()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return Place(rank, count, rank if found is None else found.local)
    return found


class World:
    """The ranks that were started together, of which this process is one.

    Args:
        place: this process among them.
        device: the type of the devices.
    """

    def __init__(self, place: Place, device: str) -> None:
        self.place = place
        self.device = device
        self.broken = False
        self._own = not torch.distributed.is_initialized()
        self._store: Any = None
        self._made = 0
        self._meshes: dict[Degrees, Any] = {}
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sockets: dict[int, int] = {}
        self._section = 0
        self._number = 0
        self._active = self._cut = False
        self._channel = Channel(place.rank, place.count, self._noticed)
        self._join()
        atexit.register(self.leave)

    # Coming together

    def _join(self) -> None:
        patience = datetime.timedelta(seconds=PATIENCE)
        if self._own:
            rank, count = self.place.rank, self.place.count
            self._store, _, _ = next(torch.distributed.rendezvous("env://", rank, count, timeout=patience))
        if self.place.rank == 0:
            address = self._channel.open_hub(os.environ.get("MASTER_ADDR", "127.0.0.1"))
            self._spread(address)
            self._channel.wait_for_all()
        else:
            self._channel.connect(self._spread(None))
        if self._own:
            self._make_group()

    def _spread(self, address: str | None) -> str:
        """The hub's address, on every rank."""
        if self._store is None:
            box = [address]
            torch.distributed.broadcast_object_list(box)
            return str(box[0])
        if address is not None:
            self._store.set("omni/hub", address)
            return address
        return str(self._store.get("omni/hub").decode())

    def _make_group(self) -> None:
        if self.device != "cpu":
            torch.accelerator.set_device_index(self.place.local)
        with self._recording():
            torch.distributed.init_process_group(
                BACKENDS.get(self.device, "gloo"),
                store=torch.distributed.PrefixStore(f"omni/{self._made}", self._store),
                rank=self.place.rank,
                world_size=self.place.count,
                timeout=datetime.timedelta(seconds=PATIENCE),
            )
        self._made += 1

    def mesh(self, degrees: Degrees) -> Any:
        """The device mesh for these degrees. All ranks ask for it together."""
        if degrees not in self._meshes:
            sizes = tuple(getattr(degrees, name) for name in DIMENSIONS)
            with self._recording():
                mesh = torch.distributed.device_mesh.init_device_mesh(
                    self.device, sizes, mesh_dim_names=DIMENSIONS
                )  # fmt: skip
                for name, size in zip(DIMENSIONS, sizes, strict=True):
                    if size > 1:  # connections are made when they are first used
                        _connect(mesh[name], self.device)
                if degrees.ring > 1 and degrees.ulysses > 1:
                    _connect(mesh["ring", "ulysses"]._flatten(), self.device)
            self._meshes[degrees] = mesh
        return self._meshes[degrees]

    def used_by(self, user: Any) -> None:
        """Call `user.renewed()` whenever the meshes were made anew. It may raise an error that says why this fails."""
        self._users.add(user)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Context manager: the connections that are made within are recorded, to be broken off if need be."""
        before = _connections()
        try:
            yield
        finally:
            self._sockets |= {fd: inode for fd, inode in _connections().items() if before.get(fd) != inode}

    def leave(self) -> None:
        """This process ends, after the other ranks are done with what they do together."""
        if self._section:
            self._channel.wait_for_ends(self._section, ENDING)
        self._channel.close()
        if self._own and torch.distributed.is_initialized():
            with contextlib.suppress(Exception):
                torch.distributed.destroy_process_group()

    # Sections

    @contextlib.contextmanager
    def section(self, asked: Mapping[str, str]) -> Iterator[None]:
        """Context manager: all ranks work together within. Within another section, it does nothing.

        Args:
            asked: what this rank was asked for, name → value; it must be the same on all ranks.

        Raises:
            ValueError: the ranks were asked for different things.
            RankError: a rank has failed, or has ended.
        """
        if self._active:
            yield
            return
        self._section += 1
        self._number = 0
        self._active, self._cut = True, False
        try:
            self._begin(asked)
            yield
            self._active = False
            self._channel.done(self._section)
        except BaseException as error:
            self._active = False
            outcome = self._outcome(error)
            if outcome is error:
                raise
            raise outcome from error
        finally:
            self._active = False

    def _begin(self, asked: Mapping[str, str]) -> None:
        self._channel.forget(self._section - 1)
        found = self.gather({"asked": dict(asked), "broken": self.broken})
        first = found[0]["asked"]
        for rank, other in enumerate(found):
            theirs = other["asked"]
            names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
            if names:
                values = "; ".join(
                    f"{name}: {_short(first.get(name))} on rank 0 and {_short(theirs.get(name))} on rank {rank}"
                    for name in names
                )
                raise ValueError(f"the ranks were asked for different things: {values}")
        if any(one["broken"] for one in found):
            self._renew()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. They are compared with no collective.

        Args:
            value: this rank's; anything that JSON holds.
        """
        self._number += 1
        return self._channel.gather(self._section, self._number, value, PATIENCE)

    def _renew(self) -> None:
        """Make the process groups anew, on all ranks."""
        if not self._own:
            raise RankError("the ranks' process group was made by other code and is broken: start the ranks again")
        with contextlib.suppress(Exception):
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        self._sockets.clear()
        self._make_group()
        degrees, self._meshes = list(self._meshes), {}
        for one in degrees:
            self.mesh(one)
        for user in list(self._users):
            user.renewed()
        self.broken = False

    # Failing

    def _outcome(self, error: BaseException) -> BaseException:
        """What this rank raises after an error."""
        channel, section = self._channel, self._section
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        broken_off = self._cut or isinstance(error, InterruptedWorkError) or _of_collective(error)
        follows = broken_off or channel.troubled(section)
        if not isinstance(error, Exception):  # Ctrl-C
            self.broken = True
            channel.failed(section, text, follows, patience=0)
            return error
        ends = channel.failed(section, text, follows, ENDING)
        alike = len(ends) == self.place.count and {end.error for end in ends.values()} == {text}
        if alike and not broken_off:
            return error
        self.broken = True
        return RankError(_cause(ends, channel.left, str(error)))

    def _noticed(self) -> None:
        """Another rank has failed or ended. Called in another thread."""
        if self._active and self._channel.troubled(self._section):
            after = GRACE_AFTER_END if self._channel.left else GRACE
            timer = threading.Timer(after, self._break_off, (self._section,))
            timer.daemon = True
            timer.start()

    def _break_off(self, section: int) -> None:
        """Break off the collectives that this rank waits in, if it still works on the section."""
        if not (self._active and section == self._section):
            return
        self._cut = self.broken = True
        if self.device == "cpu":
            _shut(self._sockets)
            return
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            torch.distributed.distributed_c10d._abort_process_group()


def _connect(mesh: Any, device: str) -> None:
    torch.distributed.all_reduce(torch.zeros(1, device=device), group=mesh.get_group())


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 80 else f"{value[:77]}..."


def _of_collective(error: BaseException) -> bool:
    """Whether an error comes from a collective, which fails if another rank does."""
    kinds = tuple(kind for kind in (getattr(torch.distributed, "DistError", None),) if kind is not None)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _cause(ends: Mapping[int, End], left: list[int], own: str) -> str:
    """Why the ranks have failed, in words."""
    causes = {rank: end.error for rank, end in ends.items() if end.error and not end.follows}
    if causes:
        return "; ".join(f"rank {rank} raised {error}" for rank, error in sorted(causes.items()))
    left = [rank for rank in left if rank not in ends]  # the others have ended after they had failed
    if left:
        return "; ".join(f"the process of rank {rank} has ended" for rank in left)
    return own


def _connections() -> dict[int, int]:
    """The file descriptors of this process's connected sockets, with their inodes."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found[int(name)] = status.st_ino
    return found


def _shut(sockets: Mapping[int, int]) -> None:
    """Shut down connections. What waits for them raises an error, on both sides."""
    present = _connections()
    for fd, inode in sockets.items():
        if present.get(fd) == inode:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as one:
                one.getpeername()  # a socket that listens has none
                one.shutdown(socket.SHUT_RDWR)


_world: World | None = None


def world(device: str) -> World:
    """The ranks, which come together at the first call.

    Args:
        device: the type of their devices.

    Raises:
        ValueError: they have come together for devices of another type.
    """
    global _world
    if _world is None:
        found = place()
        assert found is not None  # the degrees were checked against it
        _world = World(found, device)
    if _world.device != device:
        raise ValueError(f"the ranks work together on {_world.device}: they cannot on {device}, too")
    return _world
