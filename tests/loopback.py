"""Runs Python in a network namespace that has the loopback device alone: Ray listens on all addresses."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: As root there; a user namespace makes that possible for others, where the system allows it.
UNSHARE = ["unshare", "--net"] if getattr(os, "geteuid", lambda: 1)() == 0 else ["unshare", "--map-root-user", "--net"]
WITHIN = [*UNSHARE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@functools.cache
def missing() -> str:
    """Why there is no such namespace here; empty if there is."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "needs unshare and ip"
    tried = subprocess.run([*WITHIN, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no network namespace here: {tried.stderr.strip()}"


def start(arguments: Sequence[str], folder: Path, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    """Start Python with these arguments. Its output goes to `folder`, in `out.txt` and `err.txt`."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "serving"), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "RAY_raylet_start_wait_time_s": "300",
        "HF_HUB_OFFLINE": "1",
    }
    with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
        return subprocess.Popen(
            [*WITHIN, sys.executable, *arguments],
            cwd=cwd, env={**os.environ, **settings}, stdout=out, stderr=err, text=True,
        )  # fmt: skip


def end(process: "subprocess.Popen[str]") -> None:
    """End a process, if it runs, and those that it has started."""
    left = processes_of(process.pid)
    process.kill()
    process.wait()
    for one in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def processes_of(root: int, name: str = "") -> list[int]:
    """The processes whose command line starts with `name` among the descendants of `root`."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        if command.startswith(name.encode()):
            found.append(int(folder.name))
    return [one for one in found if root in _ancestors(one, parents)]


def _ancestors(process: int, parents: dict[int, int]) -> set[int]:
    above = set()
    while (process := parents.get(process, 0)) not in (0, *above):
        above.add(process)
    return above
