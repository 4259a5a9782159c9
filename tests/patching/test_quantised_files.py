"""`save_quantised` and `load_quantised`: the same pictures, no full weights in memory, and files that do not fit."""

import json
import shutil

import diffusers
import pytest
import safetensors
import torch
from models import MODELS, latents
from safetensors.torch import load_file, safe_open, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import omni_kernels
from omni_kernels.device import Device, pretend
from omni_kernels.ops import _quantized
from omni_kernels.patching.quantized_linear import QuantizedLinear
from omni_runtime import Omni, load_quantised, save_quantised
from omni_runtime.generation import quantised_files

INT8 = {"dtype": "int8", "min_width": 0}
FP8 = {"dtype": "fp8", "min_width": 0}
MXFP8 = {"dtype": "mxfp8", "min_width": 0}
FILE = "transformer/quantised.safetensors"


class Made(TorchDispatchMode):
    """Records the shapes and dtypes of the tensors in memory that operators make while it is open."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and not one.is_meta:
                self.tensors.append((tuple(one.shape), one.dtype))
        return result


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved tiny Qwen-Image pipeline in int8, to read only."""
    path = tmp_path_factory.mktemp("quantised") / "int8"
    pipe = MODELS["qwen_image"].build()
    omni_kernels.patch(pipe, quantize=INT8)
    save_quantised(pipe, path)
    return path


@pytest.fixture
def own(directory, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(directory, tmp_path / "own")


def changed(directory, change, metadata=None):
    """Write the transformer's tensors again after `change(tensors)`."""
    file = directory / FILE
    with safe_open(file, "pt") as opened:
        header = opened.metadata() if metadata is None else metadata
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, header)


@pytest.mark.parametrize("keep", ["host", "none"])
@pytest.mark.parametrize("how", [INT8, FP8, MXFP8], ids=["int8", "fp8", "mxfp8"])
def test_a_loaded_pipeline_makes_the_same_picture(qwen_pipe, tmp_path, how, keep):
    handle = omni_kernels.patch(qwen_pipe, quantize=how | {"keep": keep}, fuse=False)
    expected = latents(qwen_pipe)
    save_quantised(qwen_pipe, tmp_path / "new" / "one")
    assert torch.equal(latents(qwen_pipe), expected), "saving changes nothing"
    assert "save_pretrained" not in vars(qwen_pipe.transformer)
    again = load_quantised(tmp_path / "new" / "one")
    layers = [name for name, one in again.transformer.named_modules() if isinstance(one, QuantizedLinear)]
    assert [f"transformer.{name}" for name in layers] == handle.quantised.replaced
    assert torch.equal(latents(again), expected)
    assert not again.transformer.training


