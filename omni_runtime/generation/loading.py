"""From a model's name to a loaded pipeline. The small files are read and checked before the weights.

A name is an embedded model's name, a directory that `save_pretrained` wrote, or a hub id. `find` reads small JSON files
only, such as `model_index.json` and the transformer's `config.json`. `load` reads the weights and checks that they are
complete and finite (`omni_runtime.generation.weights`).
"""

from __future__ import annotations

import inspect
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from omni_kernels.device import load as load_kind
from omni_kernels.patching.backends import nearest
from omni_runtime import files
from omni_runtime.generation import quantised_files, weights
from omni_runtime.generation.checks import suggestion, whole_number

#: A modular pipeline's index, and what to do with one.
MODULAR_INDEX = "modular_model_index.json"
MODULAR = "load it with diffusers and give it a cache with omni_kernels.patch; `omni inspect` tries all caches on it"
EMBEDDED = Path(__file__).parent.parent / "embedded"

#: Arguments of `DiffusionPipeline.from_pretrained` besides the pipeline's components. `dtype` is an argument of `Omni`.
FROM_PRETRAINED = frozenset(
    [
        "cache_dir",
        "force_download",
        "proxies",
        "local_files_only",
        "token",
        "revision",
        "custom_pipeline",
        "custom_revision",
        "provider",
        "sess_options",
        "provider_options",
        "device_map",
        "max_memory",
        "offload_folder",
        "offload_state_dict",
        "low_cpu_mem_usage",
        "variant",
        "use_safetensors",
        "use_onnx",
        "load_connected_pipeline",
        "quantization_config",
        "use_flashpack",
        "disable_mmap",
        "trust_remote_code",
    ]
)
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Source:
    """A pipeline that is not loaded yet.

    Attributes:
        name: the model as the user named it.
        location: the directory or hub id that `from_pretrained` takes.
        kind: how `location` was found: "embedded", "directory" or "hub".
        pipeline_class: the diffusers class; None if the model brings its own code.
        transformer_config: the transformer's config.json; None if the pipeline has no transformer.
        defaults: default arguments of `generate`.
        reference_pixels: the area in pixels that reference images are scaled to; None for the class's own area.
    """

    name: str
    location: str
    kind: Literal["embedded", "directory", "hub"]
    pipeline_class: type | None
    transformer_config: Mapping[str, Any] | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reference_pixels: int | None = None


def embedded_models() -> dict[str, Path]:
    """Return the models that come with the package: name → directory."""
    return {path.parent.name: path.parent for path in sorted(EMBEDDED.glob("*/model_index.json"))}


def embedded_pipeline(name: str = "emoji-qwen-image") -> Any:
    """Load a small model that comes with the package, as a plain diffusers pipeline on the CPU, in float32.

    These models make pictures of 64 × 64 pixels. Qwen-Image's pipeline does so by default; give the others
    `height=64, width=64`. The edit pipeline enlarges its reference images; `Omni` keeps them small.
    Call `torch.set_num_threads(1)` for them: with more threads they are many times slower.

    Args:
        name: one of `embedded_models()`.

    Raises:
        ValueError: there is no such model.
    """
    from diffusers import DiffusionPipeline

    models = embedded_models()
    if name not in models:
        raise ValueError(f"there is no embedded model {name!r}; there are {', '.join(models)}")
    pipe = DiffusionPipeline.from_pretrained(models[name], dtype=torch.float32)
    if hasattr(pipe, "default_sample_size"):
        height = json.loads((models[name] / "defaults.json").read_text(encoding="utf-8")).get("height", 64)
        pipe.default_sample_size = height // pipe.vae_scale_factor
    return pipe


