"""A stack: the blocks of one transformer, and how a method caches what they compute.

How the transformer calls its blocks is found in its first computed forward, and checked (`Stack._find`). From then on,
each forward runs over block lists that skip what the `Passage` of its CFG branch says.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.patching import Patch
from omni_runtime.cache.blocks import BlockCall, BlockList, ListRow
from omni_runtime.cache.contract import SPAN, Contract, Watcher, module_lists, tensors_of
from omni_runtime.cache.gates import Gate
from omni_runtime.cache.lifecycle import Branch, Request, Sampling
from omni_runtime.cache.models import ModelRow, depth, row_of
from omni_runtime.cache.passage import Parts, Passage
from omni_runtime.cache.ranks import Ranks, SplitCall, ranks_of
from omni_runtime.cache.refusals import refuse_compiled, refuse_parallel
from omni_runtime.cache.sharing import Rows
from omni_runtime.cache.stretches import Stretch
from omni_runtime.cache.together import Axes, Member, Together

#: Stands for the number of blocks while it is not known.
MANY = 1_000_000
#: A skipped forward of the same input may differ from the computed one by this share, in fp32 and in other dtypes.
EXACT, ROUNDED = 1e-3, 0.05
#: So many manners of a call are remembered.
MANNERS = 256
#: Two skipped forwards that compute the same differ by less.
SAME = 1e-6
#: What a user can do with a model whose blocks cannot be followed.
INSTEAD = "velocity_cache skips whole steps, and need not"


@dataclass
class Taken:
    """The block lists that one sampling has put in the place of a transformer's own.

    Attributes:
        lists: path → list.
        contract: what the lists are numbered by; None before the blocks are found.
    """

    lists: dict[str, BlockList]
    contract: Contract | None


@dataclass(frozen=True)
class Part:
    """A request's part of a batch that several requests share.

    Attributes:
        request, branch: whose it is.
        args, kwargs: the arguments of its own call.
        rows: its samples.
        text: the length of its text, if the batch's texts were padded; None if not.
    """

    request: Request
    branch: Branch
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: slice
    text: int | None


class Stack:
    """The blocks of one transformer.

    Args:
        method: the method's name, for messages.
        transformer: the transformer.
        parts: (model row, number of blocks) → the method's choices for the transformer's blocks.
        gate: (request, name of a branch) → a fresh gate for it.
        passage: makes the passages of the branches.
        alone: why several ranks may not run the transformer; None if they may.
        name: the transformer's name in the pipeline.

    Attributes:
        row: the transformer class's row.
        choose: the argument `parts`.
        parts: the method's choices.
        blocks: the number of blocks; 0 if it is not known yet.
        calls: how each block is called.
        contract: what was found; None before the first computed forward.
        stretches: the stretches of blocks that the same streams go through.
        ranks: the ranks that run the transformer together; None for one.
        rows: this rank's part of the samples of the current call; None for all of them.

    Raises:
        ValueError, PatchConflictError: the transformer is not supported; the message says why.
    """

    def __init__(
        self,
        method: str,
        transformer: torch.nn.Module,
        parts: Callable[[ModelRow, int], Parts],
        gate: Callable[[Request, str], Gate],
        passage: Callable[..., Passage],
        alone: str | None,
        name: str,
    ) -> None:
        self.method = method
        self.transformer = transformer
        self.kind = type(transformer).__name__
        self.row = row_of(self.kind)
        self.ranks: Ranks | None = None
        self.rows: Rows | None = None
        self.calls: list[BlockCall] = []
        self.contract: Contract | None = None
        self.stretches: list[Stretch] = []
        self.blocks = depth(transformer)
        self.name = name
        self._alone = alone
        self._gate = gate
        self._passage = passage
        self._flat: list[tuple[ListRow, torch.nn.Module]] = []
        #: Manners of a call that were checked → whether the loop over the blocks may be left early.
        self._manners: dict[tuple[Any, ...], bool] = {}
        self._leaves = False  # the same, for a class of the table
        self.choose = parts
        self._names = tuple(inspect.signature(transformer.forward).parameters)
        self._between = [(one, self._names.index(one)) for one in self.row.between if one in self._names]
        self.parts = parts(self.row, self.blocks or MANY)
        self.check()
        if not module_lists(transformer):
            raise ValueError(f"this {self.kind} has no list of blocks: there is nothing to skip")

    def check(self) -> None:
        """Raise an error if the transformer is compiled, or parallel in a way that this cache does not support."""
        refuse_compiled(self.transformer)
        refuse_parallel(self.transformer, self._alone)

    def gate(self, request: Request, branch: Branch) -> Gate:
        """Return a fresh gate for a branch."""
        return self._gate(request, branch.name if self.name == "transformer" else f"{branch.name} of {self.name}")

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """Put lists that can skip blocks in the place of the transformer's own, for one sampling.

        Raises:
            ValueError, PatchConflictError: the transformer is not supported in its present state.
        """
        found = module_lists(self.transformer) if self.contract is None else self._lists(self.contract)
        sampling.taken[self] = taken = Taken({}, self.contract)
        for path, blocks in found.items():
            parent, _, name = path.rpartition(".")
            taken.lists[path] = BlockList(blocks, None, sampling)
            seams.set_module(self.transformer.get_submodule(parent), name, taken.lists[path])
        self._align(taken)

    def opened(self) -> None:
        """A request begins. Checks the parallel setup again: it may have changed since the last one.

        Raises:
            ValueError: it is not supported.
        """
        refuse_parallel(self.transformer, self._alone)
        self.ranks = ranks_of(self.transformer)
        lists = [block for blocks in module_lists(self.transformer).values() for block in blocks._modules.values()]
        compiled = any(block._compiled_call_impl is not None for block in lists if block)
        if compiled and self.ranks is not None and not self.ranks.even:
            raise ValueError(
                f"the blocks of this {self.kind} are compiled, and its ranks have unequal numbers of tokens: "
                "diffusers' exchange of unequal parts cannot be compiled"
            )
        self._make_calls()

    def forward(
        self, sampling: Sampling, request: Request, branch: Branch, call: Any, args: Any, kwargs: Any
    ) -> tuple[Any, int]:
        """Make a transformer call over the blocks. Returns its output, and the number of blocks that ran.

        Raises:
            ValueError, RuntimeError: the blocks cannot be followed; the message says why.
        """
        taken, passage = sampling.taken[self], branch.kept
        if taken.contract is not self.contract:
            self._align(taken)
        stepwise = self.stepwise(args, kwargs)
        if stepwise is None:
            return self._find(sampling, request, branch, call, args, kwargs), self.blocks
        if passage is None or passage.stack is not self:
            passage = self._begin(request, branch)
        passage.begin(request, self._arguments(args, kwargs) if args else kwargs, stepwise)
        sampling.passage = passage
        try:
            output = call(*args, **kwargs)
        finally:
            sampling.passage = None
        passage.finish()
        return output, passage.ran

    def forward_together(
        self, sampling: Sampling, parts: Sequence[Part], axes: Axes, stepwise: bool, call: Any, kwargs: Any
    ) -> tuple[Any, list[int]]:
        """Make one transformer call for several requests, whose calls were joined.

        Args:
            parts: the requests, in the order of their samples.
            axes: which arguments of the blocks have an entry for each sample.
            stepwise: see `Passage`; it holds for all of them.
            kwargs: the arguments of the joined call.

        Returns:
            The output, and the number of blocks that ran for each request.

        Raises:
            RuntimeError: the blocks were not called as before.
        """
        members = []
        for part in parts:
            passage = part.branch.kept
            if passage is None or passage.stack is not self:
                passage = self._begin(part.request, part.branch)
            passage.begin(part.request, self._arguments(part.args, part.kwargs), stepwise)
            members.append(Member(passage, part.rows, part.text))
        taken = sampling.taken[self]
        if taken.contract is not self.contract:
            self._align(taken)
        together = sampling.passage = Together(self.calls, members, axes, stepwise)
        try:
            output = call(**kwargs)
        finally:
            sampling.passage = None
        together.finish()
        return output, together.ran

    @property
    def keeps_text_apart(self) -> bool:
        """Whether the text is a stream of its own from the first block to the last."""
        contract = self.contract
        return contract is not None and len(self.stretches) == 1 and all(row.encoder for row in contract.lists)

    def stepwise(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
        """Whether a skipped step of such a call goes from block to block; None if the call must be watched first."""
        if self.contract is None:
            return None
        if not self.row.depths:
            leaves = self._manners.get(_manner(self._names, args, kwargs))
            return None if leaves is None else not leaves
        if not self._leaves:
            return True
        for name, place in self._between:  # noqa: SIM110 -- runs in every forward, where a generator costs more
            if kwargs.get(name) is not None or len(args) > place:
                return True
        return False

    def _begin(self, request: Request, branch: Branch) -> Passage:
        """A passage for a branch whose last call, if any, went to another transformer."""
        if branch.kept is not None:
            branch.kept.retire()
            branch.former.append(branch.kept)
        branch.kept = self._passage(self, request, branch)
        return branch.kept

    def _find(self, sampling: Sampling, request: Request, branch: Branch, call: Any, args: Any, kwargs: Any) -> Any:
        """Make a transformer call, and find in it how the transformer calls its blocks. Returns its output.

        Raises:
            ValueError: the blocks cannot be followed; the message says why.
        """
        taken, random = sampling.taken[self], torch.get_rng_state()
        manner = _manner(self._names, args, kwargs)  # now, because the call may change its arguments
        parts = self.choose(self.row, MANY)
        watcher = Watcher(taken.lists, parts.first, MANY - parts.last, self.ranks is not None)
        for number, blocks in enumerate(taken.lists.values()):
            blocks.begin_at(number * SPAN)
        taken.contract = None
        again = None if self.row.depths else _copied(args, kwargs)
        sampling.passage = watcher
        try:
            output = call(*args, **kwargs)
        finally:
            sampling.passage = None
        try:
            self._adopt(watcher)
            passage = self._record(taken, request, branch, watcher, args, kwargs)
            if again is None:
                self._leaves = watcher.plain or any(
                    kwargs.get(one) is not None or len(args) > place for one, place in self._between
                )
            else:
                if len(self._manners) >= MANNERS:  # a service sees ever new sizes; they are checked again
                    self._manners.clear()
                with torch.random.fork_rng(*_forked(output)):
                    self._manners[manner] = self._check(
                        sampling, request, passage, again, output, watcher.plain, random
                    )
        except BaseException:  # the next request finds them again, or is refused again
            self.contract, self._flat, self.calls, self.blocks = None, [], [], depth(self.transformer)
            self._manners.clear()
            raise
        return output

    def _adopt(self, watcher: Watcher) -> None:
        """Work on the blocks that were found.

        Raises:
            ValueError: they cannot be followed, or the method's settings do not suit them.
        """
        try:
            contract = watcher.contract()
        except ValueError as error:
            raise ValueError(
                f"{self.method} cannot follow the blocks of this {self.kind}: those {error}. {INSTEAD}"
            ) from error
        if self.contract is not None:
            if contract != self.contract:
                raise ValueError(
                    f"{self.method} cannot follow the blocks of this {self.kind}: with other arguments, it calls them "
                    f"in another way than before. {INSTEAD}"
                )
            return
        parts = self.choose(self.row, contract.blocks)
        bounds = [0, *contract.ends()]
        if parts.first > bounds[1]:
            raise ValueError(
                f"{self.method} decides after {parts.first} blocks, but this {self.kind} joins its streams after "
                f"{bounds[1]}"
            )
        ended = [contract.lists[place - 1].ends for place in itertools.accumulate(contract.stretches)]
        ended[-1] = ended[-1] or bool(self.row.depths)  # no class of the table uses its text stream afterwards
        self.stretches = [
            Stretch(first, last, not end) for (first, last), end in zip(itertools.pairwise(bounds), ended, strict=True)
        ]
        self.contract, self.parts, self.blocks = contract, parts, contract.blocks
        self._flat = [
            (row, block)
            for row, blocks in zip(contract.lists, self._lists(contract).values(), strict=True)
            for block in blocks._modules.values()
            if block is not None
        ]
        self._make_calls()

    def _record(
        self, taken: Taken, request: Request, branch: Branch, watcher: Watcher, args: Any, kwargs: Any
    ) -> Passage:
        """Record a forward that was watched.

        Raises:
            ValueError: what is needed was not kept.
        """
        starts = self._align(taken)
        passage = branch.kept
        if passage is None or passage.stack is not self:
            passage = self._begin(request, branch)
        passage.begin(request, self._arguments(args, kwargs), True)
        passage.forget()
        kept = {starts[path] + index: one for (path, index), one in watcher.kept.items() if path in starts}
        if not passage.record_all(kept):
            raise ValueError(
                f"{self.method} cannot follow the blocks of this {self.kind}: what they take and return is changed in "
                f"place, or the settings leave less than a list of blocks. {INSTEAD}"
            )
        return passage

    def _check(
        self, sampling: Sampling, request: Request, passage: Passage, again: Any, output: Any, plain: bool, random: Any
    ) -> bool:
        """Repeat a computed call with the site skipped: of its only snapshot, a forecast is exact.

        This is not done for classes of the table, which tests have checked.

        Args:
            again: copies of the call's arguments.
            plain: whether each block was given what the one before it had returned.
            random: the state of torch's random numbers before the call.

        Returns:
            Whether a skipped step may leave the loop over the blocks early.

        Raises:
            ValueError: the output differs.
        """
        exact = EXACT if all(one.dtype == torch.float32 for one in tensors_of(output)) else ROUNDED
        torch.set_rng_state(random)
        error = self._skipped(sampling, request, passage, _copied(*again), output, True)
        if not error <= exact:
            raise ValueError(
                f"{self.method} cannot follow the blocks of this {self.kind}: a skipped step of the same input is off "
                f"by {error:.2g} of its output. {INSTEAD}"
            )
        if plain:
            torch.set_rng_state(random)
            with contextlib.suppress(Exception):  # the model cannot do without its loop
                # Both differ from the computed output by rounding alone, or the blocks behind the site are miscounted.
                return self._skipped(sampling, request, passage, again, output, False) <= 2 * error + SAME
        return False

    def _skipped(
        self, sampling: Sampling, request: Request, passage: Passage, again: Any, output: Any, stepwise: bool
    ) -> float:
        """Repeat a computed call with the site skipped. Returns the relative difference of the outputs.

        Hooks that were registered on the transformer are not called again.
        """
        args, kwargs = again
        passage.begin(request, self._arguments(tuple(args), kwargs), stepwise)
        sampling.passage = passage
        try:
            with passage.skipping():
                made = self.transformer.forward(*args, **kwargs)
            return difference(made, output) if passage.skipped else math.inf
        finally:
            sampling.passage = None

    def _align(self, taken: Taken) -> dict[str, int]:
        """Tell the lists of a sampling which blocks they begin with, by the contract; returns this by path."""
        contract = self.contract
        starts: dict[str, int] = {}
        if contract is not None:
            counts = [count for _, count in contract.classes]
            first = [0, *itertools.accumulate(counts[:-1])]
            starts = dict(zip([row.name for row in contract.lists], first, strict=True))
        for path, blocks in taken.lists.items():
            blocks.begin_at(starts.get(path))
        taken.contract = contract
        return starts

    def _lists(self, contract: Contract) -> dict[str, torch.nn.ModuleList]:
        """The lists of a contract, by path.

        Raises:
            ValueError: they are no longer as they were found.
        """
        found: dict[str, torch.nn.ModuleList] = {}
        for row, (_, count) in zip(contract.lists, contract.classes, strict=True):
            parent, _, name = row.name.rpartition(".")
            blocks = None
            with contextlib.suppress(AttributeError):
                blocks = getattr(self.transformer.get_submodule(parent), name)
            if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) != count:
                has = f"{len(blocks)} blocks" if isinstance(blocks, torch.nn.ModuleList) else "no list of blocks"
                raise ValueError(
                    f"this {self.kind} has {has} in {row.name}, and had {count} when a cache followed it: "
                    "omni_kernels.unpatch(pipe), and patch it again"
                )
            found[row.name] = blocks
        return found

    def _make_calls(self) -> None:
        kind = BlockCall if self.ranks is None else SplitCall
        if not self.calls or type(self.calls[0]) is not kind:
            self.calls = [kind(row, block) for row, block in self._flat]

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """All arguments of a transformer call by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}


