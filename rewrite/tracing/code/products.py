"""Find tensors of `self` that the code of a class uses as the matrix of a product.

    x @ self.w, F.linear(x, self.w), torch.einsum("ni,io->no", x, self.w)     self.w is a matrix
    x * self.w, F.linear(self.w, v), torch.einsum("ni,i->ni", x, self.w)      it is not
    torch.baddbmm(self.b, x, self.w)                                          self.w is, self.b not

Used for forwards that cannot be traced. A local name computed from `self.w` (`v = self.w.t()`)
stands for it.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from rewrite.tracing.code.source import functions_in


def writes_product(kind: type, key: str, products: frozenset[str]) -> bool:
    """Return whether a method of `kind` uses `self.key` as the matrix of a product.

    Args:
        kind: the class of a module; its bases are read too.
        key: the attribute.
        products: names of the functions that multiply and sum.
    """
    methods = (f for f in functions_in(kind, "torch.nn.modules.module") if f.name != "__init__")
    return any(_writes_product(method, key, products) for method in methods)


def sums_over(equation: str, place: int) -> bool:
    """Return whether einsum contracts an axis of operand number `place` with another operand.

    An operand without such an axis only scales; an axis of its own is summed by itself.
    """
    inputs, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    operands = inputs.split(",")
    if "->" not in equation:
        output = "".join(axis for axis in inputs if inputs.count(axis) == 1)
    if place >= len(operands):
        return True
    others = "".join(operands[:place] + operands[place + 1 :])
    return any(axis in others and axis not in output for axis in operands[place])


def _writes_product(function: ast.FunctionDef, key: str, products: frozenset[str]) -> bool:
    arguments = (*function.args.posonlyargs, *function.args.args)
    owner = arguments[0].arg if arguments else "self"
    names: set[str] = set()

    def mentions(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == key:
            return isinstance(node.value, ast.Name) and node.value.id == owner
        if isinstance(node, ast.Name):
            return node.id in names
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and mentions(node.func.value)
        return isinstance(node, ast.Attribute | ast.Subscript) and mentions(node.value)

    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and mentions(node.value):
            names |= {n.id for target in node.targets for n in ast.walk(target)
                      if isinstance(n, ast.Name) and n.id != owner}  # fmt: skip
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            if mentions(node.left) or mentions(node.right):
                return True
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in products and any(map(mentions, _factors(node, called))):
                return True
    return False


def _factors(call: ast.Call, called: str) -> Sequence[ast.expr]:
    """Return the arguments of a product that can be its matrix."""
    named = [keyword.value for keyword in call.keywords if keyword.arg in ("weight", "other")]
    if called == "linear" or called.startswith("conv"):
        return [*call.args[1:2], *named]
    equation: Any = getattr(call.args[0], "value", None) if call.args else None
    if called == "einsum" and isinstance(equation, str):
        return [one for place, one in enumerate(call.args[1:]) if sums_over(equation, place)]
    if called in ("addmm", "baddbmm"):
        return [*call.args[1:], *(k.value for k in call.keywords if k.arg != "input")]
    return [*call.args, *named]
