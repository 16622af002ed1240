"""Tracing proxies that know the shape, or the Python value, of their node.

A proxy of torch.fx does not know the length of an axis. With example inputs each node has the shape
of its value, so sizes, comparisons of sizes and numbers of axes are known exactly. Where a forward
needs such a number itself (a branch, a loop, a new tensor), it gets it, and the tracer notes the
line.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute, TraceError

from rewrite.tracing.code.functions_run import unnoted

_ASSIGNED = frozenset({"data", "grad", "requires_grad"})

AUGMENTED = {
    f"__i{name.strip('_')}__": getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor",
                 "lshift", "rshift")
}  # fmt: skip
"""By method, what is recorded of `x += y`, `operator.iadd(x, y)` and `x.__iadd__(y)`: `x + y`.

A tensor has no `__imatmul__`: `x @= y` writes nothing.
"""


class ValueProxy(Proxy):
    """A proxy that converts to a Python number where its value is known."""

    tracer: Any

    __torch_function__: Any = classmethod(unnoted(cast(Any, Proxy.__torch_function__).__func__))

    def __getattr__(self, name: str) -> Any:
        """Return the attribute as a proxy; no node is made before it is used."""
        return ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise on an assignment to an attribute (`x.data = …`), which the graph would lose."""
        if name in _ASSIGNED:
            raise TraceError(f"assigns .{name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Record `x[key] = value` as a call of `operator.setitem`."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __int__(self) -> int:
        """Return the number, where it is known."""
        return int(self.tracer.number(self))

    def __index__(self) -> int:
        """Return the number, where it is known."""
        return operator.index(self.tracer.number(self))

    def __float__(self) -> float:
        """Return the number, where it is known."""
        return float(self.tracer.number(self))

    def __len__(self) -> int:
        """Return the length, where it is known."""
        return int(self.tracer.length(self))


def _assignment(name: str) -> Callable[[ValueProxy, Any], Proxy]:
    def assign(self: ValueProxy, other: Any) -> Proxy:
        found: Proxy = self.tracer.create_proxy("call_method", name, (self, other), {})
        return found

    return assign


for _name in AUGMENTED:
    setattr(ValueProxy, _name, _assignment(_name))


class ValueAttribute(Attribute, ValueProxy):
    """An attribute of a proxy: a method to be called, or a value such as a shape."""


def nodes_of(value: Any) -> Iterator[Node]:
    """Yield the nodes in a value; an attribute that was not used yet has none."""
    for proxy in proxies_in(value):
        if not isinstance(proxy, ValueAttribute) or proxy._node is not None:
            yield proxy.node


def proxies_in(value: Any, depth: int = 4) -> Iterator[Proxy]:
    """Yield the proxies in a value, at most `depth` containers deep."""
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from proxies_in(item, depth - 1)
