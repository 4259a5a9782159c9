"""Parts shared by the fused forwards of several models: attention with its projections, and the feed-forward.

One op normalises and rotates queries and keys, and writes them where attention reads them. Values are projected
directly into that memory; if the projection is not a plain linear layer, the op copies them there. Attention runs
through the dispatcher that the block's processor calls, with that processor's backend and parallel configuration.

The ops are called as `ops.trusted`, without checks: the fused forward has checked the states, and the modules that it
calls do not change their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.device import is_recorded
from omni_kernels.patching.activations import Quantized, activates, for_layers, project, takes
from omni_kernels.patching.structure import dispatcher, idles, multiplies
from omni_kernels.registration import direct

#: Hidden states as `for_layers` returns them.
States = torch.Tensor | Quantized
#: Keyword arguments of `qk_norm_rope` for the rotation: `freqs`, or `cos` and `sin`, or none.
Rotation = Mapping[str, Any]


def modulations(given: torch.Tensor, count: int, index: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
    """Split a projected timestep [B, count·D] into `count` parts of [B, 1, D] each; with an `index`, of [2B, D].

    The ops also take [B, D], but would have to reshape each part to [B, 1, D] whenever they read it.
    """
    return (given if index is not None else given.unsqueeze(1)).chunk(count, -1)


#: The attribute in which `two_rows` keeps its answer on a tensor.
_TWO = "_omni_kernels_two_rows"
#: Channels that are compared at once.
_AT_ONCE = 4096


def two_rows(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A timestep's projection of every token, if a sample has only two of them: the first token's and the last one's.

    As in image-to-video, where the tokens of a given image have timestep 0. It is found once for all blocks, and the
    host then waits for the device: reading two rows in place of all saves half of what a block moves. So it is not
    looked for while a CUDA graph is recorded, or something observes or transforms operators.

    Args:
        given: [B, S, ...], unchanged from block to block.

    Returns:
        Both, [2B, ...], and which of them a token has, [B, S], as the ops' `index`; None if there are more, or if it is
        not looked for.
    """
    # Inference tensors have no version counter, so a change in place would go unnoticed.
    if direct(given) is None or not given.numel() or given.is_inference() or is_recorded(given):
        return None
    kept: Any = vars(given).get(_TWO)
    if kept is None or kept[0] != given._version:
        kept = given._version, _two_rows(given)
        setattr(given, _TWO, kept)
    found: tuple[torch.Tensor, torch.Tensor] | None = kept[1]
    return found


