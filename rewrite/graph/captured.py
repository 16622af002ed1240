"""A captured model, read-only: its graphs, the call sites of modules, and readers of values.

`capture` never fails on a model. The root is traced; each submodule that cannot be is one opaque
call in its parent's graph, and its children are traced as regions of their own, to any depth.
Modules that no trace reached (another branch, a head for training) are regions too. Every module
that holds parameters is therefore seen in exactly one place, and two questions have honest answers:

    callers_known(name)   may code that was not traced also call this module?
    readers(node).known   may code that was not traced also read this value?
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.effects import Effects
from rewrite.graph.index import Index, storage_of
from rewrite.graph.lines import Lines
from rewrite.graph.model_code import ModelCode
from rewrite.graph.refs import Readers as Readers
from rewrite.graph.refs import TensorRef as TensorRef
from rewrite.provenance import shown_path
from rewrite.runtime.tree import Tree
from rewrite.tracing.code.functions_run import FunctionsRun
from rewrite.tracing.records import Frame
from rewrite.tracing.records import Opaque as Opaque
from rewrite.tracing.regions import Region as Region
from rewrite.tracing.tracer import has_parametrizations, hook_reasons
from rewrite.tracing.untraced_branches import UntracedBranches

if TYPE_CHECKING:
    from rewrite.runtime.inputs import ExampleCall, Inputs


_NOT_TRACED = "is not called in any traced forward"


class HasValues:
    """What holds tensors, and may be told what those without values (meta) hold.

    Attributes:
        numbers: returns such a tensor by its name: it is read from a checkpoint folder.
    """

    numbers: Callable[[str], torch.Tensor] | None = None

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """Return the tensor that `ref` names."""
        raise NotImplementedError

    def values(self, ref: TensorRef) -> torch.Tensor:
        """Return the tensor that `ref` names with its values, wherever they are.

        Without `numbers` one that has none is on the meta device.
        """
        tensor = self.tensor(ref)
        if tensor.is_meta and self.numbers is not None:
            return self.numbers(ref.name)
        return tensor


class HasPlaces:
    """What knows where the calls of traced forwards stand in a model's code."""

    regions: tuple[Region, ...]

    @property
    def _index(self) -> Index:
        """Lookup tables of all forwards."""
        raise NotImplementedError

    def nodes(self) -> Iterator[Node]:
        """Yield every node of every region, in data-flow order within a region."""
        for region in self.regions:
            yield from region.graph.nodes

    def region_of(self, node: Node) -> Region:
        """Return the region that `node` belongs to."""
        return self._index.region_of_graph[node.graph]

    def owner(self, node: Node) -> str:
        """Return the name of the innermost module whose forward made the call."""
        return self.region_of(node).frames[node].owner

    def frame(self, node: Node) -> Frame:
        """Return the invocation of a forward that made the call."""
        return self.region_of(node).frames[node]

    def source(self, node: Node) -> str | None:
        """Return "file.py:123", the line of the model's code that made the call."""
        line = self.region_of(node).lines.get(node)
        return f"{shown_path(line[0].co_filename)}:{line[1]}" if line else None

    def source_text(self, node: Node) -> str:
        """Return the text of the line of the model's code that made the call, or ""."""
        line = self.region_of(node).lines.get(node)
        return linecache.getline(line[0].co_filename, line[1]).strip() if line else ""


