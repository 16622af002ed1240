"""The norms that example calls showed, as rows: what feeds each, and what reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.observe.evidence import Evidence
from rewrite.observe.export import ObservedCall
from rewrite.observe.norms import ObservedNorm, norms_of
from rewrite.observe.spellings import FORM, MOVES, SAME, op_name, shape_of


@dataclass(frozen=True)
class ObservedRow:
    """One norm: its module, class and width, and the modules around it, by name."""

    target: str
    kind: str
    channels: int
    fed_by: str
    read_by: str
    calls: int
    source: str


def observed_rows(captured: Captured, evidence: Evidence) -> Iterator[ObservedRow]:
    """Yield one row for each norm that the first call which reaches it showed."""
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
            yield ObservedRow(
                target, type(captured.module(target)).__name__, (shape_of(first.node) or (0,))[-1],
                _maker(observed, first), ", ".join(readers), len(norms),
                f"{stack[-1].file}:{stack[-1].number}" if stack else "",
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
