"""Lowers one kernel with Ascend's compilers, correctly and wrongly; `test_ascend` runs this without the interpreter."""

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from omni_kernels.ascend import limits
from omni_kernels.validation import ascend, checks, launches
from omni_kernels.validation.ascend_ir import Tools, cache_directory

LAUNCH = "relative_l1 odd"
CHECK = checks.parse("relative_l1/3x37x200/bfloat16/offset")


class Wrong(Tools):
    """Compiler tools that replace subtraction by addition."""

    def linalg(self, ttir: str) -> str:
        return super().linalg(ttir).replace("arith.subf", "arith.addf")


def main() -> None:
    tools = Tools.found(cache_directory())
    assert tools is not None
    table = {LAUNCH: launches.table()[LAUNCH]}
    found = {"lowered": [*ascend.lower_all(tools, table)]}
    with mock.patch.dict(limits.TILES, relative_l1=16 * limits.TILES["relative_l1"]):
        found["overflow"] = [*ascend.lower_all(tools, table)]
    for name, these in (("computed", tools), ("wrong", Wrong(tools.adapter.parents[3]))):
        with tempfile.TemporaryDirectory() as directory:
            found[name] = [*ascend.compute_all(these, [CHECK], Path(directory))]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    with torch.no_grad():
        main()
