"""Runs the same cases on two source trees and reports differences: in a step, a distance or a bit of a picture.

    python tests/compare_trees.py BEFORE [AFTER]              runs both trees; AFTER is by default the current directory
    python tests/compare_trees.py BEFORE --save before.json   runs one tree, and saves its results
    python tests/compare_trees.py --against before.json [AFTER]
    --quick       an eighth of the cases, at least one of each kind
    --only TEXT   only the cases with TEXT in their names
    --list        prints the names of the cases, and runs nothing

BEFORE and AFTER are directories with omni_kernels and omni_runtime in them, for example a `git worktree`. Each tree
runs in its own process, on one thread, and only through public names: `omni_kernels.patch`, `Omni`, and the report of a
request. Both trees use the cases (compare_cases.py) and the tiny models (tiny.py) next to this file, and each its own
embedded models.

For every request, these must be equal: the computed steps of each branch, every distance and accumulated distance, the
number of blocks run and their total, the drift, the number of steps, and all bits of the latents or of the picture.
Exit code: 0 if all is equal, 1 if something differs or a case raises an error, 2 for wrong usage. Needs Python 3.11.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from compare_cases import Case, Config, cases

GROUP = "omni_kernels.cache_backends"
#: The results of one tree: case → {"requests": [...]} or {"error": "..."}.
Results = dict[str, dict[str, Any]]


# One tree, in its own process


def run_here(tree: Path, wanted: list[str], target: Path) -> None:
    """Run the cases with these names on `tree`, whose packages are imported, and write the results."""
    _only_own_entry_points(tree)
    import torch

    torch.set_num_threads(1)
    _check_imports(tree)
    names, results = set(wanted), {}
    pipes: dict[tuple[str, str], Any] = {}
    for case in cases():
        if case.name not in names:
            continue
        try:
            requests = _embedded_case(tree, case) if case.model.startswith("emoji-") else _tiny_case(case, pipes)
            results[case.name] = {"requests": requests}
        except Exception as error:  # the error is the case's result, and fails the comparison
            results[case.name] = {"error": f"{type(error).__name__}: {error}".strip()[:500]}
    target.write_text(json.dumps(results))


def _only_own_entry_points(tree: Path) -> None:
    """Look up backends in the tree's own pyproject.toml instead of the installed distribution."""
    import tomllib

    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [
        metadata.EntryPoint(name, value, GROUP)
        for name, value in project.get("entry-points", {}).get(GROUP, {}).items()
    ]
    installed = metadata.entry_points

    def entry_points(**selection: Any) -> Any:
        return metadata.EntryPoints(own) if selection.get("group") == GROUP else installed(**selection)

    metadata.entry_points = entry_points


def _check_imports(tree: Path) -> None:
    import omni_kernels
    import omni_runtime

    for package in (omni_kernels, omni_runtime):
        home = Path(str(package.__file__)).resolve()
        if tree.resolve() not in home.parents:
            raise RuntimeError(f"{package.__name__} comes from {home}, not from {tree}")


