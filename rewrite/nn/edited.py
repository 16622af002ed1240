"""A module of the user's own class whose forward is a graph.

    edited = with_forward(type(module), graph)      a subclass: methods, properties and state stay
    module.__class__ = edited

The generated forward reads `self.training` where the original did, so it follows the mode.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from torch.fx import Graph
from torch.fx.graph_module import _forward_from_src


class EditedForward:
    """What an edited class has beside the class that it extends.

    Attributes:
        graph: what its forward computes; targets are names below the module.
        code: the forward as text.
    """

    graph: Graph
    code: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy of the same class."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        state = copy.deepcopy(vars(self), memo)
        vars(made).update(state)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Write the class as the one that it extends, and the graph."""
        kind = cast("type[nn.Module]", type(self))
        return restore, (original_class(kind), self.graph), dict(vars(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Write the class as the one that it extends, and the graph."""
        return self.__reduce__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a module from a file."""
        vars(self).update(state)


def with_forward(kind: type[nn.Module], graph: Graph) -> type[nn.Module]:
    """Return a subclass of `kind`, of the same name, whose forward is what `graph` computes."""
    kind = original_class(kind)
    code = graph.python_code("self")
    forward = _forward_from_src(code.src, code.globals)
    forward.__qualname__ = f"{kind.__qualname__}.forward"
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "forward": forward,
        "graph": graph,
        "code": code.src,
    }
    return cast("type[nn.Module]", type(kind.__name__, (EditedForward, kind), namespace))


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that an edited one extends, or `kind` itself."""
    if issubclass(kind, EditedForward):
        return cast("type[nn.Module]", kind.__mro__[2])
    return kind


def restore(kind: type[nn.Module], graph: Graph) -> nn.Module:
    """Return an empty module of `kind` with another forward; its state follows."""
    return object.__new__(with_forward(kind, graph))
