"""Original and result beside each other, block by block, without either in memory.

    x_0 = the original's input,   x_{i+1} = B_i(x_i)                     the original's own values
    error_i = max |B_i(x_i) - B'_i(x_i)| / max |B_i(x_i)|                 in float64
    error   = max |f(x) - f'(x)| / max |f(x)|                             of the outputs

B'_i computes with the new tensors *before* they were rounded, so a right rewrite agrees to about
1e-13 whatever the type of the checkpoint; that the stored tensors are those, rounded once, is
compared element by element. A module's tensors are in memory only while it runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rewrite.equivalence.compare import compare
from rewrite.equivalence.verification import Case, Level, Verification
from rewrite.errors import CheckpointError, one_line
from rewrite.hub.experts import plain_experts
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.structure import build, seen_by, stored_names
from rewrite.observe.stream_matrices import StreamMap
from rewrite.outcomes import Contract
from rewrite.progress import Countdown
from rewrite.runtime.configured.maker import InputMaker, marks
from rewrite.runtime.float64 import KeepFloat64
from rewrite.sharded.plan import FolderPlan
from rewrite.sharded.recipes import FolderRecipe, layers_of, maps_of
from rewrite.sharded.stored import StoredCheck
from rewrite.text.some import some

_ALLOWED = 1e-9
"""Relative error of a block: right agrees to about 1e-13, wrong is off by 1e-6 and more."""

_NAN_ALONE = "it returns NaN alone, so there is nothing to compare; mend it, or pass --no-verify"


class Unrounded(Protocol):
    """New tensors before they were rounded, by the names of the new folder."""

    def placed(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield each name and how to compute the tensor in float64."""
        ...


@dataclass(frozen=True)
class Proof:
    """What running both showed, and what is to be said of it."""

    verification: Verification
    notes: tuple[str, ...]


def prove(
    before: CheckpointFolder,
    after: CheckpointFolder,
    plan: FolderPlan,
    exact: Unrounded,
    seed: int,
    say: Callable[[str], None],
) -> Proof:
    """Run both on one input, block by block, and compare.

    Raises:
        CheckpointError: a model cannot be run so, or returns NaN alone; the message says why.
    """
    begin = time.perf_counter()
    old = plain_experts(build(before, before.config))
    new = plain_experts(build(after, plan.config))
    after = seen_by(new, after)
    stored = StoredCheck(after, dict(exact.placed()))
    reads = _reads(old, before, lambda place: None), _reads(new, after, stored.reader)
    reasons: list[str] = []
    inputs = _inputs(old, seed)
    for model in (old, new):
        _without_cache(model)
    cases: list[Case] = []
    with torch.no_grad(), KeepFloat64():
        try:
            expected, got, left = _run((old, new), reads, plan, inputs, cases, say)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            raise CheckpointError(
                f"{before.path}: cannot be run block by block: {one_line(error)}; "
                "pass --no-verify, or convert the model in memory"
            ) from error
        if plan.contract is Contract.REDEFINING:
            reasons += _unlike(_logits(expected), _logits(got))
        else:
            if bool(_logits(expected).isnan().all()):
                raise CheckpointError(f"{before.path}: {_NAN_ALONE}")
            compared = compare(_logits(expected), _logits(got))
            cases.append(_case("output", compared.max_abs, compared.max_rel))
    say("comparing the stored tensors")
    stored.rest()
    reasons += stored.wrong
    reasons += [
        f"{case.name} is off by {case.max_rel:.1e} relative in float64"
        for case in cases
        if case.failed and plan.contract is not Contract.APPROXIMATE
    ]
    verification = Verification(
        contract=max(plan.contract, Contract.EXACT_IN_EVAL, key=list(Contract).index),
        level=Level.QUICK,
        max_abs=max((case.max_abs for case in cases), default=0.0),
        max_rel=max((case.max_rel for case in cases), default=0.0),
        cases=tuple(cases),
        reasons=tuple(reasons),
        seconds=time.perf_counter() - begin,
    )
    if plan.contract is Contract.REDEFINING:
        return Proof(
            verification, ("drawn anew: the stored tensors compared, and the output is finite",)
        )
    count = f"{len(cases) - 1} block{'' if len(cases) == 2 else 's'}"
    note = f"{count} and the output compared in float64, one module in memory"
    return Proof(verification, (note, *left))


