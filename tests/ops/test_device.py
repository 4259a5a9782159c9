import dataclasses
import platform
import re
import types
from pathlib import Path

import pytest
import torch

import omni_kernels
from omni_kernels import device
from omni_kernels.device import Device, PeakMemory, Timer, describe, pretend

#: Who names torch.cuda, and why nobody else has to.
CUDA_ALONE = {
    "omni_kernels/device.py": "asks for everybody",
    "omni_kernels/validation/timing.py": "CUDA graphs",
    "benchmarks/gpu.py": "measures on NVIDIA GPUs only",
}


@pytest.fixture(autouse=True)
def forgotten():
    device._probe.cache_clear()
    yield
    device._probe.cache_clear()


def test_the_cpu():
    found = describe("cpu")
    assert (found.vendor, found.arch) == ("cpu", platform.machine())
    assert found.multiprocessors == torch.get_num_threads()


def properties(**more):
    return types.SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=150, **more)


def test_nvidia(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties())
    assert describe("cuda:1") == Device("nvidia", "sm_90", "A GPU", 132, 150)


def test_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = properties(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    assert describe("cuda") == Device("amd", "gfx942", "A GPU", 132, 150)


def test_a_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or properties())
    monkeypatch.setattr(torch.version, "hip", None)
    assert describe("cuda") is describe("cuda:0")
    describe(torch.device("cuda", 1))
    assert asked == [0, 1]


def test_ascend(monkeypatch):
    npu = types.SimpleNamespace(
        get_device_name=lambda index: "Ascend910B2",
        get_device_properties=lambda index: types.SimpleNamespace(total_memory=64, cube_core_num=24),
    )
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    assert device.PROBES["npu"](0) == Device("ascend", "Ascend910B2", "Ascend910B2", 24, 64)


def test_other_devices_are_named_by_torch():
    assert describe("meta") == Device("meta", "meta", "meta")


def test_pretending_ends_with_the_block():
    h200, b200 = Device("nvidia", "sm_90", "H200", 132), Device("nvidia", "sm_100", "B200", 148)
    with pretend("cuda", h200):
        with pretend("cuda", b200):
            assert describe("cuda:3") is b200
        assert describe("cuda:3") is h200
    assert not device._pretended


def test_a_description_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe("cpu").name = "another"


def test_a_device_is_asked_in_one_place():
    root = Path(omni_kernels.__file__).parents[1]
    asking = re.compile(r"\btorch\.(cuda|npu|accelerator|get_device_module)\b(?=\.|\()")
    found = {
        path.relative_to(root).as_posix(): {match[1] for match in asking.finditer(path.read_text(encoding="utf-8"))}
        for package in ("omni_kernels", "omni_runtime", "benchmarks")
        for path in (root / package).rglob("*.py")
    }
    assert {path for path, parts in found.items() if parts & {"cuda", "npu", "get_device_module"}} == {*CUDA_ALONE}
    # Of torch's own common interface, only which accelerators there are, and their memory, is asked elsewhere.
    assert {path for path, parts in found.items() if "accelerator" in parts} == {
        "omni_runtime/generation/loading.py",
        "omni_runtime/parallel/parallel.py",
        "omni_runtime/parallel/world.py",
        "omni_runtime/serving/forwards.py",
        "omni_runtime/serving/http/metrics.py",
        "benchmarks/train_emoji/__main__.py",
        "benchmarks/models/ranks.py",  # where diffusers is told that there is one
    }


def test_a_device_without_events_or_figures_of_memory(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: types.SimpleNamespace())
    for kind in ("cpu", "meta"):
        timer = Timer(torch.device(kind))
        start, end = timer.mark(), timer.mark()
        timer.wait(end)
        assert timer.seconds(start, end) == end - start >= 0
        assert PeakMemory(torch.device(kind)).bytes() is None


def test_the_most_memory_since_it_was_asked_for(monkeypatch):
    told = []
    figures = types.SimpleNamespace(
        reset_peak_memory_stats=lambda device: told.append(device), max_memory_allocated=lambda device: 7
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: figures)
    gpu = torch.device("cuda", 1)
    assert PeakMemory(gpu).bytes() == 7
    assert told == [gpu]
