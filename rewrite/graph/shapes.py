"""The shape of every value, by running the model on fake tensors: nothing is computed.

The model runs once as it is, with fake inputs, so that opaque forwards are run too; the inputs of
each region's root are noted on the way, and each region's graph is then interpreted on them. What
cannot be run on fake tensors (control flow on values) leaves its nodes without a shape.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn.parameter import is_lazy

from rewrite.graph.captured import Captured
from rewrite.graph.regions import Region
from rewrite.graph.tracer import reason_of
from rewrite.runtime.inputs import Inputs

_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm})


def propagate_shapes(captured: Captured, inputs: Inputs) -> None:
    """Attach `meta["val"]`, a fake tensor (or what else the value is), to the nodes.

    A lazy layer would take its shape from the fake tensors for good: then nothing is attached.
    """
    held = chain(captured.model.parameters(), captured.model.buffers())
    if any(is_lazy(tensor) for tensor in held):
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with mode, torch.no_grad():
        arguments = _run(captured, inputs.map(fake))
        for region in captured.regions:
            if region.name in arguments:
                _interpret(captured, region, *arguments[region.name])


def _run(captured: Captured, inputs: Inputs) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the inputs of each region's root: those of the model are given, the rest observed."""
    arguments: dict[str, tuple[Any, dict[str, Any]]] = {"": (inputs.args, dict(inputs.kwargs))}
    roots = [region.name for region in captured.regions if region.name]
    if not roots:
        return arguments

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            arguments.setdefault(name, (args, kwargs))

        return hook

    handles = [
        captured.module(name).register_forward_pre_hook(note(name), with_kwargs=True)
        for name in roots
    ]
    try:
        captured.model(*inputs.args, **inputs.kwargs)
    except Exception as error:  # noqa: BLE001 - a forward may do anything with fake tensors
        captured.shape_error = reason_of(error)[0]
    finally:
        for handle in handles:
            handle.remove()
    return arguments


def _interpret(
    captured: Captured, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    values: dict[Node, Any] = {}
    left = list(args)

    def load(argument: Any) -> Any:
        return map_arg(argument, lambda node: values[node])

    for node in region.graph.nodes:
        if node.op == "output":
            return
        try:
            if node.op == "placeholder":
                name = str(node.target)
                default = node.args[0] if node.args else None
                if name.startswith("*"):
                    value: Any = tuple(left)
                else:
                    value = left.pop(0) if left else kwargs.get(name, default)
            elif node.op == "get_attr":
                value = _attribute(captured, region, str(node.target))
            elif node.op == "call_module" and _keeps_shape(captured, str(node.target)):
                value = values[node.all_input_nodes[0]]
            elif node.op == "call_module":
                value = captured.module(str(node.target))(*load(node.args), **load(node.kwargs))
            elif node.op == "call_method":
                subject, *rest = load(node.args)
                value = getattr(subject, str(node.target))(*rest, **load(node.kwargs))
            else:
                assert callable(node.target)
                value = node.target(*load(node.args), **load(node.kwargs))
        except Exception as error:  # noqa: BLE001 - likewise; its users have no shape either
            captured.shape_error = captured.shape_error or f"{node}: {reason_of(error)[0]}"
            continue
        values[node] = value
        node.meta["val"] = map_aggregate(value, lambda item: item)


def _keeps_shape(captured: Captured, name: str) -> bool:
    """Say whether a module returns what it is given but for the numbers.

    Fake tensors decompose every batch norm, which took most of the time of a ResNet-50.
    """
    return type(captured.module(name)) in _NORMS and not captured.hooks(name)


def _attribute(captured: Captured, region: Region, name: str) -> Any:
    if name in region.constants:
        return region.constants[name]
    owner, _, attr = name.rpartition(".")
    return getattr(captured.module(owner), attr)
