"""How a transformer calls its blocks, found by watching one forward: no table has to know the model.

Some of a transformer's module lists hold its blocks. A block takes the hidden states and returns new ones. It may carry
a second stream in the same way (text, or sound beside a video). Which lists, which arguments and which places of the
output these are, shows in one forward: an argument of a block *is* the tensor that the block before it returned.

    watcher = Watcher(module_lists(transformer), 1, 0)   # in the place of a passage, during one forward
    contract = watcher.contract()                        # or ValueError: why a cache cannot follow these blocks

`BlockSession` then repeats the call with its blocks skipped, and refuses the model if the output differs.

The contract begins with the list that does the most work: parameters times tokens. A list that runs right before or
after belongs to it, too, if a stream goes from one to the other. Refiners of the text alone, or of the noise alone, do
not. If the model joins two streams into one between two lists (FLUX.2, Chroma), the lists are different *stretches*:
what their blocks add is forecast for each stretch separately.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from omni_runtime.cache.blocks import BlockList, ListRow, Slot
from omni_runtime.cache.ranks import split_inputs

#: A list that runs between the blocks of another one is as important as that if it has this share of its parameters, or
#: a stream of its own.
IMPORTANT = 0.5

#: While they are watched, each list's blocks are numbered from the next multiple of this.
SPAN = 10_000
#: Words in the names of arguments that hold the text stream. Blocks are watched at the other stream, which is noise.
TEXT = {"cap", "caption", "captions", "cond", "condition", "context", "encoder", "language", "llm", "lyrics", "prompt"}
TEXT |= {"text", "txt", "und", "words"}
#: Argument or output of a block → its shape; None for an output that is None.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contract:
    """The block lists of a transformer, and how their blocks are called.

    Attributes:
        lists: the lists, in the order in which they run.
        stretches: the number of lists in each stretch. Within a stretch, the same streams go from block to block.
        classes: the class of each list's blocks, and how many there are.
    """

    lists: tuple[ListRow, ...]
    stretches: tuple[int, ...]
    classes: tuple[tuple[str, int], ...]

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return sum(count for _, count in self.classes)

    def ends(self) -> list[int]:
        """The number of blocks up to the end of each stretch."""
        ends, lists, blocks = [], iter(self.classes), 0
        for count in self.stretches:
            blocks += sum(next(lists)[1] for _ in range(count))
            ends.append(blocks)
        return ends

    def __str__(self) -> str:
        lines, lists = [], iter(zip(self.lists, self.classes, strict=True))
        for stretch, count in enumerate(self.stretches):
            if stretch:
                lines.append("the model joins the streams")
            for _ in range(count):
                one, (kind, blocks) = next(lists)
                streams = " and ".join(filter(None, (one.hidden, one.encoder)))
                lines.append(f"{one.name}: {blocks} × {kind}, {streams}")
        return "\n".join(lines)


class Found(dict[str, Contract]):
    """The contracts of a pipeline's transformers, by their names in it."""

    def __str__(self) -> str:
        if len(self) == 1:
            return str(next(iter(self.values())))
        return "\n".join(f"{name}:\n{contract}" for name, contract in self.items())


