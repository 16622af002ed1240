"""One example call as a graph: `torch.export` of a stand-in, whose modules are copies.

    call  ->  aten graph; each node knows its module (nn_module_stack) and its lines (stack_trace)

The stand-in shares every tensor's storage with the model and nothing else: whatever the forward
assigns lands on it. Inputs and outputs may be any objects that carry tensors (a cache): tensors go
in and come out as a flat list, by their paths.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from rewrite.errors import CaptureError, one_line
from rewrite.hub.experts import plain_experts
from rewrite.observe.spellings import op_name
from rewrite.runtime.copying import copy_model
from rewrite.runtime.inputs import ExampleCall
from rewrite.runtime.leaves import leaves, tensors
from rewrite.runtime.quiet import quiet

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_SLICE = re.compile(r"\.slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)\.(\d+)")
_INNER = "model"
_COMPUTED = "bitsandbytes."
_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class CodeLine:
    """A line of code that ran: its file, its number, and the name of its function."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file.rpartition('/')[2]}:{self.number}"


@dataclass(eq=False)
class ObservedCall:
    """One exported call.

    Attributes:
        call: what the model got.
        graph: of aten operators; parameters and buffers are placeholders.
        tensors: per placeholder, the qualified name of the parameter or buffer that it stands for.
        outputs: per returned node, the paths under which the call returned it.
        ran: the qualified names of the modules whose forward ran.
        stacks: the lines that made each node or called each module, the outermost first.
        sizes: how many items each list of modules holds, by its name.
    """

    call: ExampleCall
    graph: Graph
    tensors: dict[Node, str]
    outputs: dict[Node, list[str]]
    ran: frozenset[str]
    stacks: frozenset[tuple[CodeLine, ...]] = field(default=frozenset(), repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False)
    _stacks: dict[Node, tuple[CodeLine, ...]] = field(default_factory=dict, repr=False)

    def owner(self, node: Node) -> str:
        """Return the qualified name of the innermost module whose forward made the call."""
        owners = self.owners(node)
        return owners[-1] if owners else ""

    def owners(self, node: Node) -> tuple[str, ...]:
        """Return the modules around the call, the outermost first."""
        stack = node.meta.get("nn_module_stack") or {}
        names = [str(path).split("@")[0] for path, _ in stack.values()]
        inner = [n.removeprefix(_INNER).removeprefix(".") for n in names if n.startswith(_INNER)]
        return tuple(dict.fromkeys(map(self._unsliced, inner)))

    def _unsliced(self, name: str) -> str:
        """Return the name of a module by its own place in a list of which a forward took a slice.

        An export calls it `layers.slice(1, None, None).0`.
        """
        while match := _SLICE.search(name):
            holder = name[: match.start()]
            cut = slice(*(None if n == "None" else int(n) for n in match.groups()[:3]))
            place = range(self.sizes[holder])[cut][int(match[4])]
            name = f"{holder}.{place}{name[match.end() :]}"
        return name

    def stack(self, node: Node) -> tuple[CodeLine, ...]:
        """Return the lines that made the call, the outermost first."""
        if node not in self._stacks:
            self._stacks[node] = _lines(node.meta.get("stack_trace"))
        return self._stacks[node]

    def called(self, node: Node) -> str:
        """Return a call in words: its operator, its module, and its line."""
        stack = self.stack(node)
        where = self.owner(node) or "the model"
        return f"{op_name(node)} in {where}" + (f" ({stack[-1]})" if stack else "")

    def placeholders(self, name: str) -> list[Node]:
        """Return the placeholders of one tensor."""
        return [node for node, tensor in self.tensors.items() if tensor == name]


def export_call(model: nn.Module, call: ExampleCall) -> ObservedCall:
    """Return the graph of one call; the model is neither changed nor run.

    Raises:
        CaptureError: the call cannot be exported; the line of the model's code is named.
    """
    _check_packed(model)
    standin = standin_of(model)
    flat = _Flat(standin, call)
    ran, stacks = set[str](), set[tuple[CodeLine, ...]]()
    given = tuple(tensors([call.inputs.args, dict(call.inputs.kwargs)]))
    with _watched(standin, ran, stacks), _whole_stacks(), quiet():
        try:
            program = torch.export.export(flat, given, strict=False)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be exported on {call.name}: {_where(error)}"
            ) from error
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = {
        placeholders[key]: name.removeprefix(f"{_INNER}.")
        for key, name in named.items()
        if key in placeholders
    }
    outputs: dict[Node, list[str]] = {}
    returned = next(node for node in program.graph.nodes if node.op == "output")
    values = tree_leaves(returned.args[0])
    for path, value in zip(flat.returned.paths, values, strict=True):
        if isinstance(value, Node):
            outputs.setdefault(value, []).append(path)
    observed = ObservedCall(
        call, program.graph, found, outputs, frozenset(ran), sizes=_sizes(standin)
    )
    made = {observed.stack(node) for node in program.graph.nodes}
    observed.stacks = frozenset(stacks | made)
    return observed


