"""Linear layers of transformer blocks in 8 bits: weights once, activations token by token as they come.

    y = (quantize(x) · quantize(W)ᵀ) · scale(x) · scale(W) + bias        x: [..., K], W: [N, K], y: [..., N]

Each output channel of a weight has a scale, and so has each token of an activation. In MXFP8, each 32 channels of a
weight's row or a token have one (`omni_kernels.ops.quantize`). The product in 8 bits, with scales and bias, is
`omni_kernels.ops.scaled_mm`. Where a device has none, the 8-bit values are multiplied in fp32, which is not faster.

Only layers inside the transformer's lists of blocks are quantised. Embeddings, time, modulation, norms and the final
layer are small and sensitive; they stay as they are.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from omni_kernels.device import describe, generation, has_mxfp8
from omni_kernels.ops._quantized import MX
from omni_kernels.patching import edges, torchao_layers
from omni_kernels.patching.backends import nearest, shown
from omni_kernels.patching.changes import Patch
from omni_kernels.patching.quantized_linear import QuantizedLinear
from omni_kernels.patching.structure import components, hooked

#: What `quantize` may name.
DTYPES = ("int8", "fp8", "mxfp8")
#: Names in a layer's path that mark modulation, norms and embeddings.
SENSITIVE = re.compile(r"(?:^|[._])(?:\w*mod(?:ulation)?|ada\w*|\w*norm\w*|\w*embed\w*|time\w*)(?=[._]|$)")
#: Class of blocks → layers that hurt the picture if they are quantised, from vLLM-Omni's notes on FP8.
LEFT_OUT = {"QwenImageTransformerBlock": ("img_mlp",)}
#: The module that reads calibrations. `omni_kernels` does not depend on `omni_runtime`: it is named only here.
_CALIBRATION = "omni_runtime.cache.calibration"
#: Where the layers' own weights are kept while they are quantised.
KEEP = ("host", "reload", "none")
#: The dtype of fp8 on AMD's architectures that multiply it, and NVIDIA's first one.
_ON_AMD, _FIRST_WITH_FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}, 89
#: In MXFP8, the GPU's product takes these multiples of input and output features.
_MULTIPLES = 32, 16


@dataclass(frozen=True)
class Options:
    """What is quantised, and how.

    Attributes:
        dtype: one of `DTYPES`.
        include: patterns of paths that are quantised although a rule leaves them out.
        exclude: patterns of paths that are not quantised.
        min_width: layers with fewer input or output features stay as they are. Their products take little time.
        keep: how the layers' own weights come back when the patch is undone. "host" keeps them on the CPU. "reload"
            drops them and reads them again from the safetensors files that the model was loaded from. "none" drops
            them: the patch cannot be undone.
        edge_steps: how many of the first and of the last steps of a request run with the layers' own weights, which
            then stay on the device.
        calibrated: patterns of paths that the model's calibration leaves out (`complete`); not given by the user.
    """

    dtype: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_width: int = 512
    keep: str = "host"
    edge_steps: tuple[int, int] = (0, 0)
    calibrated: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """The options as `patch` takes them."""
        return {key: value for key, value in vars(self).items() if key != "calibrated"}


def options_of(given: Any) -> Options | None:
    """The options that an argument `quantize` stands for: None, a dtype, or a dict of `Options`' attributes.

    Raises:
        ValueError, TypeError: a key or a value is not allowed; the message names it.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        given = {"dtype": given}
    keys = [key for key in Options.__dataclass_fields__ if key != "calibrated"]
    for key in given:
        if key not in keys:
            raise ValueError(f"quantize has no key {shown(key)}: {nearest(str(key), keys)}")
    if given.get("dtype") not in DTYPES:
        raise ValueError(f"quantize must be 'int8', 'fp8' or 'mxfp8', not {shown(given.get('dtype'))}")
    made = dict(given)
    for key in ("include", "exclude"):
        patterns = made.get(key, ())
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
            raise TypeError(f"quantize: {key} must be a list of layers' names, not {shown(patterns)}")
        made[key] = tuple(patterns)
    width = made.get("min_width", 0)
    if isinstance(width, bool) or not isinstance(width, int) or width < 0:
        raise ValueError(f"quantize: min_width must be a number of features from 0 on, not {shown(width)}")
    if made.get("keep", "host") not in KEEP:
        raise ValueError(f"quantize: keep must be 'host', 'reload' or 'none', not {shown(made['keep'])}")
    made["edge_steps"] = _edge_steps(made.get("edge_steps", (0, 0)))
    if any(made["edge_steps"]) and made.get("keep", "host") != "host":
        raise ValueError(f"quantize: edge_steps needs the layers' own weights, which keep={made['keep']!r} drops")
    return Options(**made)


