"""Saves a quantised pipeline, and loads it without its full weights ever being in memory.

The directory is one of diffusers, with one difference: a quantised transformer's tensors are in
`quantised.safetensors`, 8-bit weights with their scales, and the others as they are. diffusers finds no weights of that
transformer and says so, where it would have taken 8-bit numbers for weights.

When it is loaded, the transformer is made with parameters on the meta device, which take no memory, and gets the
tensors of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from omni_kernels.ops._quantized import BLOCK32, MX, in_tiles_shape, laid_out
from omni_kernels.patching import Patch
from omni_kernels.patching.quantised import dtype_on
from omni_kernels.patching.quantized_linear import QuantizedLinear

#: The file of a quantised transformer's tensors, in the transformer's directory.
FILE = "quantised.safetensors"
#: The key of its header under which JSON says what it is, and the version of its format.
_KEY, VERSION = "omni_runtime.quantised", 1
_SCALE = ".weight_scale"
_MAPPED = 1 << 28  # bytes: a layer of the largest models
_NAMED = 3  # how many names a message gives


def save_quantised(pipe: Any, directory: str | os.PathLike[str]) -> None:
    """Save a pipeline whose transformer is quantised. `load_quantised` and `Omni(directory)` load it.

    Caches, fused blocks and edge steps are not saved: patch the loaded pipeline.

    Args:
        pipe: a pipeline patched with `quantize`, or one that `load_quantised` has loaded.
        directory: where; it must not exist, or be empty.

    Raises:
        ValueError: nothing is quantised, or the transformer has tensors that its class does not, such as an adapter's;
            nothing is written then.
        FileExistsError: the directory is not empty.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already, and is not an empty directory")
    models = {name: one for name, one in _models(pipe).items() if _quantised_in(one)}
    if not models:
        raise ValueError(
            f"no layer of this {type(pipe).__name__} is quantised: omni_kernels.patch(pipe, quantize=...) first"
        )
    tensors = {name: _tensors(name, model) for name, model in models.items()}
    dtypes = {name: _name_of(one.dtype) for name, one in _models(pipe, "").items() if hasattr(one, "dtype")}
    patch = Patch()
    for name, model in models.items():
        header = json.dumps({"version": VERSION, "dtypes": dtypes})
        patch.set_method(model, "save_pretrained", _saver(model, tensors[name], header))
    try:
        pipe.save_pretrained(target)
    finally:
        patch.release()


def load_quantised(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | Mapping[str, torch.dtype] | None = None, **arguments: Any
) -> Any:
    """Load a pipeline that `save_quantised` wrote, on the CPU. The full weights of quantised layers are never made.

    Args:
        directory: where it was written.
        dtype: of all that is not in 8 bits, or a dict of component → dtype, as `from_pretrained` takes it. By default,
            that of the pipeline that was saved.
        arguments: further arguments of `DiffusionPipeline.from_pretrained`.

    Returns:
        The pipeline. Its linear layers are quantised; `patch` it for caches and fused blocks.

    Raises:
        FileNotFoundError: there is no such directory, or no quantised transformer in it.
        ValueError: a file is damaged, or does not fit its transformer; the message names it.
    """
    found = quantised_in(directory)
    if not found:
        raise FileNotFoundError(
            f"{os.fspath(directory)} holds no quantised transformer (transformer/{FILE}): was it written by "
            "omni_runtime.save_quantised?"
        )
    if dtype is None:
        dtype = _dtypes_in(found[0])
    made = {path.parent.name: load_transformer(path, dtype) for path in found if path.parent.name not in arguments}
    # DiffusionPipeline itself takes no model for a component that the pipeline's class says is optional.
    cls = _class_in(Path(directory) / "model_index.json", "DiffusionPipeline")[0]
    return cls.from_pretrained(os.fspath(directory), dtype=dtype, **made, **arguments)


def quantised_in(directory: str | os.PathLike[str]) -> list[Path]:
    """The files of quantised transformers in a pipeline's directory."""
    return sorted(Path(directory).glob(f"transformer*/{FILE}"))