@dataclass(eq=False)
class Captured(HasValues, HasPlaces):
    """A captured model as evidence: it answers questions, and nothing of it edits.

    `capture` returns an `Editable`, which is one with an editor; `find` gets the evidence alone.

    Attributes:
        model: the module that was captured, itself (edits happen in place).
        tree: its modules under all their names.
        regions: the traced forwards, the model's own first if it could be traced.
        opaque: the modules that are one call to the tracer, with the reason.
        shape_error: why some values have no shape although example inputs were given.
        altered: by name, why a module is not the same at every call of the model.
        ran: the functions that the traces ran, and the modules that they had.
        notes: what a pass has to say of the whole model; it goes into the report.
        exact: what written tensors are before they are rounded, in float64, by qualified name; None
            where nobody is going to ask. It keeps the old tensors alive.
        example_calls, example_inputs: calls that may be observed, and what it was captured on.
        observed: what the calls showed (`rewrite.observe`), once somebody asked.
        unobserved: why they could not be observed, or "".
    """

    model: nn.Module
    tree: Tree
    regions: tuple[Region, ...]
    opaque: dict[str, Opaque]
    shape_error: str | None = None
    altered: dict[str, str] = field(default_factory=dict)
    ran: FunctionsRun | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)
    exact: dict[str, Callable[[], torch.Tensor]] | None = field(default_factory=dict)
    example_calls: tuple[ExampleCall, ...] = ()
    example_inputs: Inputs | None = None
    observed: Any = field(default=None, repr=False)
    unobserved: str = ""

    def __post_init__(self) -> None:
        # Views share this dict (`Editable`). Until it is one of its own, it lies inside this object
        # from Python 3.13 on, whose collector then takes what other views hold for garbage.
        self.__dict__ = dict(self.__dict__)

    # -- modules ------------------------------------------------------------------------------

    def module(self, name: str) -> nn.Module:
        """Return the module called `name`."""
        found = self.tree.names.get(name)
        return self.tree.get(name) if found is None else found

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return every other name of the module called `name`."""
        return self.tree.aliases(name)

    def calls(self, name: str) -> tuple[Node, ...]:
        """Return the `call_module` nodes of a module, over all regions."""
        return tuple(self._index.calls.get(self.tree.name(self.tree.get(name)), ()))

    def callers_known(self, name: str) -> bool:
        """Return whether every call of the module was seen (one caller, not one *known* caller)."""
        return self.unknown_caller(name) is None

    def unknown_caller(self, name: str) -> str | None:
        """Return who else may call the module, in words, or None if every call was seen."""
        name = self.tree.name(self.tree.get(name))
        if name in self._index.roots and name not in self.opaque:
            places = (name, *self.aliases(name))
            cause = next(filter(None, map(self._index.opaque_around, places)), None)
            return f"{name} {_NOT_TRACED}{'' if cause is None else f': {cause}'}"
        return self.opaque_caller(name)

    def opaque_caller(self, name: str) -> str | None:
        """Return which code that was read and not traced may call the module, in words, or None."""
        for place in (name, *self.tree.aliases(name)):
            if (opaque := self._index.opaque_caller(place)) is not None:
                return opaque
            if (reason := self._untaken.caller(place)) is not None:
                return reason
        return None

    def hooks(self, name: str) -> tuple[str, ...]:
        """Return why a call of the module is more than its forward: hooks, parametrizations."""
        reasons = _beside_forward(self.module(name))
        unsteady = self.unsteady(name)
        if unsteady is None:
            return reasons
        return (*reasons, f"is not the same at every call: {unsteady}")

    def unsteady(self, name: str) -> str | None:
        """Return which line alters the module or puts it elsewhere, or None."""
        first = self.tree.name(self.module(name))
        return self.code.altered(first) or self.altered.get(first)

    def written(self, ref: TensorRef) -> bool:
        """Return whether a forward writes or assigns the tensor that `ref` names."""
        if ref.name in self.effects.written_tensors:
            return True
        return ref.attr in self.code.assigned(ref.owner)

    # -- nodes --------------------------------------------------------------------------------

    def call_sites(self, node: Node) -> tuple[Node, ...]:
        """Return every call that the same layer or the same line of code makes, `node` included.

        A module that is called twice has two; so has a line of a forward that runs twice.
        """
        if node.op == "call_module":
            return self.calls(str(node.target))
        return tuple(n for n in self._index.lines[self._index.positions[node]] if n.op == node.op)

    def readers(self, node: Node) -> Readers:
        """Return who reads the value of `node`, and whether those are all."""
        nodes = tuple(node.users)
        region = self.region_of(node)
        if node in self._index.returned:
            where = region.name or "the model"
            return Readers(nodes, False, f"the value is returned by {where}")
        if (kept := region.kept.get(node)) is not None:
            return Readers(nodes, False, f"the value is kept as {kept}")
        if node.op == "call_module":
            for reason in hook_reasons(self.module(str(node.target))):
                if "hook" in reason:
                    return Readers(nodes, False, f"{node.target} {reason}")
        if region.branches and region.frames[node].owner == region.name:
            names = ", ".join(region.branches)
            where = region.name or "the model"
            return Readers(nodes, False, f"the forward of {where} branches on its argument {names}")
        if (otherwise := self._untaken.reader(region, node)) is not None:
            return Readers(nodes, False, otherwise)
        return Readers(nodes, True)

    def shape(self, node: Node) -> torch.Size | None:
        """Return the shape of the value of `node`, known when example inputs were given."""
        value = node.meta.get("val")
        return value.shape if isinstance(value, torch.Tensor) else None

    # -- tensors ------------------------------------------------------------------------------

    def ref(self, node: Any) -> TensorRef | None:
        """Return the tensor of a module that a `get_attr` node reads; None for anything else."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        if node.target in self.region_of(node).constants:
            return None  # a tensor of the code, which no module holds
        return TensorRef.of(str(node.target))

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """Return the tensor that `ref` names."""
        value = getattr(self.module(ref.owner), ref.attr)
        assert isinstance(value, torch.Tensor), f"{ref.name} is no tensor"
        return value

    def tied(self, ref: TensorRef) -> tuple[TensorRef, ...]:
        """Return every other place that holds the same tensor, or a view of the same storage."""
        if not (shared := self._index.shared):
            return ()
        return tuple(o for o in shared.get(storage_of(self.tensor(ref)), ()) if o != ref)

    def is_fixed(self, node: Node) -> bool:
        """Return whether a `get_attr` node is the same tensor at every call.

        It is not if a forward writes or assigns it, or makes it anew.
        """
        ref = TensorRef.of(str(node.target))
        return ref.name not in self.region_of(node).made and not self.written(ref)

    @cached_property
    def code(self) -> ModelCode:
        """What the code of the model does with its modules, beside calling them."""
        entered = {name for region in self.regions for name in region.entered if region.name == ""}
        called = frozenset(entered | set(self._index.calls) - self._index.roots)
        return ModelCode(self.tree, called, () if self.ran is None else self.ran.uses())

    @cached_property
    def effects(self) -> Effects:
        """What the traced forwards write, and which values share memory."""
        return Effects(self)

    @cached_property
    def lines(self) -> Lines:
        """Which lines of the model's forwards can be edited."""
        return Lines(self)

    @cached_property
    def _untaken(self) -> UntracedBranches:
        return UntracedBranches(self.tree, self.regions)

    @cached_property
    def _index(self) -> Index:
        return Index(self.tree, self.regions, self.opaque)


def _beside_forward(module: nn.Module) -> tuple[str, ...]:
    """Return why a call of a module is more than its forward."""
    reasons = hook_reasons(module)
    if has_parametrizations(module):
        held = cast(nn.ModuleDict, module.parametrizations)
        return (*reasons, f"has a parametrization of {', '.join(held)}")
    if module._forward_pre_hooks and not reasons:
        hook = type(next(iter(module._forward_pre_hooks.values()))).__name__
        return (f"has a parametrization (old-style {hook})",)
    if computed := [(k, how) for k in ("weight", "bias") if (how := _computes(module, k))]:
        return (*reasons, "computes its {} by {}".format(*computed[0]))
    return reasons


def _computes(module: nn.Module, key: str) -> str:
    """Return how a class computes an attribute that torch.nn would look up; "" if it does not."""
    kind = type(module)
    if isinstance(getattr(kind, key, None), property):
        return "a property"
    if kind.__getattribute__ is not nn.Module.__getattribute__:
        return "__getattribute__"
    # A module of TorchScript looks its tensors up in a way of its own.
    own = kind.__getattr__ is not nn.Module.__getattr__
    return "__getattr__" if own and not kind.__module__.startswith("torch.") else ""
