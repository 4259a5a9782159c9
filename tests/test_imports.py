"""Imports: they point one way, change nothing, ask no device, and load neither diffusers nor transformers."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import omni_kernels
import omni_runtime

ROOT = Path(omni_kernels.__file__).parents[1]

#: Who may be imported by whom: a module imports nothing of a higher layer. The longest matching name counts.
LAYERS = {
    "omni_kernels.device": 0,
    "omni_kernels.ascend": 0,
    "omni_kernels.registration": 0,
    "omni_kernels.ops": 1,
    "omni_kernels.compilations": 1,
    "omni_kernels.patching": 2,
    "omni_kernels": 3,
    "omni_runtime": 4,
    "benchmarks": 5,
    "tests": 5,
}


def sources(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, path, ast.parse(path.read_text(encoding="utf-8"))


def layer(module):
    while module:
        if module in LAYERS:
            return LAYERS[module]
        module = module.rpartition(".")[0]
    return None


def is_module(name):
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file() or (ROOT / name.replace(".", "/")).is_dir()


def imported(name, path, nodes):
    """Names of the modules that the import statements among `nodes` name."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base


def at_import(tree):
    """The nodes that run when the module is imported: all that are in no function and not for type checkers only."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("package", ["omni_kernels", "omni_runtime"])
def test_imports_point_one_way(package):
    wrong, seen = [], 0
    for name, path, tree in sources(package):
        for target in imported(name, path, ast.walk(tree)):
            if layer(target) is not None:
                seen += 1
                if layer(target) > layer(name):
                    wrong.append(f"{name} imports {target}")
    assert wrong == []
    assert seen > 10, "the check has seen the imports"


def imports(packages):
    """Module → the modules that it imports, in functions too; to import from another package runs that first."""
    found = {}
    for package in packages:
        for name, path, tree in sources(package):
            targets = set()
            for target in imported(name, path, ast.walk(tree)):
                while target.partition(".")[0] in packages and target != name:
                    targets.add(target)
                    target = target.rpartition(".")[0]
                    if not target or f"{name}.".startswith(f"{target}."):
                        break
            found[name] = targets
    return found


def circles(graph):
    """The largest sets of modules each of which imports all the others, by whatever way."""
    reached = {}
    for name in graph:
        todo, seen = [*graph[name]], set()
        while todo:
            if (other := todo.pop()) in graph and other not in seen:
                seen.add(other)
                todo += graph[other]
        reached[name] = seen
    of = [frozenset(o for o in reached[name] if name in reached[o]) for name in graph if name in reached[name]]
    return sorted(map(sorted, set(of)))


def test_no_modules_import_each_other():
    graph = imports(["omni_kernels", "omni_runtime"])
    assert "omni_kernels.registration" in graph["omni_kernels.ops.gelu"], "the check has seen the imports"
    assert circles(graph) == []


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d", "torch"}, "f": {"a"}}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("package", ["omni_kernels", "omni_runtime"])
def test_no_module_imports_diffusers_or_transformers_at_import(package):
    wrong = [
        f"{name} imports {target}"
        for name, path, tree in sources(package)
        for target in imported(name, path, at_import(tree))
        if target.partition(".")[0] in ("diffusers", "transformers", "accelerate", "peft", "cache_dit")
    ]
    assert wrong == []


def test_kernels_name_neither_runtime_nor_diffusers():
    wrong = [
        f"{name} imports {target}"
        for name, path, tree in sources("omni_kernels")
        for target in imported(name, path, ast.walk(tree))
        if target.partition(".")[0] in ("omni_runtime", "diffusers", "transformers")
    ]
    assert wrong == []


def in_fresh_process(script):
    """What `script` prints as JSON, in a Python of its own, where Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:omni_kernels", "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


SNAPSHOT = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings
import torch, triton

def contents(owner):
    return {key: id(value) for key, value in vars(owner).items() if key != "__warningregistry__"}

def state():
    owners = [torch, torch.nn, torch.nn.functional, torch.nn.Module, torch.nn.ModuleList, torch.nn.Linear, torch.Tensor,
              torch.cuda, torch.accelerator, triton, triton.JITFunction, warnings]
    return {
        "attributes": [contents(owner) for owner in owners],
        "environment": dict(os.environ),
        "import": [list(map(id, found)) for found in (sys.meta_path, sys.path_hooks)] + [list(sys.path)],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch": [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                  torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark],
        "random": torch.get_rng_state().tolist(),
    }