def _tiny_models() -> dict[str, Callable[[], Any]]:
    import diffusers
    import tiny

    def img2img(kind: str, source: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: getattr(diffusers, kind)(**source().components)

    return {
        **tiny.PIPELINES,
        "qwen_image_img2img": img2img("QwenImageImg2ImgPipeline", tiny.qwen_image),
        "z_image_img2img": img2img("ZImageImg2ImgPipeline", tiny.z_image),
        "flux_img2img": img2img("FluxImg2ImgPipeline", tiny.flux),
        "wan": tiny.wan,
        "wan_two": lambda: tiny.wan(two_stages=True),
        "chroma": tiny.chroma,
    }


def _tiny_case(case: Case, pipes: dict[tuple[str, str], Any]) -> list[dict[str, Any]]:
    import torch

    import omni_kernels

    key = case.model, case.dtype
    if key not in pipes:
        pipes.clear()
        pipes[key] = _tiny_models()[case.model]().to(getattr(torch, case.dtype))
    pipe = pipes[key]
    handle = None
    if case.backend is not None or case.fuse:
        handle = omni_kernels.patch(pipe, case.backend, dict(case.config) or None, fuse=case.fuse)
    try:
        made = []
        for request in case.requests:
            latents = _latents(pipe, request)
            made.append({"latents": _digest(latents), **_report(None if handle is None else handle.report)})
        return made
    finally:
        omni_kernels.unpatch(pipe)


def _latents(pipe: Any, request: Config) -> Any:
    import tiny
    import torch

    kind, arguments = type(pipe).__name__, dict(request)
    defaults = {"FluxImg2ImgPipeline": {"max_sequence_length": 64}, "ZImageImg2ImgPipeline": {"guidance_scale": 5.0}}
    own = defaults.get(kind, {"negative_prompt": " ", "true_cfg_scale": 4.0})
    if "Img2Img" in kind:
        size = arguments.get("width", 64), arguments.get("height", 64)
        own = {**own, "image": tiny.reference_image(64).resize(size)}
    else:
        own = tiny.default_arguments(pipe)
    images = arguments.pop("images", None)
    if images is not None and kind == "QwenImageEditPipeline":
        # This pipeline needs as many of each as there are prompts.
        references = [tiny.reference_image(seed=index) for index in range(images)]
        own = {**own, "image": references, "negative_prompt": [" "] * images}
    call = {
        "prompt": "a cat",
        "height": 64,
        "width": 64,
        **own,
        "generator": torch.Generator().manual_seed(arguments.pop("seed", 0)),
        **arguments,
        "output_type": "latent",
        "return_dict": False,
    }
    pipe.set_progress_bar_config(disable=True)
    with tiny.small_references(), torch.no_grad():
        (latents,) = pipe(**call)
    return latents


def _embedded_case(tree: Path, case: Case) -> list[dict[str, Any]]:
    import tiny

    from omni_runtime import Omni

    made = []
    with tiny.processor_without_video(), Omni(case.model, cache_backend=case.backend, cache_config=case.config) as omni:
        for request in case.requests:
            call = dict(request)
            if "image" in call:
                call["image"] = Path(str(omni.location)) / call["image"]
            (result,) = omni.generate(**call)
            made.append({"picture": _digest(result.images[0]), **_report(result.cache)})
    return made


def _digest(made: Any) -> str:
    """Kind, shape and SHA-256 of a tensor's bits or a picture's bytes."""
    import torch

    if isinstance(made, torch.Tensor):
        data = made.detach().contiguous().view(torch.uint8).numpy().tobytes()
        kind = f"{made.dtype} {tuple(made.shape)}"
    else:
        data, kind = made.tobytes(), f"{made.mode} {made.size}"
    return f"{kind} {hashlib.sha256(data).hexdigest()}"


def _report(report: Any) -> dict[str, Any]:
    """The parts of a report that must not change; floats as text, so that every bit and NaN is compared."""
    if report is None:
        return {}
    return {
        "steps": report.steps,
        "blocks": [report.blocks_run, report.blocks_total],
        "drift": repr(report.drift),
        "branches": {
            name: {
                "computed": branch.computed,
                "skipped": branch.skipped,
                "distances": [[repr(one.distance), repr(one.accumulated)] for one in branch.decisions],
            }
            for name, branch in report.branches.items()
        },
    }


# Two trees


def run_tree(tree: Path, wanted: list[str]) -> Results:
    """Run the cases with these names on a source tree, in a new process, and return the results."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "results.json"
        names = Path(scratch) / "names.json"
        names.write_text(json.dumps(wanted))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMNI_")}
        environment |= {
            "PYTHONPATH": str(tree),
            "XDG_DATA_HOME": str(Path(scratch) / "data"),  # hides the user's calibrations
            "HF_HUB_OFFLINE": "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", str(tree), str(names)]
        start = time.monotonic()
        done = subprocess.run([*command, str(target)], env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stderr[-3000:]}\n{tree}: the run ended with exit code {done.returncode}")
        results: Results = json.loads(target.read_text())
    requests = [one for result in results.values() for one in result.get("requests", [])]
    skipped = [len(branch["skipped"]) for one in requests for branch in one.get("branches", {}).values()]
    print(
        f"{tree}: {len(results)} cases, {len(requests)} requests, {sum(skipped)} forwards skipped in "
        f"{sum(map(bool, skipped))} of {len(skipped)} branches, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return results


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each difference of two results."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from differences(before.get(name), after.get(name), f"{place} {name}" if place else str(name))
    elif place.endswith("requests") and isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{len(before)} → {len(after)} requests"
        for index, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, f"request {index}")
    elif place.endswith("distances") and isinstance(before, list) and isinstance(after, list):
        pairs = enumerate(zip(before, after, strict=False))
        unlike = [f"call {index}: {one} → {other}" for index, (one, other) in pairs if one != other]
        if len(before) != len(after):
            unlike.append(f"{len(before)} → {len(after)} calls")
        if unlike:
            yield f"{place}, {len(unlike)} differ; {unlike[0]}"
    elif before != after:
        yield f"{place}: {before} → {after}"


def tell(before: Results, after: Results) -> int:
    """Print the differences by case, and their number; return the exit code."""
    unlike = 0
    for name in before:
        lines = [f"{key} raises {result[name]['error']}" for key, result in (("before", before), ("after", after))
                 if "error" in result[name]] or list(differences(before[name], after[name]))  # fmt: skip
        if lines:
            unlike += 1
            print("\n    ".join([name, *lines]))
    print(f"{len(before)} cases compared, {unlike} differ")
    return int(unlike > 0)


def _kept(file: Path, wanted: list[str]) -> Results:
    """Read the results from a file that `--save` wrote."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["versions"] != _versions():
        print(f"{file} was made with {kept['versions']}, but this is {_versions()}: expect differences")
    missing = [name for name in wanted if name not in kept["results"]]
    if missing:
        print(f"{file} lacks {len(missing)} cases, which are left out: {', '.join(missing[:5])}, ...")
    return {name: kept["results"][name] for name in wanted if name not in missing}


def _versions() -> dict[str, str]:
    """The versions and files that all results depend on, besides the tree."""
    packages = ("torch", "diffusers", "transformers", "cache-dit")
    files = {
        name: hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()[:8]
        for name in ("compare_cases.py", "tiny.py")
    }
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages} | files