def _edge_steps(given: Any) -> tuple[int, int]:
    pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    if not (pair and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given)):
        raise ValueError(f"quantize: edge_steps must be two numbers of steps from 0 on, not {shown(given)}")
    first, last = given
    return first, last


def complete(options: Options | None, directory: Any) -> Options | None:
    """The options, with what `omni calibrate precision` found for the model.

    Layers that the user excludes or includes by name take the place of a calibration.

    Args:
        directory: the directory or hub id that the pipeline was loaded from; None if it is not known.

    Raises:
        ValueError: the model's calibration cannot be read; the message names the file.
    """
    if options is None or options.exclude or options.include or not isinstance(directory, str):
        return options
    try:
        calibration: Any = importlib.import_module(_CALIBRATION)
    except ModuleNotFoundError as error:
        if not f"{_CALIBRATION}.".startswith(f"{error.name}."):
            raise
        return options
    method = f"quantize_{options.dtype}"
    own = calibration.own_file(directory, method)
    if own is None:
        return options
    return replace(options, calibrated=tuple(calibration.read(own, method)["exclude"]))


def dtype_on(name: str, device: torch.device) -> torch.dtype:
    """The dtype by which `omni_kernels.ops.quantize` knows one of `DTYPES` on a device.

    Raises:
        ValueError: the device has no products in this dtype.
    """
    if name == "int8" or device.type in ("cpu", "meta"):
        return {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "mxfp8": MX}[name]
    where = describe(device)
    if name == "mxfp8":
        if has_mxfp8(device):
            return MX
        raise ValueError(f"quantize='mxfp8' needs a GPU that multiplies MXFP8 (sm_100, gfx950); {where.name} does not")
    found = _ON_AMD.get(where.arch)
    if where.vendor == "nvidia" and generation(where.arch) >= _FIRST_WITH_FP8:
        found = torch.float8_e4m3fn
    if found is None:
        raise ValueError(
            f"quantize='fp8' needs a GPU that multiplies fp8 (sm_89 or newer, gfx942, gfx950); {where.name} does not"
        )
    return found


@dataclass(frozen=True)
class LayerQuantisation:
    """Whether one linear layer was quantised.

    Attributes:
        name: its path, such as "transformer.transformer_blocks.0.attn.to_q".
        reason: why it was left as it is; None if it was quantised.
        freed: the bytes that its weights take less on the device; negative if its own ones stay there, too.
    """

    name: str
    reason: str | None = None
    freed: int = 0


class Quantisation(tuple[LayerQuantisation, ...]):
    """Which linear layers a patch quantised, and which it did not and why. Prints one line for each kind."""

    __slots__ = ()

    @property
    def replaced(self) -> list[str]:
        """Names of the quantised layers."""
        return [entry.name for entry in self if entry.reason is None]

    @property
    def left_alone(self) -> dict[str, str]:
        """The names of the layers that were not quantised, with the reasons."""
        return {entry.name: entry.reason for entry in self if entry.reason is not None}

    @property
    def freed(self) -> int:
        """The bytes that the weights take less on the device."""
        return sum(entry.freed for entry in self)

    def __str__(self) -> str:
        kinds: dict[tuple[str, str | None], int] = {}
        for entry in self:
            kind = group_of(entry.name), entry.reason
            kinds[kind] = kinds.get(kind, 0) + 1
        lines = [
            f"{name}: {count} " + ("quantised" if reason is None else f"left alone: {reason}")
            for (name, reason), count in kinds.items()
        ]
        change = "freed" if self.freed >= 0 else "more"
        return "\n".join([*lines, f"{abs(self.freed) / 1e6:.1f} MB {change} on the device"])


def group_of(name: str) -> str:
    """The pattern of a layer's path in all blocks of its list."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


@dataclass
class _Kept:
    """The change that a replaced layer's own weights were moved to the host."""

    owner: torch.nn.Linear
    replacement: QuantizedLinear
    held: bool = field(default=True, init=False)

    def conflict(self) -> str:
        return ""

    def restore(self) -> None:
        self.owner.to(self.replacement.weight.device)


