"""Runs functions of test modules in new processes, or on two ranks that share a sequence, with gloo on the CPU.

diffusers needs two functions that gloo, or attention on the CPU, lacks. They are replaced here: gathering tensors of
unequal lengths (`ulysses_anything`), and the log-sum-exp of attention (ring). Tensor parallelism is allowed on the CPU.
"""

import datetime
import json
import logging
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import diffusers
import pytest
import torch

RANKS = 2
NEEDED = [
    pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="diffusers has no context parallelism"),
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.skipif(sys.platform == "win32", reason="file:// rendezvous"),
]
ULYSSES = {"ulysses_degree": RANKS}
UNEVEN = {"ulysses_degree": RANKS, "ulysses_anything": True}
RING = {"ring_degree": RANKS}
TENSOR = {"tp_degree": RANKS}


def enable(transformer, config=ULYSSES):
    made = diffusers.TensorParallelConfig if config is TENSOR else diffusers.ContextParallelConfig
    transformer.enable_parallelism(config=made(**config))


def of_each_rank(compute, directory):
    """The results of `compute()`, a function of a test module, on each rank, after a round trip through JSON."""
    start(_rank, (compute, str(directory)), RANKS)
    return [json.loads((directory / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


def start(function, arguments, processes):
    """Run `function(number, *arguments)` in new processes, with the modules that tests need already imported."""
    start_method = "spawn"
    if sys.platform == "linux":  # the imports take 7 s, and are done once for all processes of all test modules
        start_method = "forkserver"
        multiprocessing.set_forkserver_preload(["two_ranks", "tiny", "omni_runtime"])
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):  # for the fork server
        torch.multiprocessing.start_processes(function, arguments, processes, start_method=start_method)


def _rank(rank, compute, directory):
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{directory}/rendezvous", datetime.timedelta(seconds=60), RANKS, rank
    )
    torch.accelerator.device_count = lambda: 1  # diffusers divides by this
    _stand_in()
    try:
        results = compute()
    finally:
        torch.distributed.destroy_process_group()
    with open(f"{directory}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(results, file)


def _stand_in():
    from diffusers.hooks import context_parallel, tensor_parallel
    from diffusers.models import attention_dispatch

    attention = attention_dispatch._native_attention_forward_op

    def gather(tensor, dim, group):
        lengths = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
        padded = tensor.new_zeros((max(lengths), *tensor.movedim(dim, 0).shape[1:]))
        padded[: tensor.shape[dim]] = tensor.movedim(dim, 0)
        gathered = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([one[:n] for one, n in zip(gathered, lengths, strict=True)]).movedim(0, dim)

    def forward(
        ctx, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        return_lse=False, **more,
    ):  # fmt: skip
        out = attention(ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **more)
        if not return_lse:
            return out
        assert attn_mask is None
        assert scale is None
        return out, (torch.einsum("bshd,bthd->bsht", query, key) / query.shape[-1] ** 0.5).logsumexp(-1)

    tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    context_parallel._all_gather_anything = gather
    attention_dispatch._native_attention_forward_op = forward