def module_lists(transformer: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The module lists that may hold blocks, by their path: plain ones, of modules that can be called.

    Lists inside another list are left out.
    """
    found: dict[str, torch.nn.ModuleList] = {}
    inside: list[str] = []
    for path, module in transformer.named_modules():
        if path and module._compiled_call_impl is not None:  # what is inside was compiled with the list as it is
            inside.append(f"{path}.")
        if not isinstance(module, torch.nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(outer) for outer in inside):
            continue
        inside.append(f"{path}.")
        containers = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList)
        if type(module) in (torch.nn.ModuleList, BlockList) and not any(isinstance(one, containers) for one in module):
            found[path] = module
    return found


@dataclass
class _Seen:
    """One call of a block.

    Attributes:
        at: its number among all calls.
        index: the block's place in its list.
        shapes: argument → its shape, for tensors.
        outputs: the shapes of what it returned.
        alone: whether it returned a tensor instead of a tuple.
        fed: (list, place of the output) → the arguments that are what the last block of that list returned there.
        again: the arguments that are the tensors that the block before was called with.
    """

    at: int
    index: int
    shapes: dict[str, Shape]
    outputs: tuple[Shape | None, ...]
    alone: bool
    fed: dict[tuple[str, int], list[str]]
    again: set[str]


@dataclass
class _List:
    """What was seen of one list.

    `odd` says why its blocks cannot be followed. `jumps` says how a block's output goes to another block than the next:
    then the site must reach to the last block. `kept` says that something, perhaps the model, keeps outputs.
    """

    path: str
    blocks: list[torch.nn.Module]
    seen: list[_Seen] = field(default_factory=list)
    odd: str | None = None
    jumps: str | None = None
    kept: bool = False
    returned: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for block in self.blocks for parameter in block.parameters())

    @property
    def work(self) -> int:
        """About how many multiplications its blocks need: parameters times tokens."""
        outputs = self.seen[0].outputs
        return self.parameters * sum(math.prod(shape[:-1]) for shape in outputs if shape is not None)


class Marks:
    """How some tensors were, to see later whether they were changed in place.

    A tensor counts its changes. An inference tensor does not, so a copy of it is kept.
    """

    def __init__(self, *values: Any) -> None:
        self._tensors = tensors_of(values)
        self._marks = [one.clone() if one.is_inference() else one._version for one in self._tensors]

    def same(self) -> bool:
        """Whether no tensor was changed since."""
        return all(
            torch.equal(mark, one) if isinstance(mark, torch.Tensor) else mark == one._version
            for one, mark in zip(self._tensors, self._marks, strict=True)
        )

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return any(one is tensor for one in self._tensors)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings, such as a transformer's output, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [one for part in value for one in tensors_of(part)] if isinstance(value, (tuple, list)) else []


@dataclass(frozen=True)
class Kept:
    """A block's call, kept until the forward is over. It is of no use if its tensors were changed since (`marks`)."""

    block: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    marks: Marks


class Watcher:
    """Takes the place of a passage in one forward, and records how the blocks of each list are called.

    The newest output of each list is held, and the few calls that a passage records from.

    Args:
        lists: the module lists by path. The blocks of each are numbered from its place here times `SPAN`.
        first: the calls of the blocks 0 and `first` of each list are kept, ...
        behind: ... and those of its last block and of the block that so many others follow.
        split: whether diffusers may split the states among ranks at a block's entry.

    Attributes:
        kept: (path of a list, index) → the call.
        plain: whether each block of the contract was given what the one before it had returned, so that the model does
            nothing between them; False before `contract`.
    """

    def __init__(self, lists: Mapping[str, torch.nn.ModuleList], first: int, behind: int, split: bool = False) -> None:
        self.kept: dict[tuple[str, int], Kept] = {}
        self._lists = [_List(path, list(blocks)) for path, blocks in lists.items()]
        self._first, self._behind, self._split = first, behind, split
        self.plain = False
        self._newest: dict[str, tuple[tuple[Any, ...], Marks]] = {}
        self._calls = 0

    def slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Any]:
        """Yield slots that record the calls of blocks of a list; the first of them has the number `start`."""
        number, first = divmod(start, SPAN)
        for index, block in enumerate(blocks, first):
            yield Slot(functools.partial(self._run, self._lists[number], index), block)

    def _run(self, where: _List, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(block.forward).parameters)
        if len(args) > len(names) or not set(kwargs) <= set(names):
            where.odd = "takes arguments that its forward does not name"
        seen = split_inputs(block, args, kwargs) if self._split else (args, kwargs)
        given = {**dict(zip(names, seen[0], strict=False)), **seen[1]}
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        fed = {
            (path, place): same
            for path, (outputs, _) in self._newest.items()
            for place, output in enumerate(outputs)
            if (same := [name for name, tensor in tensors.items() if tensor is output])
        }
        self._see_what_the_model_does(where, list(tensors.values()))
        before, containers = Marks(args, tuple(kwargs.values())), _containers(given.values())
        output = block(*args, **kwargs)
        if not before.same():
            where.odd = "changes its input in place"
        if containers != _containers(given.values()):
            where.odd = "writes into one of its arguments"
        alone = isinstance(output, torch.Tensor)
        outputs = (output,) if alone else tuple(output) if type(output) is tuple else (output,)
        if not all(one is None or isinstance(one, torch.Tensor) for one in outputs):
            where.odd = f"returns {', '.join(type(one).__name__ for one in outputs)}"
            outputs = ()
        marks = Marks(outputs)
        if index in (0, self._first, len(where.blocks) - 1, len(where.blocks) - 1 - self._behind):
            self.kept[where.path, index] = Kept(
                block, args, kwargs, output, Marks(args, tuple(kwargs.values()), outputs)
            )
        where.returned += [weakref.ref(one) for one in outputs if one is not None and one not in before]
        self._newest[where.path] = outputs, marks
        again = {name for name, tensor in tensors.items() if where.given.get(name) is tensor}
        where.given = tensors
        where.seen.append(_Seen(self._calls, index, _shapes(tensors), tuple(map(_shape, outputs)), alone, fed, again))
        self._calls += 1
        return output

    def _see_what_the_model_does(self, where: _List, given: Sequence[torch.Tensor]) -> None:
        """Find out whether the model has changed the last output in place, or uses earlier ones."""

        def held(tensor: torch.Tensor) -> bool:
            """Whether it is only alive because it is kept here."""
            return any(tensor is one for one in where.given.values()) or any(
                tensor in kept.marks for kept in self.kept.values()
            )

        outputs, marks = self._newest.get(where.path, ((), None))
        if marks is not None and not marks.same():
            where.odd = "has its output changed in place"
        for ref in where.returned:
            earlier = ref()
            if earlier is None or any(earlier is one for one in outputs):
                continue
            if any(earlier is one for one in given):
                where.jumps = "takes what an earlier block than the last returned"
            elif not held(earlier):
                where.kept = True

    def contract(self) -> Contract:
        """What was found. What the blocks were given is no longer held.

        Raises:
            ValueError: a cache cannot follow the blocks; the message says why, after the word "those".
        """
        self._newest.clear()
        for one in self._lists:
            one.given.clear()
        ran = [one for one in self._lists if one.seen]
        if not ran:
            raise ValueError("are not taken from a list of modules in turn")
        for one in ran:
            if one.jumps is not None and self._behind:
                one.odd = one.jumps
        main, row = _main(ran)
        rows = {main.path: row}
        _refuse_turns(main, ran)
        chain, joins = [main], list[bool]()
        for step in (-1, 1):
            while True:
                near = _neighbour(chain[0] if step < 0 else chain[-1], ran, step)
                if near is None:
                    break
                try:
                    rows[near.path] = _row(near)
                except ValueError:
                    break  # a list that no stream comes from, or goes to
                first, second = (near, chain[0]) if step < 0 else (chain[-1], near)
                link = _link(first, rows[first.path], second, rows[second.path])
                if link is None:
                    break
                chain.insert(0 if step < 0 else len(chain), near)
                joins.insert(0 if step < 0 else len(joins), link)
        stretches = [1]
        for joined in joins:
            if joined:
                stretches.append(1)
            else:
                stretches[-1] += 1
        self.plain = not any(one.jumps or one.kept for one in chain) and _plain(chain, rows, joins)
        classes = tuple((type(one.blocks[0]).__name__, len(one.blocks)) for one in chain)
        return Contract(tuple(rows[one.path] for one in chain), tuple(stretches), classes)