@dataclass
class _Reloaded:
    """The change that a replaced layer's own weights were dropped, which are in a file."""

    owner: torch.nn.Linear
    replacement: QuantizedLinear
    file: Path
    key: str
    dtype: torch.dtype
    held: bool = field(default=True, init=False)

    def conflict(self) -> str:
        return ""

    def restore(self) -> None:
        if not self.owner.weight.numel():
            self.owner.weight.data = self.read().to(self.replacement.weight.device)

    def read(self) -> torch.Tensor:
        """The weights in the file, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(self.key)
        return found.to(self.dtype)


def _reloaded(pipe: Any, name: str, layer: torch.nn.Linear, replacement: QuantizedLinear) -> _Reloaded:
    """The way to read a layer's weights again.

    Raises:
        ValueError: the files do not hold these weights, or others, as after fusing an adapter.
    """
    component, _, path = name.partition(".")
    directory = getattr(getattr(getattr(pipe, component), "config", None), "_name_or_path", None)
    key = f"{path}.weight"
    where = _keys_in(str(directory)).get(key) if directory else None
    if where is not None:
        change = _Reloaded(layer, replacement, where, key, layer.weight.dtype)
        if torch.equal(change.read(), layer.weight.detach().cpu()):
            return change
    why = "no such weights" if where is None else "other weights, as an adapter may have been fused"
    raise ValueError(f"quantize: keep='reload' cannot put back {name}: {directory or 'memory'} holds {why}")


@functools.lru_cache(maxsize=4)
def _keys_in(directory: str) -> dict[str, Path]:
    """Key → safetensors file of a model's directory."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def quantise(pipe: Any, options: Options, patch: Patch) -> tuple[Quantisation, list[torch.nn.Linear]]:
    """Replace the linear layers of the pipeline's transformer blocks by quantised ones, through `patch`.

    Returns:
        What was quantised, and the replaced layers.

    Raises:
        ValueError: no layer could be quantised (the message says why), a pattern fits no layer, or the device has no
            products in this dtype, or weights that are to be reloaded are not in the model's files, or torchao has
            quantised a layer to another dtype, or layers are quantised already.
    """
    refuse_quantised(pipe)
    found = list(_layers(pipe))
    for pattern in (*options.include, *options.exclude):
        if not any(_fits(name, pattern) for name, *_ in found):
            raise ValueError(f"quantize: no linear layer of a transformer block fits {pattern!r}")
    made, replaced, at_edges = [], [], any(options.edge_steps)
    pairs: list[edges.Replaced] = []
    for name, parent, key, layer, block in found:
        reason = _why_not(name, layer, block, options)
        if reason is not None:
            made.append(LayerQuantisation(name, reason))
            continue
        there = torchao_layers.weights_of(layer)
        if isinstance(there, torchao_layers.Weights):
            patch.set_module(parent, key, _met(name, layer, there, options, patch))
            made.append(LayerQuantisation(name))
            continue
        replacement = QuantizedLinear(layer, dtype_on(options.dtype, layer.weight.device))
        freed = -replacement.weight.nbytes - replacement.weight_scale.nbytes
        patch.set_module(parent, key, replacement)
        if at_edges:
            replacement.own = (layer,)
            pairs.append((name.partition(".")[0], parent, key, layer, replacement))
            made.append(LayerQuantisation(name, freed=freed))
            continue
        freed += layer.weight.nbytes
        if options.keep == "host" and layer.weight.device.type != "cpu":
            patch.add(_Kept(layer, replacement))
            layer.weight.data = layer.weight.data.to("cpu")
        elif options.keep == "reload":
            patch.add(_reloaded(pipe, name, layer, replacement))
        made.append(LayerQuantisation(name, freed=freed))
        replaced.append(layer)
    quantised = Quantisation(made)
    if not quantised.replaced:
        reasons = "; ".join(dict.fromkeys(quantised.left_alone.values())) or "there are no linear layers in its blocks"
        raise ValueError(f"quantize={options.dtype!r} has nothing to do on this {type(pipe).__name__}: {reasons}")
    if at_edges:
        edges.install(pipe, options.edge_steps, pairs, patch)
    return quantised, replaced


