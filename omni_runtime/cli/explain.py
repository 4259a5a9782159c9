"""`omni explain`: what each preset would do for a model, and what that rests on."""

from __future__ import annotations

import argparse
import json
from typing import Any

from omni_runtime.cache import presets, schedules
from omni_runtime.cache.methods import AUTO
from omni_runtime.cache.schedulers import check_scheduler, why_twice
from omni_runtime.cli.inputs import make_omni, request_arguments, settle, wish_of, wrong_input
from omni_runtime.cli.listings import print_wrapped
from omni_runtime.cli.options import UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.generation.request import step_count


def explain(options: argparse.Namespace) -> None:
    """Print the presets' answers for the model, or the answer to what is asked for."""
    settle(options)
    wish = wish_of(options)
    with wrong_input():
        omni = make_omni(options, cache_backend=AUTO.name, cache_config=wish or None)
        arguments = {**omni.defaults, **{k: v for k, v in request_arguments(options).items() if v is not None}}
        steps = step_count(omni.pipeline_class, arguments)
        if steps is None:
            raise UsageError("the model itself does not say how many steps it takes: give --steps")
        asked = [wish] if wish else [{"quality": name} for name in presets.PRESETS]
        calibrated = schedules.calibrated(omni.cache_config["calibration"])
        answers = [presets.answer(presets.Asked(**one), steps, calibrated) for one in asked]
        refusal = _refusal(omni.pipeline_class, omni.scheduler())
    about: dict[str, Any] = {
        "model": str(omni.name),
        "pipeline": omni.pipeline_class.__name__,
        "steps": steps,
        "refused": refusal,
        "answers": [
            {
                "asked": one,
                "computed": list(found.schedule.computed),
                "speedup": round(found.speedup, 2),
                "speed_basis": found.speed_basis,
                "psnr": found.psnr,
                "psnr_p5": found.low,
                "basis": found.basis,
                "note": found.note,
            }
            for one, found in zip(asked, answers, strict=True)
        ],
    }
    if options.json:
        print_json(about)
        return
    print(f"{about['model']}: {about['pipeline']}, {steps} steps\n")
    names = [str(presets.Asked(**one)) for one in asked]
    width = max(map(len, names))
    print(f"{'':<{width}}  steps computed  speed  {'PSNR to the full run':<20}  1 picture of 20 below")
    for name, one in zip(names, answers, strict=True):
        count = f"{len(one.schedule.computed)} of {steps}"
        print(f"{name:<{width}}  {count:<14}  {one.speedup:<4.1f}×  {one.decibels:<20}  {one.lowest}".rstrip())
    print()
    for label, words in (
        ("Speed", dict.fromkeys(one.speed_basis for one in answers if len(one.schedule.computed) < steps)),
        ("PSNR", dict.fromkeys(one.basis for one in answers if one.basis)),
        ("Schedules", dict.fromkeys(one.schedule.origin for one in answers if len(one.schedule.computed) < steps)),
        ("Note", dict.fromkeys(one.note for one in answers if (one.note and one.note != answers[0].note) or wish)),
    ):
        for text in words:
            if text:
                print_wrapped(text, f"{label}: ", "  ")
    if refusal is not None:
        print_wrapped(refusal, "This pipeline: ", "  ")
    config = json.dumps(wish or {"quality": presets.DEFAULT})
    print(f'\nIn Python: omni_kernels.patch(pipe, "{AUTO.name}", {config})')


def _refusal(pipeline_class: type, scheduler: Any) -> str | None:
    """Why whole steps cannot be skipped, and what is done instead; None if they can, or if it is not known."""
    why = why_twice(pipeline_class)
    try:
        if scheduler is not None:
            check_scheduler(scheduler)
    except ValueError as error:
        why = str(error)
    return why and f"{why}. So blocks are skipped instead, by cache_dit; the figures above do not hold for it"