def _main(ran: Sequence[_List]) -> tuple[_List, ListRow]:
    """The list that does the most work, and how its blocks are called; or the next one of about as many parameters.

    Raises:
        ValueError: its blocks cannot be followed.
    """
    by_work = sorted(ran, key=lambda one: one.work, reverse=True)
    try:
        return by_work[0], _row(by_work[0])
    except ValueError:
        most = max(one.parameters for one in ran)
        for one in by_work[1:]:
            if one.parameters >= IMPORTANT * most:
                with contextlib.suppress(ValueError):
                    return one, _row(one)
        raise


def _plain(chain: Sequence[_List], rows: Mapping[str, ListRow], joins: Sequence[bool]) -> bool:
    """Whether each block of some lists was given what the one before it had returned, but where streams are joined."""

    def passed(one: _Seen, path: str, into: ListRow) -> bool:
        streams = [name for name in (into.hidden, into.encoder) if name is not None]
        given = {name for (source, place), names in one.fed.items() if source == path for name in names}
        return given.issuperset(streams)

    for one in chain:
        row = rows[one.path]
        if not all(passed(seen, one.path, row) for seen in one.seen[1:]):
            return False
    return all(
        joined or passed(second.seen[0], first.path, rows[second.path])
        for (first, second), joined in zip(itertools.pairwise(chain), joins, strict=True)
    )