def main(arguments: list[str] | None = None) -> int:
    """Run the trees, compare them, and print the differences."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument(
        "trees", nargs="*", type=Path, help="BEFORE and AFTER; only one of them with --against or --save"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the cases")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the cases with TEXT in their names")
    parser.add_argument("--save", metavar="FILE", type=Path, help="run one tree and save its results")
    parser.add_argument("--against", metavar="FILE", type=Path, help="compare with the results in a file of --save")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    asked = parser.parse_args(arguments)
    wanted = [case.name for case in cases() if asked.only in case.name and (case.quick or not asked.quick)]
    if len(set(wanted)) < len(wanted):
        raise ValueError("two cases have the same name")
    if asked.list:
        print("\n".join(wanted))
        return 0
    if not wanted:
        parser.error(f"no case has {asked.only!r} in its name")
    most = 1 if asked.save or asked.against else 2
    if len(asked.trees) > most or (asked.save and asked.against) or not (asked.trees or asked.against):
        parser.error("give BEFORE [AFTER], or BEFORE --save FILE, or --against FILE [AFTER]")
    trees = [tree.resolve() for tree in asked.trees]
    if asked.save:
        results = run_tree(trees[0], wanted)
        asked.save.write_text(json.dumps({"versions": _versions(), "results": results}), encoding="utf-8")
        failed = [f"{name}: {result['error']}" for name, result in results.items() if "error" in result]
        print("\n".join(failed) or f"saved in {asked.save}")
        return int(bool(failed))
    before = _kept(asked.against, wanted) if asked.against else run_tree(trees.pop(0), wanted)
    return tell(before, run_tree(trees[0] if trees else Path.cwd(), list(before)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_here(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4]))
    else:
        sys.exit(main())
