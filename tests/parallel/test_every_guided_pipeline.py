"""CFG parallelism on a tiny version of each of diffusers' pipelines that has guidance (`benchmarks.models`).

What every test asserts was computed by two processes, at once for all tests.
"""

import pytest
from several_ranks import NEEDED, on_ranks

from benchmarks.models import tiny
from omni_runtime import Omni

pytestmark = [*NEEDED, pytest.mark.long]

#: What is refused, and why.
REFUSED = {
    "AnyFlowFARPipeline": "the samples of a transformer call of AnyFlowFARPipeline cannot be computed apart",
    "GlmImagePipeline": "for both branches are given the same GlmImageKVCache by GlmImagePipeline",
    "GlmImagePipeline (image)": "for both branches are given the same GlmImageKVCache by GlmImagePipeline",
}
#: Pipelines whose guidance makes one call for three branches, one of which is perturbed: rank 0 makes it.
UNSHARED = {
    "HunyuanDiTPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "SanaPAGPipeline",
    "StableDiffusion3PAGImg2ImgPipeline",
    "StableDiffusion3PAGPipeline",
}


def guided():
    """The pipelines with guidance. `Omni` does not run modular pipelines."""
    names = [name for name in tiny.names() if not name.startswith("ModularPipeline")]
    return [name for name in names if tiny.build(name).guided or "(guidance)" in name]


def on_a_rank():
    """How far each picture is from that of one rank, and whether anything was shared; or why it is refused."""
    found = {}
    for name in guided():
        expected = tiny.build(name).generate(guided=True)
        model = tiny.build(name)
        omni = Omni(model.pipe, parallel={"cfg": 2})
        parallel = omni._parallel
        try:
            with parallel.section({"name": name}), parallel.during(model.pipe, None):
                made = model.generate(guided=True)
            off = ((made - expected).norm() / expected.norm()).item()
            found[name] = {"off": off, "shared": parallel._guidance._shared > 0}
        except ValueError as error:
            found[name] = {"refused": str(error)}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has found."""
    found = on_ranks(on_a_rank, tmp_path_factory.mktemp("ranks"))
    assert "error" not in found[0], found[0]["error"]
    return found


def test_every_pipeline_with_guidance_makes_the_picture_of_one_rank_or_is_refused(ranks):
    assert len(ranks[0]) > 140
    for rank in ranks:
        assert {name for name, one in rank.items() if "refused" in one} == {*REFUSED}
        assert {name for name, one in rank.items() if "off" in one and not one["off"] < 1e-5} == set()
        assert {name for name, one in rank.items() if "off" in one and not one["shared"]} == UNSHARED
        for name, words in REFUSED.items():
            assert words in rank[name]["refused"]