def _containers(values: Iterable[Any]) -> list[list[int]]:
    """The identities of what the lists, dicts and sets among some values hold."""
    held = (one.values() if isinstance(one, dict) else one for one in values if isinstance(one, (dict, list, set)))
    return [[id(item) for item in one] for one in held]


def _shape(tensor: torch.Tensor | None) -> Shape | None:
    return None if tensor is None else tuple(tensor.shape)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _row(where: _List) -> ListRow:
    """How the blocks of a list are called.

    Raises:
        ValueError: they cannot be followed.
    """
    name = f"of {where.path}"
    if where.odd is not None:
        raise ValueError(f"{name} cannot be followed: one {where.odd}")
    if [one.index for one in where.seen] != list(range(len(where.blocks))):
        raise ValueError(f"{name} do not run one after the other, each of them once")
    if len({tuple(inspect.signature(block.forward).parameters) for block in where.blocks}) > 1:
        raise ValueError(f"{name} do not all take the same arguments")
    first = where.seen[0]
    if any((len(one.outputs), one.alone) != (len(first.outputs), first.alone) for one in where.seen):
        raise ValueError(f"{name} do not all return as much")
    links = _links(where)
    signature = list(inspect.signature(where.blocks[0].forward).parameters)
    carried = sorted(links.values(), key=signature.index)
    if not carried:
        raise ValueError(f"{name} do not take what the block before returned")
    if len(carried) > 2:
        raise ValueError(f"{name} carry {len(carried)} streams: {', '.join(carried)}")
    for one in where.seen:
        for place, argument in links.items():
            output = one.outputs[place]
            taken = one.shapes.get(argument)
            if output is not None and taken != output:
                _refuse_broadcast(name, argument, taken, output)
                raise ValueError(f"{name} take {argument} in one shape and return it in another")
            if one.shapes.get(argument) != first.shapes.get(argument):
                raise ValueError(f"{name} do not all take {argument} in the same shape")
            passed = argument in one.fed.get((where.path, place), ())
            if argument in one.again and not passed:
                raise ValueError(f"{name} take the same {argument}, one beside the other")
    carried.sort(key=_is_text)  # otherwise in the order of the signature
    hidden, encoder = carried[0], carried[1] if len(carried) > 1 else None
    role = {hidden: "hidden", encoder: "encoder"}
    places: list[str | None] = [role[links[place]] if place in links else None for place in range(len(first.outputs))]
    unknown = [place for place, one in enumerate(places) if one is None]
    if any(one.outputs[place] is not None for one in where.seen for place in unknown):
        for one, place in itertools.product(where.seen, unknown):
            for argument, taken in one.shapes.items():
                _refuse_broadcast(name, argument, taken, one.outputs[place])
        raise ValueError(f"{name} return something that no other block takes")
    last = where.seen[-1].outputs
    ended = [place for place, one in enumerate(places) if one is not None and last[place] is None]
    if any(places[place] == "hidden" for place in ended):
        raise ValueError(f"{name} return no hidden states at the end")
    return ListRow(where.path, hidden, encoder, "hidden" if first.alone else tuple(places), bool(ended))


