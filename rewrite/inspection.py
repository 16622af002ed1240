"""What is inside a model, and what each pass would find: the data behind `rewrite inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import Node
from torch.nn.parameter import is_lazy

from rewrite import registry
from rewrite.errors import RewriteError
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.operators import activation_of, conv_of, linear_of, norm_of
from rewrite.graph.spellings import function_name
from rewrite.observe.calls import known_calls
from rewrite.observe.evidence import Evidence
from rewrite.observe.export import ObservedCall
from rewrite.observe.norms import ObservedNorm, norms_of
from rewrite.observe.outcomes import evidence_of
from rewrite.observe.spellings import FORM, MOVES, SAME, op_name, shape_of
from rewrite.protocol import find_sites
from rewrite.runtime.inputs import Inputs
from rewrite.text.tables import Rows, merged

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class NormRow:
    """One normalization: where, what, how wide, what feeds and reads it, its mode, its line."""

    name: str
    kind: str
    num_features: int | None
    fed_by: str
    mode: str
    calls: int
    source: str | None
    read_by: str = ""


@dataclass(frozen=True)
class PassRow:
    """How many sites a pass would rewrite, how many it declines, and why."""

    name: str
    contract: str
    sites: int
    skips: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """What `rewrite inspect` shows."""

    model: str
    parameters: int
    buffers: int
    dtypes: dict[str, int]
    devices: dict[str, int]
    training: str
    norms: tuple[NormRow, ...]
    regions: tuple[str, ...]
    opaque: tuple[dict[str, str | None], ...]
    passes: tuple[PassRow, ...]

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def tables(self, *, verbose: bool = False) -> Iterator[RenderableType]:
        """Yield what to print; rows that are alike but for their numbers are one.

        With `verbose` all rows.
        """
        from rich.text import Text

        dtypes = ", ".join(f"{name} ({count})" for name, count in self.dtypes.items())
        devices = ", ".join(self.devices)
        yield Text(
            f"{self.model}: {self.parameters:,} parameters, {self.buffers:,} buffer elements, "
            f"{dtypes or 'no tensors'} on {devices or 'no device'}, in {self.training} mode"
        )
        if self.norms:
            rows = [
                (
                    n.name or "(root)",
                    n.kind,
                    str(n.num_features or "?"),
                    n.fed_by,
                    n.read_by,
                    n.mode,
                    str(n.calls),
                )
                for n in self.norms
            ]
            head = ("module", "norm", "channels", "fed by", "read by", "statistics", "calls")
            yield Rows(head, merged(rows, verbose=verbose), "Normalizations")
        others = [name for name in self.regions if name]
        yield Text(
            f"{len(self.regions)} traced region{'' if len(self.regions) == 1 else 's'}"
            + (f": {', '.join(others)}" if others else "")
        )
        if self.opaque:
            where = ("module", "stopped the tracer", "at")
            opaque = [
                (o["name"] or "(root)", o["reason"] or "", o["source"] or "") for o in self.opaque
            ]
            title = "Opaque modules (their children are captured on their own)"
            yield Rows(where, merged(opaque, verbose=verbose), title)
        found = [
            (p.name, p.contract, str(p.sites), str(p.skips), _most(p.reasons)) for p in self.passes
        ]
        columns = ("pass", "contract", "sites", "left alone", "why")
        yield Rows(columns, found, "Passes", prose=True)


def inspect_model(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Return what is inside `model`; it is neither changed nor run.

    `example_inputs` is a tensor, a tuple of positional inputs or a dict of keywords.
    """
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    calls = known_calls(model, inputs, None)
    captured = capture(model, example_inputs, calls)
    tensors = [*model.parameters(), *model.buffers()]
    modes = Counter(module.training for module in model.modules())
    return Inspection(
        model=type(model).__name__,
        parameters=sum(_numel(p) for p in model.parameters()),
        buffers=sum(_numel(b) for b in model.buffers()),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        devices=dict(Counter(str(t.device) for t in tensors)),
        training="mixed" if len(modes) > 1 else ("train" if modes[True] else "eval"),
        norms=tuple(_norms(captured)),
        regions=tuple(region.name for region in captured.regions),
        opaque=tuple(
            {"name": o.name, "reason": o.reason, "source": o.source}
            for o in captured.opaque.values()
        ),
        passes=tuple(_passes(captured)),
    )


