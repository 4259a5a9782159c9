"""Runs each test in this directory in a forked process, in which the simulated NPU is installed.

The simulated NPU cannot be removed again, and would be the accelerator of all later tests. Fixtures run before the
fork.
"""

import os
import sys
import traceback

import pytest
import simulated_npu
import torch
import torch.distributed.tensor  # at the first move of a tensor, torch would import this again in every process

PASSED, FAILED, SKIPPED = range(3)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and torch knows one kind of accelerator at a time")
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_run(pyfuncitem, arguments, writing))
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as told:
        text = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == SKIPPED:
        pytest.skip(text)
    if code != PASSED:
        pytest.fail(text or f"the process ended with {code}", pytrace=False)
    return True


def _run(item: pytest.Function, arguments: dict[str, object], writing: int) -> int:
    code, text = PASSED, ""
    try:
        simulated_npu.install()
        item.obj(**arguments)
    except pytest.skip.Exception as skipped:
        code, text = SKIPPED, str(skipped)
    except BaseException:
        code, text = FAILED, traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(writing, "w", encoding="utf-8") as tell:
        tell.write(text)
    return code