def load_transformer(
    file: Path, dtype: torch.dtype | Mapping[str, torch.dtype], device: torch.device | None = None
) -> torch.nn.Module:
    """The transformer whose tensors are in `file`, on the CPU.

    Args:
        file: `quantised.safetensors` in the transformer's directory.
        dtype: of what is not in 8 bits; or a dict of component → dtype.
        device: where it will run; None if that is not known.

    Raises:
        ValueError: the device does not multiply the 8-bit weights; or `file`, or the `config.json` beside it, is
            damaged, or they do not fit; the message names the file.
    """
    name, saved = file.parent.name, _dtypes_in(file)
    if isinstance(dtype, Mapping):
        dtype = dtype.get(name, dtype.get("default", saved.get(name, torch.float32)))
    model = _empty_model(file.parent / "config.json", dtype)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    tensors = _Tensors(file)
    names = set(tensors.names)
    for key in sorted(key for key in names if key.endswith(_SCALE)):
        path = key.removesuffix(_SCALE)
        if f"{path}.weight" in names:
            _set_child(model, path, _placed(model, path, tensors.read(f"{path}.weight"), tensors.read(key), file))
            names -= {key, f"{path}.weight"}
    state = model.state_dict()
    own = {f"{path}.{leaf}" for path in _quantised_in(model) for leaf in ("weight", "weight_scale")}
    _compare(names, state.keys() - own, file)
    for key in sorted(names):
        tensor, there = tensors.read(key), state[key]
        _check_shape(key, tensor, there, file)
        if there.is_floating_point() != tensor.is_floating_point() or tensor.element_size() == 1:
            raise ValueError(f"{file} is damaged: {key} is {_name_of(tensor.dtype)} without its scales")
        wanted = torch.float32 if kept.intersection(key.split(".")) else dtype
        _set_tensor(model, key, tensor.to(wanted) if tensor.is_floating_point() else tensor)
    if device is not None:
        _check_device(model, device, file)
    left = [key for key, one in _all_tensors(model) if one.is_meta]
    if left:
        raise ValueError(f"{file}: {type(model).__name__} makes tensors that are in no file, such as {left[0]}")
    model.register_to_config(_name_or_path=str(file.parent))  # type: ignore[operator]  # ConfigMixin
    return model.eval()