def _norms(captured: Captured) -> Iterator[NormRow]:
    evidence = evidence_of(captured)
    observed = [] if evidence is None else list(_observed_norms(captured, evidence))
    yield from observed
    shown = {row.name for row in observed}
    yield from (row for row in _traced_norms(captured) if row.name not in shown)


def _observed_norms(captured: Captured, evidence: Evidence) -> Iterator[NormRow]:
    """Yield one row for each norm that calls showed, as the first call that reaches it does."""
    met: set[str] = set()
    for observed in evidence.calls:
        found: dict[str, list[ObservedNorm]] = {}
        for norm in norms_of(observed):
            found.setdefault(norm.weight.tensor.rpartition(".")[0], []).append(norm)
        for target, norms in found.items():
            if target in met:
                continue
            met.add(target)
            first, stack = norms[0], observed.stack(norms[0].node)
            readers = dict.fromkeys(r for n in norms for r in _readers(observed, n.node))
            yield NormRow(
                target, type(captured.module(target)).__name__, (shape_of(first.node) or (0,))[-1],
                _maker(observed, first), "of the input", len(norms),
                f"{stack[-1].file}:{stack[-1].number}" if stack else "", ", ".join(readers),
            )  # fmt: skip


def _maker(observed: ObservedCall, norm: ObservedNorm) -> str:
    """Return what makes the input of a norm: a module, or an operator in one."""
    own = norm.weight.tensor.rpartition(".")[0]
    node: Node | None = norm.node
    while node is not None and (observed.owner(node) == own or op_name(node) in SAME):
        made = [a for a in node.args if isinstance(a, Node) and a not in observed.tensors]
        longer = [a for a in made if shape_of(a) == shape_of(norm.node)]
        node = next(iter(longer or made), None)
    return "an input" if node is None or node.op == "placeholder" else _named(observed, node)


def _readers(observed: ObservedCall, node: Node) -> Iterator[str]:
    """Yield what reads a value, through what only moves it."""
    for user in node.users:
        name = op_name(user)
        if name in SAME or name in MOVES or name == "getitem":
            yield from _readers(observed, user)
        elif name == "output":
            yield "the output"
        elif name not in FORM:
            yield _named(observed, user)


def _named(observed: ObservedCall, node: Node) -> str:
    owner = observed.owner(node)
    multiplies = op_name(node) in ("linear", "addmm", "conv1d", "conv2d", "conv3d", "embedding")
    return owner if owner and multiplies else f"{op_name(node)} in {owner or 'the model'}"


def _traced_norms(captured: Captured) -> Iterator[NormRow]:
    met: set[Node] = set()
    for node in captured.nodes():
        norm = norm_of(captured, node)
        if norm is None or node in met:
            continue
        calls = captured.call_sites(node)
        met.update(calls)
        kind = (
            type(captured.module(norm.target)).__name__
            if norm.module is not None
            else (f"{norm.kind} norm in {type(captured.module(norm.target)).__name__}")
        )
        yield NormRow(
            norm.target, kind, norm.num_features, fed_by(captured, norm.input),
            "of the input" if norm.training else "running", len(calls), captured.source(node),
            ", ".join(dict.fromkeys(fed_by(captured, user) for user in node.users)),
        )  # fmt: skip


def fed_by(captured: Captured, node: Node) -> str:
    """Say what makes or reads a value: "conv1 (Conv2d)", "relu", "add", "an input"."""
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return f"input {node.target}"
    for describe in (conv_of, linear_of, norm_of, activation_of):
        operator = describe(captured, node)
        if operator is not None and operator.module is not None:
            return f"{operator.module} ({type(captured.module(operator.module)).__name__})"
    if node.op == "call_module":
        return f"{node.target} ({type(captured.module(str(node.target))).__name__})"
    return function_name(node) or str(node)


def _passes(captured: Captured) -> Iterator[PassRow]:
    for name in registry.entries():
        kind = registry.pass_class(name)
        try:
            sites, skips = find_sites(kind(), captured)
        except (RewriteError, TypeError) as error:
            yield PassRow(name, str(kind.contract), 0, 0, {str(error): 1})
            continue
        reasons = Counter(skip.reason for skip in skips)
        yield PassRow(name, str(kind.contract), len(sites), len(skips), dict(reasons))


def _most(reasons: dict[str, int]) -> str:
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    text = "; ".join(f"{count} × {reason}" for reason, count in ranked[:2])
    return text + (f"; {len(ranked) - 2} more reasons" if len(ranked) > 2 else "")


def _numel(tensor: Any) -> int:
    return 0 if is_lazy(tensor) else int(tensor.numel())
