"""`python -m omni_kernels.hub --out DIR`: write the ops as a repository that Hugging Face's package `kernels` loads.

    DIR/README.md                                what it is
    DIR/build/torch-universal/metadata.json      name, version, licence
    DIR/build/torch-universal/__init__.py        the ops
    DIR/build/torch-universal/_ops.py            their namespace in torch's dispatcher
    DIR/build/torch-universal/omni_kernels/      the same, for versions of `kernels` that look there

The build is pure Python and Triton, and needs nothing of this package. `kernels` loads a build from any path and under
any name, several builds in one process. So imports inside are relative. The namespace ends in a digest of the sources:
this package, and other builds, have other ones. Equal sources give equal files.

Source of the layout: "Kernel requirements" in the documentation of `kernels` 0.17.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent
#: The variant for any device on which torch runs.
VARIANT = "build/torch-universal"
#: The modules and folders that the ops need.
PARTS = ("device.py", "registration.py", "ops", "ascend", "tuned")
#: Of the repository: users ask for it by number. Raised when calls that worked would no longer work.
VERSION = 1

_NAMESPACE_LINE = 'NAMESPACE = "omni_kernels"\n'

_INIT = '''"""Triton kernels for diffusion transformers. On the CPU, the ops run in plain torch."""

from .ops import *
from .ops import __all__
'''

_OPS = '''"""The ops' own namespace in torch's dispatcher."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The op's full name."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''

_OLD_PLACE = '''"""What the folder above has, for versions of `kernels` that look here."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_name = "{namespace}"
if _name not in sys.modules:
    _spec = spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_name] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
_module = sys.modules[_name]
__all__ = _module.__all__
globals().update({{name: getattr(_module, name) for name in __all__}})
'''

_CARD = """---
library_name: kernels
license: apache-2.0
---

# omni-kernels

Triton kernels for diffusion transformers: {ops}.

```python
from pathlib import Path

from kernels import get_local_kernel

ops = get_local_kernel(Path("DIRECTORY"))
y = ops.gelu(x)
```

Made by `python -m omni_kernels.hub` from https://github.com/omni-kernels/omni-kernels.
"""


def sources() -> Iterator[tuple[str, str]]:
    """The files of a build that are copied: path within it, and text, with relative imports."""
    for part in PARTS:
        path = PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".json"):
                name, text = file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8")
                yield name, relative(text, name.count("/")) if file.suffix == ".py" else text


def relative(text: str, depth: int) -> str:
    """A module's text with `from omni_kernels…` as relative imports.

    Args:
        text: the module.
        depth: how many folders lie between the package and it.

    Raises:
        ValueError: the package is imported in a form that cannot be made relative.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "omni_kernels" for alias in node.names):
            raise ValueError(f"line {node.lineno}: write it as `from omni_kernels… import …`")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "omni_kernels":
            assert node.module is not None
            inside = node.module.removeprefix("omni_kernels").removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * (depth + 1)}{inside} ", 1)
    return "".join(lines)


def files(version: int = VERSION) -> dict[str, str]:
    """The whole repository: path → text.

    Args:
        version: of the repository.

    Raises:
        ValueError: a module imports the package in a form that cannot be made relative.
    """
    from omni_kernels.ops import OPS

    built = dict(sources())
    if built["registration.py"].count(_NAMESPACE_LINE) != 1:
        raise ValueError(f"registration.py must have the line {_NAMESPACE_LINE.strip()}")
    built["registration.py"] = built["registration.py"].replace(_NAMESPACE_LINE, "from ._ops import NAMESPACE\n")
    digest = hashlib.sha256(json.dumps([version, built], sort_keys=True).encode()).hexdigest()
    namespace = f"_omni_kernels_{digest[:12]}"
    metadata = {
        "id": namespace,
        "name": "omni-kernels",
        "version": version,
        "license": "Apache-2.0",
        "source": "https://github.com/omni-kernels/omni-kernels",
        "python-depends": [],
        "backend": {"type": "cuda"},  # the field has no word for all of them, and nothing is chosen by it here
    }
    built |= {
        "metadata.json": json.dumps(metadata, indent=2) + "\n",
        "__init__.py": _INIT,
        "_ops.py": _OPS.format(namespace=namespace),
        "omni_kernels/__init__.py": _OLD_PLACE.format(namespace=namespace),
    }
    card = _CARD.format(ops=", ".join(f"`{name}`" for name in OPS))
    return {"README.md": card} | {f"{VARIANT}/{name}": text for name, text in built.items()}


def write(directory: Path, version: int = VERSION) -> int:
    """Write the repository, in place of a build that is there. Returns the number of files.

    Args:
        directory: made if it is missing.
        version: of the repository.

    Raises:
        OSError: a file cannot be written.
    """
    shutil.rmtree(directory / VARIANT, ignore_errors=True)
    made = files(version)
    for name, text in made.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return len(made)


def main() -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m omni_kernels.hub", description="Write the ops for `kernels`.")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the repository")
    parser.add_argument("--version", type=int, default=VERSION, help="the version of the repository")
    options = parser.parse_args()
    try:
        count = write(options.out, options.version)
    except OSError as error:
        print(f"cannot write: {error}", file=sys.stderr)
        return 1
    print(f"{count} files in {options.out}; to load them: kernels.get_local_kernel(Path({str(options.out)!r}))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