def test_scales_of_mxfp8_are_laid_out_for_this_device_and_checked(qwen_pipe, tmp_path, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr(_quantized, "SWIZZLED", not _quantized.SWIZZLED)
        omni_kernels.patch(qwen_pipe, quantize=MXFP8, fuse=False)
        expected = latents(qwen_pipe)
        save_quantised(qwen_pipe, tmp_path)
    assert torch.equal(latents(load_quantised(tmp_path)), expected)

    def cut(tensors):
        key = next(key for key in tensors if key.endswith(".weight_scale"))
        tensors[key] = tensors[key][:-1].contiguous()

    changed(tmp_path, cut)
    with pytest.raises(ValueError, match=r"quantised\.safetensors is damaged: .* has no weights in MXFP8"):
        load_quantised(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_with_a_fused_forward_is_loaded(name, tmp_path):
    model = MODELS[name]
    pipe = model.build(**model.options)
    omni_kernels.patch(pipe, quantize=INT8, fuse=False)
    expected = latents(pipe)
    save_quantised(pipe, tmp_path / "saved")
    transformer = quantised_files.load_transformer(tmp_path / "saved" / FILE, torch.float32)
    assert {key: (one.shape, one.dtype) for key, one in transformer.state_dict().items()} == {
        key: (one.shape, one.dtype) for key, one in pipe.transformer.state_dict().items()
    }
    pipe.transformer = transformer
    assert torch.equal(latents(pipe), expected)


def test_no_full_weight_is_made(tmp_path):
    model = MODELS["wan"]
    pipe = model.build(**model.options)
    omni_kernels.patch(pipe, quantize=INT8)
    save_quantised(pipe, tmp_path / "saved")
    with Made() as made:
        transformer = quantised_files.load_transformer(tmp_path / "saved" / FILE, torch.bfloat16)
    layers = [one for one in transformer.modules() if isinstance(one, QuantizedLinear)]
    others = {tuple(one.shape) for one in transformer.parameters()}
    only = {tuple(layer.weight.shape) for layer in layers} - others
    assert len(only) >= 2, "there are shapes that only quantised layers have"
    assert not only & {shape for shape, dtype in made.tensors if dtype not in (torch.int8, torch.bool)}
    with Made() as made:  # full weights would have been seen
        diffusers.WanTransformer3DModel.from_config(transformer.config)
    assert only <= {shape for shape, dtype in made.tensors if dtype == torch.float32}


def test_a_file_that_is_mapped_anew_gives_the_same(directory, monkeypatch):
    expected, opened = quantised_files.load_transformer(directory / FILE, torch.float32).state_dict(), []
    monkeypatch.setattr(quantised_files, "_MAPPED", 10_000)
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    again = quantised_files.load_transformer(directory / FILE, torch.float32).state_dict()
    assert len(opened) > 10
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in again)


def test_tensors_do_not_change_with_the_file(own):
    transformer = quantised_files.load_transformer(own / FILE, torch.float32)
    before = {key: one.clone() for key, one in transformer.state_dict().items()}
    with (own / FILE).open("r+b") as file:
        file.seek(-10_000, 2)
        file.write(b"\1" * 10_000)
    assert all(torch.equal(one, before[key]) for key, one in transformer.state_dict().items())


def test_the_file_has_8_bits_and_the_rest_as_it_was(directory, qwen_pipe):
    tensors, plain = load_file(directory / FILE), qwen_pipe.transformer.state_dict()
    scales = {key for key in tensors if key.endswith(".weight_scale")}
    assert tensors.keys() - scales == plain.keys()
    weights = {key.removesuffix("_scale") for key in scales}
    assert {tensors[key].dtype for key in weights} == {torch.int8}
    for key in plain.keys() - weights:
        assert torch.equal(tensors[key], plain[key])
    assert not list((directory / "transformer").glob("diffusion_pytorch_model*"))


def test_diffusers_alone_takes_no_8_bits_for_weights(directory):
    with pytest.raises(OSError, match=r"diffusion_pytorch_model"):
        diffusers.DiffusionPipeline.from_pretrained(directory)


def test_dtypes_are_kept_or_those_that_are_named(qwen_pipe, tmp_path):
    qwen_pipe.transformer.to(torch.bfloat16)
    omni_kernels.patch(qwen_pipe, quantize=INT8)
    save_quantised(qwen_pipe, tmp_path / "saved")
    again = load_quantised(tmp_path / "saved")
    assert (again.transformer.dtype, again.vae.dtype) == (torch.bfloat16, torch.float32)
    assert {one.dtype for one in again.transformer.parameters()} == {torch.bfloat16}
    again = load_quantised(tmp_path / "saved", dtype=torch.float16)
    assert (again.transformer.dtype, again.vae.dtype) == (torch.float16, torch.float16)
    assert {one.dtype for one in again.transformer.buffers()} == {torch.int8, torch.float32}


def test_a_loaded_pipeline_is_patched_and_saved_again(directory, tmp_path):
    pipe = load_quantised(directory)
    plain = latents(pipe, num_inference_steps=8)
    with omni_kernels.patched(pipe, "velocity_cache", {"budget": 4}) as handle:
        latents(pipe, num_inference_steps=8)
        assert handle.report.skipped
        save_quantised(pipe, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (directory / FILE).read_bytes()
    assert torch.equal(latents(pipe, num_inference_steps=8), plain)
    with pytest.raises(ValueError, match=r"transformer\.transformer_blocks\.0\.\S+ is quantised already, by"):
        omni_kernels.patch(pipe, quantize=INT8)


def test_omni_recognises_the_directory(directory):
    with Omni(str(directory), cache_backend=None) as omni:
        picture = omni.generate("a cat", num_inference_steps=2, height=32, width=32, seed=0, output_type="latent")
        assert any(isinstance(one, QuantizedLinear) for one in omni.pipe.transformer.modules())
        assert omni.pipe.transformer.dtype == torch.float32
        assert picture
    again = load_quantised(directory)
    assert again.name_or_path == str(directory)


def test_wan_with_two_transformers(tmp_path):
    model = MODELS["wan"]
    pipe, other = model.build(**model.options), model.build(**model.options)
    pipe.register_modules(transformer_2=other.transformer)
    omni_kernels.patch(pipe, quantize=INT8)
    save_quantised(pipe, tmp_path / "saved")
    assert [file.parent.name for file in quantised_files.quantised_in(tmp_path / "saved")] == [
        "transformer",
        "transformer_2",
    ]
    again = load_quantised(tmp_path / "saved")
    assert all(
        any(isinstance(layer, QuantizedLinear) for layer in one.modules())
        for one in (again.transformer, again.transformer_2)
    )
    with Omni(str(tmp_path / "saved"), cache_backend=None) as omni:
        assert any(isinstance(layer, QuantizedLinear) for layer in omni.pipe.transformer_2.modules())


def test_layers_of_torchao_and_those_with_edge_steps_are_saved(tmp_path):
    torchao = pytest.importorskip("torchao")
    for name in ("torchao", "edges"):
        pipe = MODELS["qwen_image"].build()
        if name == "torchao":
            config = torchao.quantization.Int8DynamicActivationInt8WeightConfig()
            torchao.quantize_(pipe.transformer, config, filter_fn=lambda layer, name: name.endswith("attn.to_q"))
        omni_kernels.patch(pipe, quantize=INT8 | ({"edge_steps": (1, 0)} if name == "edges" else {}), fuse=False)
        expected = pipe.transformer.state_dict()
        save_quantised(pipe, tmp_path / name)
        again = load_quantised(tmp_path / name).transformer.state_dict()
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in again)


# What cannot be saved


def test_a_pipeline_that_is_not_quantised_is_not_saved(qwen_pipe, tmp_path):
    with pytest.raises(ValueError, match="no layer of this QwenImagePipeline is quantised"):
        save_quantised(qwen_pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_over(qwen_pipe, tmp_path):
    omni_kernels.patch(qwen_pipe, quantize=INT8)
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="is there already, and is not an empty directory"):
        save_quantised(qwen_pipe, tmp_path)
    with pytest.raises(FileExistsError, match="mine is there already"):
        save_quantised(qwen_pipe, tmp_path / "mine")


def test_an_adapter_is_not_saved(qwen_pipe, tmp_path):
    omni_kernels.patch(qwen_pipe, quantize=INT8 | {"exclude": ["attn.to_q"]})
    qwen_pipe.transformer.add_adapter(__import__("peft").LoraConfig(r=2, target_modules=["to_q"]), "lora")
    with pytest.raises(ValueError, match=r"transformer cannot be saved: its tensors are not those of a QwenImageTrans"):
        save_quantised(qwen_pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_of_other_libraries_are_not_saved(qwen_pipe, tmp_path):
    torchao = pytest.importorskip("torchao")
    omni_kernels.patch(qwen_pipe, quantize=INT8 | {"exclude": ["img_mod"]})
    chosen = qwen_pipe.transformer.transformer_blocks[0].img_mod[1]
    config = torchao.quantization.Int8WeightOnlyConfig()
    torchao.quantize_(qwen_pipe.transformer, config, filter_fn=lambda layer, name: layer is chosen)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.img_mod\.1\.weight is a Int8Tensor"):
        save_quantised(qwen_pipe, tmp_path / "new")


# Files that are damaged, or do not fit


def without(key):
    return lambda tensors: tensors.pop(key)


def other(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


Q = "transformer_blocks.1.attn.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{Q}.bias"), rf"lacks tensors, such as {Q}\.bias"),
        (without(f"{Q}.weight"), rf"lacks tensors, such as {Q}\.weight"),
        (without(f"{Q}.weight_scale"), rf"{Q}\.weight is int8 without its scales"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "holds unknown tensors, such as more"),
        (other(f"{Q}.weight", lambda t: t[:-1]), rf"does not fit its config.json: {Q}\.weight is \[\d+, \d+\], not"),
        (other(f"{Q}.weight_scale", lambda t: t[:-1]), rf"does not fit its config.json: {Q}\.weight_scale is \["),
        (other(f"{Q}.bias", lambda t: t[:-1]), rf"does not fit its config.json: {Q}\.bias is \[\d+\], not"),
        (other(f"{Q}.weight", lambda t: t.float()), rf"is damaged: {Q} has no 8-bit weights"),
        (other(f"{Q}.weight_scale", lambda t: t.half()), rf"is damaged: {Q} has no 8-bit weights"),
        (other(f"{Q}.weight_scale", lambda t: t * float("nan")), rf"is damaged: {Q} has scales that are not finite"),
        (
            lambda tensors: tensors.update({f"{Q}x.weight": torch.ones(2, 2), f"{Q}x.weight_scale": torch.ones(2)}),
            rf"does not fit its config.json: the model has no linear layer {Q}x",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(own, change, message):
    changed(own, change)
    with pytest.raises(ValueError, match=rf"transformer/quantised\.safetensors.*{message}"):
        load_quantised(own)
    with pytest.raises(ValueError, match=message), Omni(str(own), cache_backend=None) as omni:
        omni.load()


def test_a_damaged_file_is_named(own):
    file, config = own / FILE, own / "transformer" / "config.json"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:5], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"transformer/quantised\.safetensors is damaged"):
            load_quantised(own)
    file.write_bytes(whole)
    key = "omni_runtime.quantised"
    for header, message in [
        (
            {"format": "pt"},
            "was not written by omni_runtime.save_quantised: its header has no 'omni_runtime.quantised'",
        ),
        ({key: "[]"}, r"is damaged: its header's 'omni_runtime.quantised' is '\[\]'"),
        ({key: '{"version": 2, "dtypes": {}}'}, "has version 2 of its format, and this one reads 1"),
        ({key: '{"version": 1, "dtypes": {"vae": "float31"}}'}, "is damaged: there is no dtype 'float31'"),
    ]:
        changed(own, lambda tensors: None, header)
        with pytest.raises(ValueError, match=rf"quantised\.safetensors {message}"):
            load_quantised(own)
    file.write_bytes(whole)
    text = config.read_text()
    for content in ("{", "[]", "{}"):
        config.write_text(content)
        with pytest.raises(ValueError, match=r"transformer/config\.json is damaged"):
            load_quantised(own)
    config.write_text(json.dumps(json.loads(text) | {"_class_name": "Unknown"}))
    with pytest.raises(ValueError, match=r"transformer/config\.json: diffusers .* has no ModelMixin 'Unknown'"):
        load_quantised(own)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*transformer/config\.json"):
        load_quantised(own)


def test_a_device_that_does_not_multiply_it_is_told(qwen_pipe, tmp_path):
    omni_kernels.patch(qwen_pipe, quantize=FP8)
    save_quantised(qwen_pipe, tmp_path / "saved")
    device = torch.device("cuda:0")
    for arch, message in [
        (Device("nvidia", "sm_86", "an old one"), "needs a GPU that multiplies fp8 .*an old one does not"),
        (Device("amd", "gfx942", "MI300"), "holds float8_e4m3fn, which cuda:0 does not multiply: quantise it there"),
    ]:
        with pretend("cuda", arch), pytest.raises(ValueError, match=message):
            quantised_files.load_transformer(tmp_path / "saved" / FILE, torch.bfloat16, device)
    with pretend("cuda", Device("nvidia", "sm_90", "a new one")):
        assert quantised_files.load_transformer(tmp_path / "saved" / FILE, torch.bfloat16, device)


def test_a_directory_without_a_quantised_transformer_is_told(saved, tmp_path):
    for directory in (saved["qwen_image"], tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no quantised transformer"):
            load_quantised(directory)