def find(name: str, arguments: Mapping[str, Any] | None = None) -> Source:
    """Find a pipeline by name and read its index, without its weights.

    Args:
        name: an embedded model's name, a directory, or a hub id.
        arguments: arguments for `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such directory, embedded model or hub model, the hub cannot be reached, or the
            transformer's config.json is missing.
        ValueError: the model is not a diffusers pipeline, or one of its files is damaged; the message names the file.
        TypeError: `from_pretrained` takes no such argument.
    """
    arguments = arguments or {}
    kind, location = _locate(name)
    read = _files_of(kind, location, arguments)
    index = read("model_index.json")
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{name} is not a diffusers pipeline: {_why_no_pipeline(name, kind, location)}")
    _check_index(index, f"{location}/model_index.json")
    pipeline_class = None if "custom_pipeline" in arguments else _pipeline_class(name, index["_class_name"])
    if pipeline_class is not None:
        _check_arguments(pipeline_class, arguments)
        _check_components(index, pipeline_class, f"{location}/model_index.json")
    return Source(
        name=name,
        location=location,
        kind=kind,
        pipeline_class=pipeline_class,
        transformer_config=_transformer_config(index, arguments, read, location),
        defaults=_optional_object(location, "defaults.json") if kind == "embedded" else {},
        reference_pixels=None if kind == "hub" else _reference_pixels(location, index["_class_name"]),
    )


def load(source: Source, dtype: Any, device: torch.device, arguments: Mapping[str, Any]) -> Any:
    """Load the pipeline with its weights in `dtype` and move it to `device`, unless a `device_map` is given.

    Quantised transformers in the directory (`omni_runtime.save_quantised`) are loaded as they are.

    Raises:
        ValueError: weights are missing from the model's files, or are not finite; the message names the files.
        OSError: `from_pretrained` cannot read the model. Its other errors are passed on, too.
    """
    import diffusers

    given: set[str] = set(arguments)
    cls: Any = diffusers.DiffusionPipeline
    if source.kind != "hub":
        files_of = {file.parent.name: file for file in quantised_files.quantised_in(source.location)}
        wanted = files_of.keys() - given
        quantised = {name: quantised_files.load_transformer(files_of[name], dtype, device) for name in sorted(wanted)}
        if quantised:  # DiffusionPipeline itself takes no model for a component that the class says is optional
            arguments, cls = {**arguments, **quantised}, source.pipeline_class or cls
    if source.reference_pixels is not None and source.pipeline_class is not None:
        from omni_runtime.generation import small_references

        pipe = small_references.load(source.location, source.reference_pixels, {"dtype": dtype, **arguments})
    else:
        pipe = cls.from_pretrained(source.location, dtype=dtype, **arguments)
    loaded = {name: one for name, one in pipe.components.items() if name not in given}
    weights.check_present(loaded, arguments.get("variant"))
    pipe = pipe if arguments.get("device_map") else pipe.to(device)
    weights.check_finite(loaded)
    return pipe


def outline(source: Source, arguments: Mapping[str, Any] | None = None) -> Any:
    """The pipeline without its models, which shows what sizes it takes; None if it cannot be made.

    Only the VAE has a class, on the meta device, because pipelines take their scale factor from it.
    """
    import diffusers

    if source.pipeline_class is None:
        return None
    parameters = inspect.signature(source.pipeline_class.__init__).parameters.values()  # type: ignore[misc]
    parts = {one.name: None for one in parameters if one.default is one.empty and one.name != "self"}
    read = _reader(source, arguments)
    try:
        config = read("vae/config.json")
        with torch.device("meta"):
            vae = None if config is None else getattr(diffusers, config["_class_name"]).from_config(config)
        return source.pipeline_class(**parts | ({} if vae is None else {"vae": vae}))
    except Exception:  # any class may need more than its VAE
        return None


def scheduler_of(source: Source, arguments: Mapping[str, Any] | None = None) -> Any:
    """The model's scheduler, made from its configuration alone; None if it cannot be made."""
    import diffusers

    read = _reader(source, arguments)
    try:
        config = read("scheduler/scheduler_config.json")
        return None if config is None else getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception:  # as `outline`
        return None