class _Tensors:
    """Copies tensors out of a file.

    In the file's own memory they are not aligned, and would change with the file. The file is mapped anew after
    `_MAPPED` bytes, so that its pages do not stay beside the copies.

    Attributes:
        names: the tensors' names.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open()
        self.names = list(self._opened.keys())

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        with _told(self._file, SafetensorError):
            self._opened: Any = safe_open(self._file, framework="pt")
        self._read = 0

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        if self._read > _MAPPED:
            self._open()
        tensor: torch.Tensor = self._opened.get_tensor(name).clone()
        self._read += tensor.nbytes
        return tensor


class _EmptyOnMeta(TorchFunctionMode):
    """While open, `torch.empty` makes tensors on the meta device, from which linear layers make their weights.

    All else is made as usual: a model may compute tables, which no file holds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _empty_model(config_file: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a config.json; its weights are on the meta device."""
    return _made(*_class_in(config_file, "ModelMixin"), dtype)


def _class_in(file: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """The diffusers class that a configuration file names, and the configuration.

    Args:
        kind: the class that it is derived from.
    """
    import diffusers

    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file}: the model is incomplete") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, getattr(diffusers, kind))):
        raise ValueError(f"{file}: diffusers {diffusers.__version__} has no {kind} {name!r}")
    return cls, config


def _made(cls: Any, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as diffusers does when it loads
    try:
        with _EmptyOnMeta():
            model: torch.nn.Module = cls.from_config(config)
    finally:
        torch.set_default_dtype(former)
    return model


def _tensors(name: str, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a quantised transformer by name.

    Raises:
        ValueError: they are not those that its class has, or they are not in memory.
    """
    import diffusers

    kind = type(model).__name__
    if getattr(diffusers, kind, None) is not type(model):
        raise ValueError(f"the {name} cannot be saved: diffusers has no {kind}")
    held = dict(model.state_dict())
    for key, one in held.items():
        if type(one) is not torch.Tensor or one.is_meta:
            what = "is not in memory" if one.is_meta else f"is a {type(one).__name__}"
            raise ValueError(f"the {name} cannot be saved: {key} {what}")
    scales = {f"{path}{_SCALE}" for path in _quantised_in(model)}
    expected = set(_made(type(model), model.config, model.dtype).state_dict())
    others = sorted((held.keys() - scales) ^ expected)
    if others:
        raise ValueError(
            f"the {name} cannot be saved: its tensors are not those of a {kind}, such as {', '.join(others[:_NAMED])}. "
            "Take adapters out first"
        )
    return {key: one.contiguous() for key, one in held.items()}


def _saver(model: Any, tensors: dict[str, torch.Tensor], header: str) -> Callable[..., None]:
    """A `save_pretrained` that writes these tensors."""

    def save_pretrained(directory: str, **_: Any) -> None:
        from safetensors.torch import save_file

        model.save_config(directory)
        save_file(tensors, Path(directory) / FILE, {_KEY: header})

    return save_pretrained


def _dtypes_in(file: Path) -> dict[str, torch.dtype]:
    """The dtypes of the saved pipeline's components, from the file's header.

    Raises:
        ValueError: it is damaged, or was written by something else.
    """
    from safetensors import SafetensorError, safe_open

    with _told(file, SafetensorError), safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(_KEY)
    if text is None:
        raise ValueError(f"{file} was not written by omni_runtime.save_quantised: its header has no {_KEY!r}")
    try:
        header = json.loads(text)
        version, dtypes = header["version"], dict(header["dtypes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: its header's {_KEY!r} is {text[:100]!r}") from error
    if version != VERSION:
        raise ValueError(f"{file} has version {version!r} of its format, and this one reads {VERSION}: save it again")
    return {name: _dtype_of(one, file) for name, one in dtypes.items()}


@contextlib.contextmanager
def _told(file: Path, error: type[Exception]) -> Iterator[None]:
    """Context manager: errors of the safetensors library name the file."""
    try:
        yield
    except error as why:
        raise ValueError(f"{file} is damaged: {why}") from None


def _placed(model: Any, path: str, weight: torch.Tensor, scale: torch.Tensor, file: Path) -> QuantizedLinear:
    """The quantised layer in the place of the model's linear layer at `path`."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if type(layer) is not torch.nn.Linear:
        raise ValueError(f"{file} does not fit its config.json: the model has no linear layer {path}")
    _check_shape(f"{path}.weight", weight, layer.weight, file)
    if scale.dtype == MX:
        shapes = in_tiles_shape(weight.shape), (weight.shape[0], weight.shape[1] // BLOCK32)
        if weight.dtype != torch.float8_e4m3fn or scale.shape not in shapes:
            raise ValueError(f"{file} is damaged: {path} has no weights in MXFP8")
        scale = laid_out(scale, weight.shape)
    else:
        _check_shape(f"{path}{_SCALE}", scale, layer.weight[:, 0], file)
        if weight.element_size() != 1 or scale.dtype != torch.float32:
            raise ValueError(f"{file} is damaged: {path} has no 8-bit weights with scales in float32")
    if not scale.float().isfinite().all():
        raise ValueError(f"{file} is damaged: {path} has scales that are not finite")
    return QuantizedLinear.holding(weight, scale, layer.bias)


def _compare(found: set[str], wanted: set[str], file: Path) -> None:
    for names, what in ((wanted - found, "lacks"), (found - wanted, "holds unknown")):
        if names:
            raise ValueError(f"{file} {what} tensors, such as {', '.join(sorted(names)[:_NAMED])}")


def _check_shape(key: str, found: torch.Tensor, wanted: torch.Tensor, file: Path) -> None:
    if found.shape != wanted.shape:
        raise ValueError(f"{file} does not fit its config.json: {key} is {list(found.shape)}, not {list(wanted.shape)}")


def _all_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters, buffers, and tensors that are plain attributes."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        yield from ((f"{path}.{key}", one) for key, one in vars(module).items() if isinstance(one, torch.Tensor))


def _check_device(model: torch.nn.Module, device: torch.device, file: Path) -> None:
    layers: list[Any] = [model.get_submodule(path) for path in _quantised_in(model)]
    for held in {layer.form for layer in layers}:
        if held != dtype_on({torch.int8: "int8", MX: "mxfp8"}.get(held, "fp8"), device):
            raise ValueError(f"{file} holds {_name_of(held)}, which {device} does not multiply: quantise it there")


def _set_child(model: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, key = path.rpartition(".")
    model.get_submodule(parent)._modules[key] = layer


def _set_tensor(model: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    parent, _, key = path.rpartition(".")
    module = model.get_submodule(parent)
    if key in module._parameters:
        module._parameters[key] = torch.nn.Parameter(tensor, tensor.is_floating_point())
    else:
        module._buffers[key] = tensor


def _models(pipe: Any, prefix: str = "transformer") -> dict[str, Any]:
    """The pipeline's models whose names begin with `prefix`."""
    parts = getattr(pipe, "components", None) or vars(pipe)
    return {name: one for name, one in parts.items() if name.startswith(prefix) and isinstance(one, torch.nn.Module)}


def _quantised_in(model: torch.nn.Module) -> list[str]:
    return [path for path, one in model.named_modules() if isinstance(one, QuantizedLinear)]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(name: Any, file: Path) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{file} is damaged: there is no dtype {name!r}")
    return found