asked = []
def audit(event, args):
    if event == "open" and str(args[0]).startswith(("/dev/", "/proc/driver", "/sys/class")):
        asked.append([event, str(args[0])])
    elif event in ("subprocess.Popen", "os.system", "ctypes.dlopen", "socket.connect"):
        asked.append([event, str(args[0])])

def recording(owner, name):
    original = getattr(owner, name)
    def record(*args, **kwargs):
        asked.append(["call", name])
        return original(*args, **kwargs)
    setattr(owner, name, record)

for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
             "get_device_name", "_lazy_init"):
    recording(torch.cuda, name)
for name in ("is_available", "current_accelerator", "device_count", "current_device_index"):
    recording(torch.accelerator, name)
sys.addaudithook(audit)
before = state()
"""


def test_importing_changes_nothing_and_asks_no_device():
    found = in_fresh_process(
        SNAPSHOT
        + """
import omni_kernels, omni_runtime
from triton.runtime.driver import driver
after = state()
print(json.dumps({
    "asked": asked,
    "changed": [key for key in before if before[key] != after[key]],
    "cuda": torch.cuda.is_initialized(),
    "driver": driver._active is not None,
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""
    )
    assert found["changed"] == []
    assert found["asked"] == []
    assert not found["cuda"]
    assert not found["driver"], "triton looks for a device when its driver becomes active"
    assert {"omni_kernels", "omni_runtime", "torch", "triton"} <= set(found["loaded"])
    assert not {"diffusers", "transformers", "accelerate", "peft", "cache_dit"} & set(found["loaded"])


def test_every_module_can_be_imported_without_diffusers_and_asks_no_device():
    """Also the modules that are loaded only when they are needed: the caches know diffusers by its instances."""
    found = in_fresh_process(
        SNAPSHOT
        + """
for name in ("diffusers", "transformers", "accelerate", "peft", "cache_dit"):
    sys.modules[name] = None  # importing it now raises
names = ["omni_kernels", "omni_runtime"]
for package in names[:]:
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
    names += [module.name for module in found if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps({
    "asked": asked,
    "changed": [key for key in before if before[key] != after[key]],
    "cuda": torch.cuda.is_initialized(),
    "names": names,
}))
"""
    )
    assert {"omni_kernels.patching.changes", "omni_runtime.cache.session", "omni_runtime.cache.methods"} <= set(
        found["names"]
    )
    assert found["changed"] == []
    assert found["asked"] == []
    assert not found["cuda"]


def test_kernels_need_no_runtime():
    found = in_fresh_process(
        """
import json, sys
sys.modules["omni_runtime"] = None
import torch, omni_kernels
from omni_kernels import patching
sums = omni_kernels.ops.relative_l1(torch.ones(1, 4), torch.ones(1, 4) * 2)
print(json.dumps([sums.tolist(), sorted(patching.backends.built_in())]))
"""
    )
    assert found == [[[4.0, 8.0]], []]


def test_own_methods_are_found_in_a_checkout_that_is_not_installed():
    """Without any distribution's metadata, and without a look at it."""
    found = in_fresh_process(
        """
import json
from importlib import metadata
from omni_kernels import patching
del metadata.entry_points
known = patching.backends.built_in()
print(json.dumps([name for name in known if patching.backends.get(name) is known[name]]))
"""
    )
    assert found == [
        "auto", "velocity_cache", "tea_cache", "cache_dit", "first_block_cache", "mag_cache", "sea_cache", "easy_cache",
    ]  # fmt: skip


@pytest.mark.parametrize("package", [omni_kernels, omni_kernels.ops, omni_kernels.patching, omni_runtime])
def test_public_names_exist(package):
    assert all(getattr(package, name, None) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))


def test_public_names_of_the_kernels():
    assert omni_kernels.__all__ == [
        "PatchConflictError",
        "PatchHandle",
        "__version__",
        "ops",
        "patch",
        "patched",
        "unpatch",
        "warmup",
    ]


def test_no_two_modules_of_tests_share_a_name():
    """They are imported by their names alone: the second would be the first one."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.py") if path.stem != "conftest"]
    assert sorted(names) == sorted(set(names))