def _reader(source: Source, arguments: Mapping[str, Any] | None) -> _HubFiles | _DirectoryFiles:
    return (
        _HubFiles(source.location, arguments or {}) if source.kind == "hub" else _DirectoryFiles(Path(source.location))
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device to run on. "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: the device is unknown, or not available on this machine.
        TypeError: `device` is neither text nor a torch.device.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a string or a torch.device, not {type(device).__name__}")
    kind = str(device).partition(":")[0]
    try:
        load_kind(kind)
        wanted = None if device == "auto" else torch.device(device)
    except (RuntimeError, ImportError) as error:
        absent = kind == "npu" and isinstance(error, RuntimeError) and not hasattr(torch, "npu")
        why = "torch-npu is not installed" if absent else str(error).splitlines()[0]
        raise ValueError(f"unknown device {device!r}: {why}") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if wanted is None:
        return accelerator or torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator and accelerator.type == wanted.type else 0
    if wanted.type not in ("cpu", "meta") and (wanted.index or 0) >= count:
        here = ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()) if accelerator)]
        raise ValueError(f"device {str(wanted)!r} is not available here; available: {', '.join(here)}")
    return wanted


def resolve_dtype(dtype: Any, device: torch.device) -> Any:
    """Return a torch.dtype. "auto" is float32 on the CPU, bfloat16 elsewhere. A dict per component stays as it is.

    Raises:
        ValueError: there is no dtype of that name.
        TypeError: `dtype` is neither a torch.dtype, nor text, nor a dict.
    """
    if isinstance(dtype, torch.dtype | Mapping):
        return dtype
    if not isinstance(dtype, str):
        raise TypeError(f"dtype must be a torch.dtype or its name, not {type(dtype).__name__}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = DTYPES.get(dtype.removeprefix("torch."))
    if known is None:
        raise ValueError(f"unknown dtype {dtype!r}: {nearest(dtype, [*DTYPES, 'auto'])}")
    return known


class _DirectoryFiles:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, name: str) -> Any:
        """Read the JSON file `name`; None if it does not exist."""
        path = self.directory / name
        return files.read_json(path) if path.exists() else None


class _HubFiles:
    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        self.model = model
        self.arguments = {key: arguments[key] for key in _OF_THE_HUB if arguments.get(key) is not None}

    def __call__(self, name: str) -> Any:
        """Read the JSON file `name` of the hub model, downloaded or from the hub's cache; None if it has none."""
        from huggingface_hub import errors, hf_hub_download

        embedded = ", ".join(embedded_models()) or "there are none"
        neither = f"{self.model!r} is not a directory, not an embedded model ({embedded}), and "
        try:
            return files.read_json(hf_hub_download(self.model, name, **self.arguments))
        except errors.GatedRepoError:
            raise FileNotFoundError(f"{neither}the hub's model is gated: log in with `hf auth login`") from None
        except errors.RepositoryNotFoundError:
            raise FileNotFoundError(f"{neither}the hub has no such model, or it is private") from None
        except errors.LocalEntryNotFoundError as error:
            raise FileNotFoundError(f"{neither}the hub could not be reached: {_first_line(error)}") from None
        except errors.EntryNotFoundError:
            return None
        except OSError as error:
            raise FileNotFoundError(f"{neither}the hub could not be reached: {_first_line(error)}") from None


def _files_of(kind: str, location: str, arguments: Mapping[str, Any]) -> _DirectoryFiles | _HubFiles:
    return _HubFiles(location, arguments) if kind == "hub" else _DirectoryFiles(Path(location))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _locate(name: str) -> tuple[Literal["embedded", "directory", "hub"], str]:
    embedded = embedded_models()
    if name in embedded:
        return "embedded", str(embedded[name])
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # name too long, ~ of an unknown user, null character
        raise FileNotFoundError(f"no model {name[:80]!r}: {error}") from None
    if path.is_dir():
        return "directory", str(path)
    if there:
        raise ValueError(f"{name} is a file; a model is a directory with a model_index.json")
    if _HUB_ID.fullmatch(name):
        return "hub", name
    known = ", ".join(embedded) or "there are none"
    raise FileNotFoundError(
        f"no model {name!r}: no such directory, and no embedded model of that name ({known})"
        f"{suggestion(name, embedded)}"
    )


