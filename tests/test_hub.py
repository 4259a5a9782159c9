"""The build for Hugging Face's package `kernels`: it stands alone, and is loaded beside this package."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from omni_kernels import hub
from omni_kernels.ops import OPS

ROOT = Path(hub.__file__).parents[1]
#: Where `make test` installs the package, so that no other one finds it.
KERNELS = Path(sys.prefix) / "kernels"


def test_a_build_imports_nothing_of_this_package():
    built = hub.files()
    allowed = {*sys.stdlib_module_names, "torch", "triton", "torch_npu"}
    for name, text in built.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert node.module.split(".")[0] in allowed, name
                elif isinstance(node, ast.ImportFrom) and node.module:
                    folder = Path(name).parents[node.level - 1]
                    place = folder / node.module.replace(".", "/")
                    assert f"{place}.py" in built or f"{place}/__init__.py" in built, f"{name} imports {place}"


def test_a_module_that_is_imported_by_name_is_refused():
    with pytest.raises(ValueError, match="line 2: write it as"):
        hub.relative("import torch\nimport omni_kernels.device\n", 0)
    text = "from omni_kernels import a\nfrom omni_kernels.ops._b import (\n    c,\n)\nfrom omni_kernels.ops import d\n"
    expected = "from .. import a\nfrom ..ops._b import (\n    c,\n)\nfrom ..ops import d\n"
    assert hub.relative(text, 1) == expected


def test_equal_sources_give_equal_builds_and_others_another_namespace(tmp_path):
    assert hub.files() == hub.files()
    names = {json.loads(hub.files(version)[f"{hub.VARIANT}/metadata.json"])["id"] for version in (1, 2)}
    assert len(names) == 2
    hub.write(tmp_path)
    gone = tmp_path / hub.VARIANT / "ops" / "gone.py"
    gone.write_text("")
    assert hub.write(tmp_path) == len([path for path in tmp_path.rglob("*") if path.is_file()])


LOADED = """
    import json, sys
    from pathlib import Path

    import torch
    from kernels import get_local_kernel

    first, second = (get_local_kernel(Path(folder)) for folder in sys.argv[1:])
    alone = "omni_kernels" not in sys.modules
    import omni_kernels

    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    namespaces = {one.__name__ for one in (first, second, omni_kernels)}
    differences = {}
    for ops in (first, second):
        op = getattr(torch.ops, ops.__name__).swiglu  # as torch.compile calls it
        assert torch.equal(op(x, x, None, False)[0], omni_kernels.ops.swiglu(x, x))
        for name, arguments in {"gelu": (x,), "swiglu": (x, x), "rms_norm": (x, weight)}.items():
            expected = getattr(omni_kernels.ops, name)(*arguments)
            assert torch.equal(getattr(ops, name)(*arguments), expected), name
            kernel = ops.OPS[name].launcher(*arguments)  # interpreted
            differences[name] = (kernel - expected).abs().max().item()
    old = Path(sys.argv[1]) / "build/torch-universal/omni_kernels/__init__.py"
    space = {"__file__": str(old), "__name__": "old"}
    exec(old.read_text(), space)
    print(json.dumps({
        "alone": alone, "namespaces": len(namespaces), "differences": differences,
        "same": space["gelu"] is first.gelu, "all": first.__all__,
    }))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None and not KERNELS.is_dir(), reason="`kernels` is not installed"
)
def test_kernels_loads_two_builds_beside_this_package(tmp_path):
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for version, folder in enumerate(folders, 1):
        hub.write(Path(folder), version)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(KERNELS)]), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADED), *folders],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["alone"], "the builds have imported this package"
    assert told["namespaces"] == 3
    assert told["same"]
    assert set(OPS) < set(told["all"])
    assert max(told["differences"].values()) < 1e-5