def _run(
    models: tuple[nn.Module, nn.Module],
    reads: tuple[Reads, Reads],
    plan: FolderPlan,
    inputs: dict[str, Any],
    cases: list[Case],
    say: Callable[[str], None],
) -> tuple[Any, Any, tuple[str, ...]]:
    """Run both models; add a case for each block that can be compared.

    Returns:
        Both outputs, and notes of what was not compared block by block.
    """
    old, new = models
    # Weights that are drawn anew compute what they did in no block.
    blocks = [] if plan.contract is Contract.REDEFINING else blocks_of(old)
    recipes = [recipe for step in plan.steps for recipe in step]
    blocks, apart = _comparable(blocks, recipes)
    with _streamed(old, reads[0]) as ran, _streamed(new, reads[1]):
        with _beside(old, new, blocks, maps_of(plan.steps), cases, say):
            expected = old(**inputs)
        say("comparing the outputs")
        got = new(**inputs)
    held = {owner for owner, _ in reads[0]}
    written = {name for names in layers_of(recipes) for name in names}
    owners = {name if name in held else name.rpartition(".")[0] for name in written}
    unrun = sorted((owners & held) - ran)
    notes = {
        "compared in the output only, since a map at its border moved: ": apart,
        f"compared as stored only, since a call with {' and '.join(inputs)} does not run it: ": (
            [some(unrun)] if unrun else []
        ),
    }
    return expected, got, tuple(why + ", ".join(names) for why, names in notes.items() if names)


def _unlike(expected: Any, got: Any) -> list[str]:
    """Return why an output is none that another function of the same form could return."""
    if tuple(expected.shape) != tuple(got.shape):
        return [f"the output has shape {tuple(got.shape)}, not {tuple(expected.shape)}"]
    return [] if bool(got.isfinite().all()) else ["the output is not finite"]


Reads = dict[tuple[str, str], Callable[[], Tensor]]
"""How to get each parameter and stored buffer in float64, by module and attribute."""


def _reads(
    model: nn.Module,
    folder: CheckpointFolder,
    reader: Callable[[str], Callable[[], Tensor] | None],
) -> Reads:
    found: Reads = {}
    for name, place in stored_names(model, folder).items():
        owner, _, attr = name.rpartition(".")
        found[owner, attr] = reader(place) or (lambda place=place: folder.read(place))  # type: ignore[misc]  # mypy infers no type of a lambda with a default
    return found