def is_modular(name: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """Whether a model is a modular pipeline alone; raises FileNotFoundError and ValueError as `find` does."""
    kind, location = _locate(name)
    if kind == "embedded":
        return False
    read = _files_of(kind, location, arguments or {})
    return read("model_index.json") is None and read(MODULAR_INDEX) is not None


def _why_no_pipeline(name: str, kind: str, location: str) -> str:
    if kind != "hub" and (Path(location) / MODULAR_INDEX).is_file():
        return f"it is a modular pipeline: {MODULAR}"
    if kind != "hub" and (Path(location) / "config.json").is_file():
        return "it holds a single model (config.json), and no model_index.json"
    if kind != "hub" and (Path(location) / "model_index.json").is_file():
        return "its model_index.json names no pipeline class"
    return "it has no model_index.json"


def _check_index(index: Mapping[str, Any], file: str) -> None:
    """Check the class that `model_index.json` names: text, or [module, class] if the model brings its own code."""
    named = index["_class_name"]
    own_code = isinstance(named, list) and len(named) == 2 and all(isinstance(one, str) for one in named)
    if not (isinstance(named, str) or own_code):
        raise ValueError(
            f"{file} is damaged: _class_name must be the name of a pipeline class, not {reprlib.repr(named)}"
        )
    _check_component(index, "transformer", file)


def _check_components(index: Mapping[str, Any], pipeline_class: type, file: str) -> None:
    """Check that every required component of the class is given as [library, class]."""
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()  # type: ignore[misc]
    for parameter in parameters:
        if parameter.default is parameter.empty:
            _check_component(index, parameter.name, file)


def _check_component(index: Mapping[str, Any], name: str, file: str) -> None:
    entry = index.get(name)
    pair = isinstance(entry, list) and len(entry) == 2 and all(one is None or isinstance(one, str) for one in entry)
    if not (entry is None or pair):
        raise ValueError(f"{file} is damaged: {name} must be [library, class], not {reprlib.repr(entry)}")


def _pipeline_class(name: str, class_name: Any) -> type | None:
    import diffusers

    if not isinstance(class_name, str):
        return None  # [module, class]: the model brings its own code
    found = getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{name} is not a pipeline that diffusers {diffusers.__version__} knows: "
            f"its model_index.json says {class_name!r}"
        )
    return found


def _check_arguments(pipeline_class: type, arguments: Mapping[str, Any]) -> None:
    known = FROM_PRETRAINED | set(inspect.signature(pipeline_class.__init__).parameters) - {"self"}  # type: ignore[misc]
    for key in arguments:
        if key not in known:
            raise TypeError(f"neither Omni nor from_pretrained takes {key!r}{suggestion(key, [*known, *_OF_OMNI])}")


_OF_OMNI = ("model", "dtype", "device", "cache_backend", "cache_config")


def _transformer_config(
    index: Mapping[str, Any], arguments: Mapping[str, Any], read: _DirectoryFiles | _HubFiles, location: str
) -> Mapping[str, Any] | None:
    given = arguments.get("transformer")
    if given is not None:
        return {"_class_name": type(given).__name__, **given.config}
    if not (index.get("transformer") or [None])[0]:
        return None
    config, file = read("transformer/config.json"), f"{location}/transformer/config.json"
    if config is None:
        raise FileNotFoundError(
            f"there is no {file}, and model_index.json names a transformer: the model is incomplete"
        )
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{file} is damaged: it must be a JSON object whose _class_name is the transformer's class")
    return config


def _optional_object(location: str, name: str) -> Mapping[str, Any]:
    path = Path(location) / name
    return files.read_object(path) if path.exists() else {}


def _reference_pixels(location: str, class_name: Any) -> int | None:
    """Return `reference_pixels` from `pipeline.json`, a file that only models made for this package have."""
    area = _optional_object(location, "pipeline.json").get("reference_pixels")
    if area is None:
        return None
    if class_name != "QwenImageEditPipeline":
        raise ValueError(
            f"{location}/pipeline.json: only QwenImageEditPipeline takes reference_pixels, not {class_name}"
        )
    try:
        return whole_number("reference_pixels", area, least=32 * 32)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{location}/pipeline.json: {error}") from None
