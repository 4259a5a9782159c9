"""`omni compare`: make the images of every run, write the report and its numbers, and print a table."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager

from omni_runtime.cli.inputs import bar, make_directory, make_omni, prompts_and_images, settle, with_seeds, wrong_input
from omni_runtime.cli.options import UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.compare import comparison, showing
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.progress import Progress, StepBar

#: How many of an embedded model's own prompts are compared if none are given.
OWN_PROMPTS = 6


def compare(options: argparse.Namespace) -> None:
    """Make the missing images and measure all of them."""
    if options.out.suffix.lower() in (".png", ".html", ".json") and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: several files are written: give a directory")
    settle(options)
    with wrong_input():
        runs = comparison.make_runs(options.model, options.run, options.steps, options.fewer_steps)
        for run in list(runs):
            if (run.config or {}).get("decision") == "replay":
                raise UsageError(f"--run {run.name}: each image is made by itself, so there is nothing to replay")
            try:
                make_omni(options, cache_backend=run.backend, cache_config=run.config).check_steps(run.steps)
            except ValueError as error:
                if options.run or run.backend is None:
                    raise
                runs.remove(run)  # one of the usual runs, which this model cannot have
                print(f"{run.name} is left out: {error}", file=sys.stderr)
        omni = make_omni(options, cache_backend=None)
        requests = with_seeds(options, omni, prompts_and_images(options, OWN_PROMPTS, options.prompts), options.seeds)
        make_directory(options.out)
    pipe = omni.pipe
    pipe.set_progress_bar_config(disable=True)
    omni.close()
    made = 0

    def listener(
        run: comparison.Run, request: GenerationRequest, progress: Progress
    ) -> AbstractContextManager[StepBar | None]:
        nonlocal made
        made = progress.number - 1
        return bar(options, f"{run.name}: {request.prompt}", run.steps, str(progress))

    try:
        results = comparison.compare(runs, pipe, requests, options.out, listener, options.fresh)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {made} images were made, and are kept in {options.out}; run the same command to continue"
        ) from None
    found = sum(not cell.made_now for result in results for cell in result.cells)
    if found and not options.quiet:
        print(f"{found} images already existed: --fresh makes them again", file=sys.stderr)
    document = comparison.evaluate(results, comparison.about(options.model, pipe, requests))
    files = showing.write(document, options.out)
    if options.json:
        print_json({"files": [str(path) for path in files], **document})
    else:
        print(showing.table(document))
        print(*files, sep="\n")