def _two_rows(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    first, last = given[:, :1], given[:, -1:]
    is_first, is_last = _equal(given, first), _equal(given, last)
    if not is_first.logical_or(is_last).all().item():
        return None
    return torch.cat((first, last)).squeeze(1), is_first.logical_not()


def _equal(given: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Which rows of [B, S, ...] are equal to `row` [B, 1, ...]: [B, S]. In parts, each of which makes a tensor."""
    parts = zip(given.flatten(2).split(_AT_ONCE, 2), row.flatten(2).split(_AT_ONCE, 2), strict=True)
    return torch.stack([(one == other).all(2) for one, other in parts]).all(0)


def for_each(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Expand text [B or 1, T, D] to the batch of x [B, S, D]. In diffusers, the modulation broadcasts it."""
    return text.expand(x.shape[0], -1, -1) if text.shape[0] < x.shape[0] else text


def complex_rotation(table: torch.Tensor | None) -> Rotation:
    """Rotation by a complex64 table [S, Dh/2] or [B, S, Dh/2]."""
    return {} if table is None else {"freqs": torch.view_as_real(table)}


def real_rotation(tables: Sequence[torch.Tensor] | None, start: int = 0, end: int | None = None) -> Rotation:
    """Rotation by tables of cosines and sines [S, Dh], for the tokens from `start` to `end`."""
    return {} if tables is None else {name: t[start:end] for name, t in zip(("cos", "sin"), tables, strict=True)}


def attend(
    processor: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    across_ranks: bool = True,
) -> torch.Tensor:
    """Attention of q [B, S, H, Dh] to k and v [B, T, H, Dh], as [B, S, H·Dh] in q's dtype.

    Args:
        mask: as the dispatcher takes it, broadcastable to [B, H, S, T].
        across_ranks: whether to use the processor's parallel configuration.
    """
    attended = dispatcher(processor)(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config if across_ranks else None,
    )
    return attended.flatten(2, 3).to(q.dtype)


def self_attention(
    attn: Any,
    x: States,
    rotation: Rotation,
    mask: torch.Tensor | None = None,
    *,
    across_heads: bool = False,
) -> torch.Tensor:
    """Self-attention of x [B, S, D], without the output layers.

    Args:
        across_heads: whether q and k are normalised over all heads together.
    """
    q, k, v = queries_keys_values(attn, x, rotation, across_heads=across_heads)
    return attend(attn.processor, q, k, v, mask=mask)


def queries_keys_values(
    attn: Any, x: States, rotation: Rotation, *, across_heads: bool = False, rotated: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k of x [B, S, D], normalised and rotated, and v; [B, S, H, Dh] each.

    Args:
        rotated: how many tokens, the first ones, are rotated; None: all.
    """
    to_q, to_k = attn.to_q, attn.to_k
    q, k = _pair(attn, x, to_q, to_k, multiplies(x, to_q, to_k))
    (v,) = _heads(attn, x, attn.to_v)
    return *normed_and_rotated(attn, q, k, rotation, across_heads=across_heads, rotated=rotated), v


def attention_with_kept(
    attn: Any,
    x: States,
    rotation: Rotation,
    kept_k: torch.Tensor,
    kept_v: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of x [B, S, D] to kept keys and values [B, P, H, Dh], then to itself, without the output layers."""
    to_q, to_k, to_v, P, S = attn.to_q, attn.to_k, attn.to_v, kept_k.shape[1], x.shape[1]
    plain = multiplies(x, to_q, to_k, to_v)
    q, k = _pair(attn, x, to_q, to_k, plain)
    all_k, all_v = (t.new_empty((t.shape[0], P + S, *t.shape[2:])) for t in (kept_k, kept_v))
    for kept, out in ((kept_k, all_k), (kept_v, all_v)):
        out[:, :P].copy_(kept)
    v, v_out = None, None
    if x.shape[0] == 1 and (plain or _in_place(to_v)):  # with several samples, the places of x are not a matrix
        _multiply(to_v, x, all_v.view(P + S, -1)[P:])
    else:
        (v,), v_out = _heads(attn, x, to_v), all_v[:, P:]
    q_out, norm_q = torch.empty_like(q, memory_format=torch.contiguous_format), attn.norm_q
    ops.trusted(q).qk_norm_rope(
        q, k, v, q_out, all_k[:, P:], v_out, **rotation,
        q_weight=norm_q.weight, k_weight=attn.norm_k.weight, eps=norm_q.eps,
    )  # fmt: skip
    return attend(attn.processor, q_out, all_k, all_v, mask=mask)


def normed_and_rotated(
    attn: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    rotation: Rotation,
    *,
    across_heads: bool = False,
    rotated: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [B, S, H, Dh], normalised by the attention's `norm_q` and `norm_k` and rotated, as new tensors."""
    q_out, k_out = _empty_pair(q, k, q.shape[1])
    norm_q, run = attn.norm_q, ops.trusted(q)
    norms = {"q_weight": norm_q.weight, "k_weight": attn.norm_k.weight, "eps": norm_q.eps}
    if rotated is None or not rotation:
        run.qk_norm_rope(q, k, None, q_out, k_out, None, **rotation, **norms, across_heads=across_heads)
        return q_out, k_out
    halves = (_halves(t, rotated) for t in (q, k, q_out, k_out))
    for turned, (one_q, one_k, to_q, to_k) in zip((rotation, {}), zip(*halves, strict=True), strict=True):
        run.qk_norm_rope(one_q, one_k, None, to_q, to_k, None, **turned, **norms, across_heads=across_heads)
    return q_out, k_out


def joint_attention(
    attn: Any,
    x: States,
    text: States,
    rotation: Rotation,
    text_rotation: Rotation,
    mask: torch.Tensor | None = None,
    *,
    text_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of the text and image streams, with the output layers. Returns (text, image).

    Args:
        text_first: whether the text's tokens come before the image's, or after them.
    """
    T, S = text.shape[1], x.shape[1]

    def parts(joint: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the text and of the image."""
        first, last = _halves(joint, T if text_first else S, dim)
        return (first, last) if text_first else (last, first)

    own = attn._modules  # attribute access of modules is slow Python code in torch
    to_q, to_k, to_v = own["to_q"], own["to_k"], own["to_v"]
    t_to_q, t_to_k, t_to_v = own["add_q_proj"], own["add_k_proj"], own["add_v_proj"]
    norm_q, norm_k, t_norm_q, t_norm_k = own["norm_q"], own["norm_k"], own["norm_added_q"], own["norm_added_k"]
    plain = multiplies(x, to_q, to_k, to_v, t_to_q, t_to_k, t_to_v)
    (q, k), (t_q, t_k) = _pair(attn, x, to_q, to_k, plain), _pair(attn, text, t_to_q, t_to_k, plain)
    joint_q, joint_k = _empty_pair(q, k, T + S)
    run = ops.trusted(q)
    joint_v, (t_v, t_v_out), (v, v_out) = _joint_values(attn, text, x, t_to_v, to_v, plain, parts)
    (t_q_out, q_out), (t_k_out, k_out) = parts(joint_q), parts(joint_k)
    run.qk_norm_rope(
        t_q, t_k, t_v, t_q_out, t_k_out, t_v_out, **text_rotation,
        q_weight=t_norm_q.weight, k_weight=t_norm_k.weight, eps=t_norm_q.eps,
    )  # fmt: skip
    run.qk_norm_rope(
        q, k, v, q_out, k_out, v_out, **rotation,
        q_weight=norm_q.weight, k_weight=norm_k.weight, eps=norm_q.eps,
    )  # fmt: skip
    attended = attend(attn.processor, joint_q, joint_k, joint_v, mask=mask)
    attended_text, attended = parts(attended)
    out = through(own["to_out"], attended.contiguous())
    return own["to_add_out"](attended_text.contiguous()), out


#: A stream's values and their place in the joint sequence if they must still be copied there, else (None, None).
_Copy = tuple[torch.Tensor, torch.Tensor] | tuple[None, None]


def _joint_values(
    attn: Any, text: Any, x: Any, text_to_v: Any, to_v: Any, plain: bool, parts: Callable[..., Any]
) -> tuple[torch.Tensor, _Copy, _Copy]:
    """The joint sequence of values, [B, T + S, H, Dh], and the copies of text and image still to be made."""
    T = text.shape[1]
    if x.shape[0] == 1 and (plain or _in_place(text_to_v, to_v)):  # several samples' places are not a matrix
        some = text_to_v.weight if plain else to_v.weight_scale
        joint = some.new_empty((T + x.shape[1], to_v.out_features), dtype=x.dtype)
        t_v_out, v_out = parts(joint, 0)
        _multiply(text_to_v, text, t_v_out)
        _multiply(to_v, x, v_out)
        return joint.view(1, joint.shape[0], -1, attn.inner_dim // attn.heads), (None, None), (None, None)
    (t_v,), (v,) = _heads(attn, text, text_to_v), _heads(attn, x, to_v)
    joint = v.new_empty((v.shape[0], T + x.shape[1], *v.shape[2:]))
    t_v_out, v_out = parts(joint)
    return joint, (t_v, t_v_out), (v, v_out)


def _in_place(*layers: Any) -> bool:
    """Whether `_multiply` can call these quantised layers. Not while compiling: there it would be a copy."""
    return all(map(takes, layers)) and not torch.compiler.is_compiling()


def _multiply(linear: Any, x: Any, out: torch.Tensor) -> None:
    """Apply `linear` to x [S, C] or [1, S, C] and write the result to out [S, D]."""
    if takes(linear):
        linear(x, out=out.view(*x.shape[:-1], -1))
        return
    x = x[0] if x.dim() == 3 else x
    parameters = linear._parameters  # attribute access of parameters is slow Python code in torch
    weight, bias = parameters["weight"].t(), parameters["bias"]
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _halves(joint: torch.Tensor, T: int, dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Split into the first T tokens and the others."""
    first, others = joint.tensor_split((T,), dim)
    return first, others


def _empty_pair(q: torch.Tensor, k: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors [B, tokens, H, Dh] for q and k. If their dtypes match, both are in one tensor.

    The op can then take them as a whole. Not while compiling: where the number of tokens is symbolic, code of Inductor
    (torch 2.13) writes the second half of such a tensor to a wrong place.
    """
    B, _, H, Dh = q.shape
    if q.dtype != k.dtype or torch.compiler.is_compiling():
        return q.new_empty((B, tokens, H, Dh)), k.new_empty((B, tokens, H, Dh))
    q_out, k_out = q.new_empty((2, B, tokens, H, Dh)).unbind()
    return q_out, k_out


def _pair(attn: Any, x: Any, to_q: Any, to_k: Any, plain: bool) -> Iterable[torch.Tensor]:
    """q and k [B, S, H, Dh], in one tensor if their projections are plain linear layers of equal width.

    Not while compiling: see `_empty_pair`.
    """
    width = to_q.out_features if plain and not torch.compiler.is_compiling() else 0
    if not plain or to_k.out_features != width or not x.is_contiguous():
        return _heads(attn, x, to_q, to_k)
    B, S, C = x.shape
    rows, both = x.view(-1, C), x.new_empty((2, B * S, width))
    for projection, out in zip((to_q, to_k), both.unbind(), strict=True):
        _multiply(projection, rows, out)
    return both.view(2, B, S, -1, attn.inner_dim // attn.heads).unbind()


def _heads(attn: Any, x: States, *projections: Any) -> Iterable[torch.Tensor]:
    size = attn.inner_dim // attn.heads  # with tensor parallelism, each rank has only some of the heads
    return (project(projection, x).unflatten(-1, (-1, size)) for projection in projections)


def feed_forward(mlp: Any, x: States | None) -> torch.Tensor:
    """A diffusers `FeedForward` whose activation is GELU's tanh approximation."""
    first, *others = mlp.net
    others = [module for module in others if not idles(module)]
    made: Any
    if activates(first.proj, *others[:1]):
        made = first.proj.gelu(x)
    else:
        fed: torch.Tensor = project(first.proj, x)
        made = for_layers(others[:1], ops.trusted(fed).gelu, fed)
    for module in others:
        made = module(made)
    return made


def entrance(mlp: Any) -> Sequence[Any]:
    """The layers that `feed_forward` calls with its input."""
    return (mlp.net[0].proj,)


def projections(attn: Any, *more: Any) -> Sequence[Any]:
    """The layers that make queries, keys and values of an attention's own tokens, and more that take the same."""
    own = attn._modules  # attribute access of modules is slow Python code in torch
    return own["to_q"], own["to_k"], own["to_v"], *more


def added_projections(attn: Any) -> Sequence[Any]:
    """The layers that make queries, keys and values of the text's tokens in a joint attention."""
    own = attn._modules
    return own["add_q_proj"], own["add_k_proj"], own["add_v_proj"]


def beside(attended: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
    """Attention's output [B, S, D], and behind it GELU of the feed-forward's input [B, S, F]: [B, S, D + F]."""
    D = attended.shape[2]
    both = fed.new_empty((*fed.shape[:2], D + fed.shape[2]))
    both[..., :D].copy_(attended)
    ops.trusted(fed).gelu(fed, out=both[..., D:])
    return both


def through(modules: Iterable[Any], x: torch.Tensor) -> torch.Tensor:
    """Apply the modules to x one after the other, without those that would return their input."""
    for module in modules:
        if not idles(module):
            x = module(x)
    return x


def clipped(h: torch.Tensor) -> torch.Tensor:
    """h, clipped to the fp16 range if it is fp16."""
    return h.clip(-65504, 65504) if h.dtype == torch.float16 else h