@contextlib.contextmanager
def _streamed(model: nn.Module, reads: Reads) -> Iterator[set[str]]:
    """Let each module hold its tensors, in float64, while it runs; yield which have run."""
    ran: set[str] = set()
    held_by: dict[str, list[tuple[str, str]]] = {}
    for owner, attr in reads:
        held_by.setdefault(_runner(model, owner), []).append((owner, attr))
    handles = []

    def enter(places: Sequence[tuple[str, str]]) -> None:
        with _disable_current_modes():  # they would look at every block of a tensor
            for owner, attr in places:
                ran.add(owner)
                held = _holder(model, owner, attr)
                value = reads[owner, attr]()
                wide: Any = value.double() if value.is_floating_point() else value
                held[attr] = wide if type(held[attr]) is Tensor else nn.Parameter(wide, False)

    def leave(kept: Mapping[tuple[str, str], Any]) -> None:
        for (owner, attr), meta in kept.items():
            _holder(model, owner, attr)[attr] = meta

    for name, places in held_by.items():
        module = model.get_submodule(name)
        kept = {place: _holder(model, *place)[place[1]] for place in places}
        handles += [
            module.register_forward_pre_hook(lambda m, args, places=places: enter(places)),
            module.register_forward_hook(
                lambda m, args, out, kept=kept: leave(kept), always_call=True
            ),
        ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _runner(model: nn.Module, owner: str) -> str:
    """Return the module that runs where the tensors of `owner` are read."""
    outer = owner.rpartition(".")[0]
    # It reads its projection's weight and never calls it.
    return outer if isinstance(model.get_submodule(outer), nn.MultiheadAttention) else owner


def _holder(model: nn.Module, owner: str, attr: str) -> dict[str, Any]:
    module = model.get_submodule(owner)
    return module._parameters if attr in module._parameters else module._buffers


@contextlib.contextmanager
def _beside(
    old: nn.Module,
    new: nn.Module,
    blocks: Sequence[str],
    maps: Sequence[StreamMap],
    cases: list[Case],
    say: Callable[[str], None],
) -> Iterator[None]:
    """Run each block of `new` on what its twin in `old` was given, and compare.

    Where the stream is in another basis, so are what a block is given and what it returns.
    """
    step = Countdown(say, "comparing", len(blocks))

    def ran(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        step(name)
        given, named = _turned(maps, (args, kwargs))
        got = new.get_submodule(name)(*given, **named)
        compared = compare(_turned(maps, out), got)
        cases.append(_case(name, compared.max_abs, compared.max_rel))

    handles = [
        old.get_submodule(name).register_forward_hook(
            lambda m, args, kwargs, out, name=name: ran(name, args, kwargs, out),
            with_kwargs=True,
        )
        for name in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turned(maps: Sequence[StreamMap], held: Any) -> Any:
    """Return what holds a value of the stream first, with that value in the new basis."""
    if not maps:
        return held
    done = False

    def turn(item: Any) -> Any:
        nonlocal done
        if isinstance(item, Tensor) and not done and item.is_floating_point():
            done = True
            for each in maps:
                if item.shape[-1] == each.size:
                    item = each(item.reshape(-1, each.size)).reshape(item.shape)
            return item
        if type(item) in (tuple, list):
            return type(item)(turn(part) for part in item)
        if type(item) is dict:
            return {key: turn(part) for key, part in item.items()}
        return item

    return turn(held)


def blocks_of(model: nn.Module) -> list[str]:
    """Return the blocks of a model: the members of its outermost lists of modules of one class."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        if not any(name.startswith(f"{block}.") for block in found):
            found += [f"{name}.{index}" for index in range(len(module))]
    return found


def _inputs(model: nn.Module, seed: int) -> dict[str, Any]:
    """Return inputs of two samples, by what a model's configuration says that it takes.

    Raises:
        CheckpointError: what it takes is not known.
    """
    config: Any = model.config
    # Where no token of the text stands for an image, a model of both compares one with the other.
    both = not marks(config)
    made = InputMaker(model, config, torch.Generator().manual_seed(seed), both)
    made.device, made.dtype = torch.device("cpu"), torch.float64
    if (inputs := made.inputs(2)) is None:
        raise CheckpointError(
            f"{type(model).__name__} takes {made.main}, for which none is made up; "
            "pass --no-verify, or convert the model in memory"
        )
    return {**inputs, "use_cache": False} if "use_cache" in made.names else inputs


def _without_cache(model: nn.Module) -> None:
    """Let no block remember: the twin of a block is run on the same arguments, cache and all."""
    for module in model.modules():
        if getattr(config := getattr(module, "config", None), "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]  # not None: it has the attribute


def _logits(output: Any) -> Any:
    """Return what a model returns first: its logits, or its last hidden state."""
    return output[0] if not isinstance(output, Tensor) else output


def _comparable(
    blocks: Sequence[str], recipes: Sequence[FolderRecipe]
) -> tuple[list[str], list[str]]:
    """Return the blocks that compute what they did, and those whose border a map crosses.

    A post-norm block ends in its norm: where that goes into a reader outside, the block returns
    another value, and a block that holds the reader wants another.
    """
    apart: dict[str, None] = {}
    for names in layers_of(recipes):
        for block in blocks:
            inside = [name.startswith(f"{block}.") for name in names]
            if any(inside) and not all(inside):
                apart[block] = None
    return [block for block in blocks if block not in apart], list(apart)


def _case(name: str, max_abs: float, max_rel: float) -> Case:
    return Case(name, "", max_abs, max_rel, failed=not max_rel <= _ALLOWED)