def _forked(output: Any) -> tuple[Any, ...]:
    """The arguments of `torch.random.fork_rng` for the device on which an output lies."""
    device = tensors_of(output)[0].device
    return ([],) if device.type == "cpu" else ([device], True, "fork_rng", "devices", device.type)


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Copies of the arguments of a call, which may change them. Tensors among them are shared."""
    shared = {id(one): one for one in tensors_of([args, kwargs])}
    copied: tuple[list[Any], dict[str, Any]] = copy.deepcopy((list(args), dict(kwargs)), shared)
    return copied


def _manner(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What distinguishes transformer calls that may differ in what they do between the blocks.

    These are the names of the arguments, which of them are None, True, False or a string, the lengths and the plain
    values of lists, and the keys of dicts. Tensors, single numbers and noise levels are left out, because they change
    at each step.

    Args:
        names: the names of the forward's arguments.
    """
    given = itertools.chain(zip(names, args, strict=False), kwargs.items())
    return tuple((name, _form(value)) for name, value in given if "time" not in name and "sigma" not in name)


def _form(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) in (list, tuple):
        return len(value), *[one if isinstance(one, (int, float, str)) else _form(one) for one in value]
    return tuple(map(str, value)) if type(value) is dict else ""


def difference(found: Any, expected: Any) -> float:
    """The largest relative difference of two outputs of a transformer, over their tensors; inf if they are unlike."""
    largest, pairs = 0.0, list(zip(tensors_of(found), tensors_of(expected), strict=False))
    for one, other in pairs:
        if one.shape != other.shape:
            return math.inf
        if not torch.equal(one.isnan(), other.isnan()):
            return math.inf
        one, other = one.float().nan_to_num(), other.float().nan_to_num()
        size = torch.linalg.vector_norm(other).item()
        off = torch.linalg.vector_norm(one - other).item()
        largest = max(largest, off / size if size else off)
    return largest if len(pairs) == len(tensors_of(expected)) == len(tensors_of(found)) else math.inf
