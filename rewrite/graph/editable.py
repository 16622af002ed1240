"""A captured model with an editor: passed to `rewrite`, while `find` gets the read-only one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rewrite.graph.captured import Captured
from rewrite.graph.editor import Editor
from rewrite.runtime.tree import join


class Editable(Captured):
    """A captured model that can be edited. `evidence` and it are two views of one state."""

    @classmethod
    def of(cls, captured: Captured) -> Editable:
        """Return a view of `captured` that has an editor."""
        made = object.__new__(cls)
        made.__dict__ = captured.__dict__
        return made

    @property
    def evidence(self) -> Captured:
        """The same model without an editor."""
        made = object.__new__(Captured)
        made.__dict__ = self.__dict__
        return made

    @property
    def editor(self) -> Editor:
        """The one thing that changes the model."""
        held = self.__dict__
        if "_editor" not in held:
            held["_editor"] = Editor(self.evidence)
        return cast(Editor, held["_editor"])

    def keep_stored(self, name: str, module: nn.Module) -> None:
        """Note that the tensors which `module` holds itself stay as they are: none is rounded.

        Args:
            name: the qualified name under which it stands, or is going to stand.
            module: it.
        """
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and not is_lazy(tensor) and tensor.is_floating_point():
                self.keep_exact({join(name, key): partial(Tensor.double, tensor.detach())})

    def keep_exact(self, exact: Mapping[str, Callable[[], Tensor]]) -> None:
        """Note what written tensors are before they are rounded, if somebody is going to ask."""
        if self.exact is not None:
            self.exact |= exact
