"""For all tests: no network, Triton's interpreter if there is no GPU, one torch thread, tiny pipelines."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch-npu without CANN would break `import torch`
if not any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # at the sizes of these tests, two threads are 3–18 times slower


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests that are marked long")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run folders with two workers by default. Single files, and tests on a GPU, run in one process."""
    option = config.option
    if hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None or option.tx:
        return  # a worker itself, pytest-xdist is not installed, or the user gave a number of workers
    if option.usepdb or option.collectonly or "TRITON_INTERPRET" not in os.environ:
        return
    if all(os.path.isdir(argument) for argument in config.args):
        option.numprocesses, option.dist = 2, "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that are marked long, unless --all or `-m` selects them."""
    if config.getoption("--all") or "long" in config.getoption("markexpr"):
        return
    long = {item for item in items if item.get_closest_marker("long")}
    if long:
        config.hook.pytest_deselected(items=[*long])
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    """Exclude all imported and collected objects from garbage collection, which saves 0.5 s in every full one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise nanobind reports leaks at exit


@pytest.fixture(autouse=True, scope="session")
def users_calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the calibrations in the data directory of this machine's user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def small_references() -> Iterator[None]:
    """Scale the edit pipelines' references to 64×64 pixels, for tests that call a pipeline without `tiny.generate`."""
    import tiny

    with tiny.small_references(), tiny.processor_without_video():
        yield


@pytest.fixture(params=["qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "z_image", "flux"])
def any_pipe(request: pytest.FixtureRequest) -> Any:
    """Each of the tiny pipelines in turn, freshly built."""
    import tiny

    return tiny.PIPELINES[request.param]()


@pytest.fixture
def qwen_pipe() -> Any:
    """A tiny Qwen-Image pipeline with 4 blocks."""
    import tiny

    return tiny.qwen_image()


@pytest.fixture
def z_pipe() -> Any:
    """A tiny Z-Image pipeline with 4 layers."""
    import tiny

    return tiny.z_image()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of saved tiny pipelines, by name: qwen_image, qwen_image_edit, z_image. Read only."""
    import tiny

    root = tmp_path_factory.mktemp("pipelines")
    with tiny.processor_without_video():
        for name in ("qwen_image", "qwen_image_edit", "z_image"):
            tiny.PIPELINES[name]().save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}