def _refuse_broadcast(name: str, argument: str, taken: Any, output: Any) -> None:
    """Raise ValueError if blocks take an argument of this shape for one sample, and return it for several."""
    if taken and output and taken[0] == 1 != output[0] and taken[1:] == output[1:]:
        raise ValueError(
            f"{name} take {argument} of one sample and return it for {output[0]}: give the pipeline "
            "embeddings for every image (prompt_embeds.repeat)"
        )


def _is_text(argument: str) -> bool:
    return any(word in TEXT for word in argument.lower().split("_"))


def _links(where: _List) -> dict[int, str]:
    """Place of the output → the argument in which the next block takes it."""
    links: dict[int, str] = {}
    for one in where.seen[1:]:
        for (path, place), names in one.fed.items():
            if path == where.path:
                links.setdefault(place, names[0])
    # The model may work on a stream between all blocks (ControlNet), or the list may have one block. Then the stream is
    # the only other argument of that shape, or what diffusers has registered.
    first = where.seen[0]
    for place, shape in enumerate(first.outputs):
        if place in links or shape is None:
            continue
        alike = [name for name, size in first.shapes.items() if size == shape and name not in links.values()]
        registered = _registered(where.blocks[0], place)
        if registered in alike:
            links[place] = str(registered)
        elif len(alike) == 1:
            links[place] = alike[0]
    return links


def _registered(block: torch.nn.Module, place: int) -> str | None:
    """The argument that belongs to a place of the output, if diffusers' registry of blocks says so."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None
    if place == known.return_hidden_states_index:
        return str(known.hidden_states_argument_name)
    if place == known.return_encoder_hidden_states_index:
        return str(known.encoder_hidden_states_argument_name)
    return None


def _refuse_turns(main: _List, ran: Sequence[_List]) -> None:
    start, end = main.seen[0].at, main.seen[-1].at
    for other in ran:
        within = any(start < one.at < end for one in other.seen)
        carries = any(path == other.path for one in other.seen for path, _ in one.fed)
        if other is not main and within and (carries or other.parameters >= IMPORTANT * main.parameters):
            raise ValueError(f"of {main.path} and {other.path} run in turns")


def _neighbour(one: _List, ran: Sequence[_List], step: int) -> _List | None:
    """The list that ran right before (step −1) or right after `one`."""
    if step < 0:
        before = [other for other in ran if other.seen[-1].at < one.seen[0].at]
        return max(before, key=lambda other: other.seen[-1].at, default=None)
    after = [other for other in ran if other.seen[0].at > one.seen[-1].at]
    return min(after, key=lambda other: other.seen[0].at, default=None)


def _link(first: _List, row: ListRow, second: _List, following: ListRow) -> bool | None:
    """Whether the streams are joined between two lists; None if no stream goes from one to the other."""
    entry, exit_ = second.seen[0], first.seen[-1]
    streams = {following.hidden, following.encoder} - {None}
    went = {name for (path, _), names in entry.fed.items() if path == first.path for name in names if name in streams}
    if went and (row.encoder is None) == (following.encoder is None):
        return False
    if row.encoder is not None and following.encoder is None:
        parts = [shape for shape in exit_.outputs if shape is not None and len(shape) == 3]
        whole = entry.shapes[following.hidden]
        if len(parts) == 2 and len(whole) == 3 and whole[1] == parts[0][1] + parts[1][1]:
            return True
    return None
