"""For all tests: no network, Triton's interpreter where there is no GPU, one torch thread, tiny pipelines."""

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

torch.set_num_threads(1)  # two are 3–18 times slower at the sizes of these tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests that are marked long, too")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Folders are run by two workers where nothing else is said; files, and whatever runs at a GPU, by one process."""
    option = config.option
    if hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None or option.tx:
        return  # a worker itself, or pytest-xdist is not there, or it was told
    if option.usepdb or option.collectonly or "TRITON_INTERPRET" not in os.environ:
        return
    if all(os.path.isdir(argument) for argument in config.args):
        option.numprocesses, option.dist = 2, "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked long, unless --all or `-m` asks for it."""
    if config.getoption("--all") or "long" in config.getoption("markexpr"):
        return
    long = {item for item in items if item.get_closest_marker("long")}
    if long:
        config.hook.pytest_deselected(items=[*long])
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: passing over it took 0.5 s of every full garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind tells of what is left at the end


@pytest.fixture(autouse=True, scope="session")
def users_calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has calibrated on this machine counts for no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def small_references() -> Iterator[None]:
    """The edit pipelines' references at 64×64 pixels, for tests that call a pipeline without `tiny.generate`."""
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