def standin_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model to run in its stead: in eval mode, in code that can be exported."""
    standin = copy_model(model).eval()
    for module in standin.modules():
        if isinstance(module, OptimizedModule):  # of torch.compile: what it compiles is exported
            vars(module)["forward"] = module._orig_mod.__call__
        elif type(module).__module__.startswith(_COMPUTED):
            vars(module)["forward"] = functools.partial(_of_a_computed_weight, module)
    for parameter in standin.parameters():
        # Where no gradient is wanted, torch.nn's blocks take fused paths that say nothing.
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain_experts(standin)


def _of_a_computed_weight(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what has the shape of a quantized layer's output: its kernels know no fake tensors.

    The weight is made of the packed one, so that whoever reads the graph takes it for computed.
    """
    layer: Any = module
    weight = layer.weight.to(x.dtype).sum().expand(layer.out_features, layer.in_features)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return nn.functional.linear(x, weight, bias)


def _check_packed(model: nn.Module) -> None:
    """Refuse layers whose weights are packed into an object that no export reads.

    Raises:
        CaptureError: there is one; it is named.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_PACKED):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise CaptureError(
                f"{name} is quantized ({kind}): its weight is packed, and nothing can be "
                "multiplied into it; fold first, and quantize then"
            )


class _Returned:
    """Where the tensors that a call returned stand in what the model returned.

    An object, not a list: an export puts the containers of a module back to what they held.
    """

    paths: list[str]


class _Flat(nn.Module):
    """A model that takes and returns flat lists of tensors."""

    def __init__(self, model: nn.Module, call: ExampleCall) -> None:
        super().__init__()
        self.model = model
        self._call = call
        self.returned = _Returned()

    def forward(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """Call the model with the given tensors in the places of the example's."""
        inputs = self._call.inputs
        held = tensors([inputs.args, dict(inputs.kwargs)])
        memo = {id(old): new for old, new in zip(held, given, strict=True)}
        args, kwargs = copy.deepcopy((inputs.args, dict(inputs.kwargs)), memo)
        output = self.model(*args, **kwargs)
        named = [(p, leaf) for p, leaf in leaves(output) if isinstance(leaf, torch.Tensor)]
        self.returned.paths = [path for path, _ in named]
        return [leaf for _, leaf in named]


@contextlib.contextmanager
def _watched(model: nn.Module, ran: set[str], stacks: set[tuple[CodeLine, ...]]) -> Iterator[None]:
    """Note which modules run, and the lines that call them, the outermost first."""

    def watch(name: str) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            ran.add(name)
            frame: FrameType | None = sys._getframe(1)
            stack = []
            while frame is not None and frame.f_code.co_filename != __file__:
                code = frame.f_code
                if not in_torch(code.co_filename):
                    stack.append(CodeLine(code.co_filename, frame.f_lineno, code.co_name))
                frame = frame.f_back
            stacks.add(tuple(reversed(stack)))

        return before

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True, prepend=True)
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(model: nn.Module) -> dict[str, int]:
    """Return how many items each list of modules holds, by each of its names."""
    lists = model.named_modules(remove_duplicate=False)
    return {n: len(m) for n, m in lists if isinstance(m, nn.ModuleList | nn.Sequential)}


class _OutsideTorch:
    """Every line of code that is not torch's, as a set of (file, function)."""

    def __contains__(self, place: tuple[str, str]) -> bool:
        return not in_torch(place[0])


@contextlib.contextmanager
def _whole_stacks() -> Iterator[None]:
    """Export with gradients, and let nodes know every frame of a model's code.

    By itself an export keeps the frames of functions called "forward" and leaves out the helpers
    that these call.
    """
    kept = getattr(torch.fx.proxy, "_STACK_TRACE_ANCHORS", None)
    if kept is not None:
        vars(torch.fx.proxy)["_STACK_TRACE_ANCHORS"] = _OutsideTorch()
    try:
        with torch.enable_grad():
            yield
    finally:
        if kept is not None:
            vars(torch.fx.proxy)["_STACK_TRACE_ANCHORS"] = kept


def in_torch(file: str) -> bool:
    """Return whether a file of code is torch's own."""
    return file.startswith(_TORCH)


def _lines(text: str | None) -> tuple[CodeLine, ...]:
    found = [
        CodeLine(match["file"], int(match["line"]), match["function"])
        for match in _FRAME.finditer(text or "")
    ]
    start = max((i + 1 for i, line in enumerate(found) if line.file == __file__), default=0)
    return tuple(found[start:])


def _where(error: BaseException) -> str:
    """Return what an export says of its failure, with the innermost line outside of torch."""
    import traceback

    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    line = f" ({outside[-1].filename.rpartition('/')[2]}:{outside[-1].lineno})" if outside else ""
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"what it computes there depends on values of tensors{line}"
    return one_line(error) + line