def _met(
    name: str, layer: torch.nn.Linear, there: torchao_layers.Weights, options: Options, patch: Patch
) -> QuantizedLinear:
    """A quantised layer with the weights that torchao has made; they stay in the memory where they are."""
    if there.name != options.dtype:
        raise ValueError(
            f"quantize={options.dtype!r}, but torchao has quantised {name} to {there.name}: ask for {there.name!r}, or "
            "exclude the layer"
        )
    if any(options.edge_steps):
        raise ValueError(f"quantize: edge_steps needs a layer's own weights, and torchao has quantised those of {name}")
    wanted = dtype_on(options.dtype, there.values.device)
    if there.values.dtype != wanted:
        raise ValueError(f"{name} was quantised by torchao to {there.values.dtype}; this device multiplies {wanted}")
    made = QuantizedLinear.holding(there.values, there.scale, layer.bias)
    patch.add(_Kept(layer, made))
    return made.train(layer.training)


def drop(layers: Sequence[torch.nn.Linear]) -> None:
    """Free the own weights of layers that were replaced."""
    for layer in layers:
        layer.weight.data = layer.weight.data.new_empty(0)


def refuse_quantised(pipe: Any) -> None:
    """Raise ValueError if layers of the pipeline's transformers are quantised already."""
    for name, model in components(pipe).items():
        if name.startswith("transformer") and isinstance(model, torch.nn.Module):
            for path, layer in model.named_modules():
                if isinstance(layer, QuantizedLinear):
                    raise ValueError(
                        f"{name}.{path} is quantised already, by load_quantised or through another pipeline that "
                        "shares it: leave out quantize"
                    )


def _layers(pipe: Any) -> Iterator[tuple[str, torch.nn.Module, str, Any, torch.nn.Module]]:
    """Path, parent, name in the parent, layer and block of each linear layer in a transformer's lists of blocks."""
    seen = set()
    for component, model in components(pipe).items():
        if not (component.startswith("transformer") and isinstance(model, torch.nn.Module)):
            continue
        lists = [(path, child) for path, child in model.named_modules() if isinstance(child, torch.nn.ModuleList)]
        outermost = [(path, child) for path, child in lists if not re.search(r"\.\d+\.", f".{path}.")]
        for path, block in ((f"{path}.{i}", block) for path, blocks in outermost for i, block in enumerate(blocks)):
            for name, parent, key, layer in _linears(block, f"{component}.{path}"):
                if id(layer) not in seen:
                    seen.add(id(layer))
                    yield name, parent, key, layer, block


def _linears(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Module, str, Any]]:
    """Path, parent, name in the parent and layer of each linear layer in a module. One with an adapter is a whole."""
    for key, child in module.named_children():
        name = f"{path}.{key}"
        if isinstance(child, torch.nn.Linear) or hasattr(child, "base_layer"):
            yield name, module, key, child
        else:
            yield from _linears(child, name)


def _fits(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern with wildcards, or contains it as whole names."""
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _why_not(name: str, layer: Any, block: torch.nn.Module, options: Options) -> str | None:
    """Why a layer stays as it is; None if it is quantised."""
    if hasattr(layer, "base_layer"):
        return "an adapter is on it"
    there = torchao_layers.weights_of(layer) if type(layer) is torch.nn.Linear else None
    if isinstance(there, str):
        return there
    if type(layer) is not torch.nn.Linear or (there is None and type(layer.weight.data) is not torch.Tensor):
        return "it is not a plain linear layer"
    if hooked(layer) or "_hf_hook" in vars(layer):
        return "it has a hook"
    if not layer.weight.is_floating_point() or layer.weight.is_meta:
        return "its weights are not there"
    if any(_fits(name, one) for one in options.exclude):
        return "excluded"
    if options.dtype == "mxfp8" and (layer.in_features % _MULTIPLES[0] or layer.out_features % _MULTIPLES[1]):
        return "MXFP8 takes multiples of 32 input and 16 output features"
    if any(_fits(name, one) for one in options.include):
        return None
    if min(layer.in_features, layer.out_features) < options.min_width:
        return f"narrower than {options.min_width} features (min_width)"
    if there is not None:
        return None  # torchao has decided already which layers bear it
    if any(_fits(name, one) for one in options.calibrated):
        return "left out by the model's calibration"
    inside = name.split(".", 3)[-1]
    if SENSITIVE.search(inside):
        return "modulation, norms and embeddings stay as they are"
    if any(_fits(name, one) for one in LEFT_OUT.get(type(block).__name__, ())):
        return "known to hurt the picture in this model"
    return None
