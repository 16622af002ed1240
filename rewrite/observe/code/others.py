"""What else than the value an expression may be, and what a name is bound to.

    h = self.other(x) if flag else self.norm(x)      may be another value
    h = given                                        is what the caller gives
    y = self.norm2(x)                                in observed calls, carries the same map

A name that may be the value or another one may be handed on, and may not be given to what computes:
a layer that absorbs a map would absorb it from values that never had it.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence

from rewrite.observe.code.fields import ANYWHERE, COLLECTS, FORM, UnobservedLine, excludes
from rewrite.observe.code.names import FunctionNames, Others
from rewrite.observe.code.state import Other, either
from rewrite.observe.code.syntax import Fixed, Function, given_expressions
from rewrite.tracing.taint import path_of

_NO_VALUE = (
    ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Compare, ast.Lambda, ast.JoinedStr,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Slice,
)  # fmt: skip
"""Constants, and collections: what these hold is known by their fields."""


class OtherValues(FunctionNames):
    """What other values the expressions of one function may be.

    Attributes:
        returned: per call that returns the value, another that it may return instead.
        parts: per part of a tuple or a list, whether it may be the value.
    """

    returned: dict[ast.expr, Other | None]
    parts: dict[ast.expr, bool]

    def other(self, node: ast.expr | None, statement: ast.stmt) -> Other | None:
        """Return another value that an expression may be, beside the one that is followed."""
        if isinstance(node, ast.Constant) and node.value is None:
            return Other(self.at(node), nothing=True)
        if node is None or isinstance(node, _NO_VALUE):
            return None
        if isinstance(node, ast.BinOp) and self.adds_collections(node):
            return None
        if isinstance(node, ast.Name):
            return self._other_of_name(node)
        if isinstance(node, ast.NamedExpr | ast.Starred | ast.Await):
            return self.other(node.value, statement)
        if isinstance(node, ast.IfExp):
            known = self.decided(node.test)
            arms = [node.body] * (known is not False) + [node.orelse] * (known is not True)
            return either(*(self._other_of_arm(arm, statement, len(arms) == 1) for arm in arms))
        if isinstance(node, ast.BoolOp):
            return either(*(self.other(part, statement) for part in node.values))
        if node in self.returned:
            return self.returned[node]
        if self._is_shown(statement):
            return None
        if isinstance(node, ast.Call):
            return self._other_of_call(node, statement)
        if isinstance(node, ast.Attribute | ast.Subscript):
            return self._other_of_part(node, statement)
        return Other(self.at(node))

    def _is_shown(self, statement: ast.stmt) -> bool:
        """Return whether a statement makes values that carry the map, in observed calls."""
        return self.taken(statement) and self.check.moves(self.function.file, statement)

    def _other_of_arm(self, node: ast.expr, statement: ast.stmt, alone: bool) -> Other | None:
        """Return what else one of several ways may be: what its line made, another may have."""
        other = self.other(node, statement)
        if other is not None or alone or self._holds_it(node) or self._is_number(node):
            return other
        return None if isinstance(node, (ast.Name, *_NO_VALUE)) else Other(self.at(node))

    def _holds_it(self, node: ast.expr) -> bool:
        """Return whether an expression is the value, or a part of what a call returned it in."""
        return self.mentions(node) or any(part in self.returned for part in ast.walk(node))

    def _is_number(self, node: ast.expr) -> bool:
        """Return whether an expression asks for the form of something, or calls a builtin."""
        path = path_of(node.func) if isinstance(node, ast.Call) else []
        called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
        asked = node.attr if isinstance(node, ast.Attribute) else called
        return asked in FORM or (len(path) == 1 and hasattr(builtins, path[0]))

    def _other_of_name(self, node: ast.Name) -> Other | None:
        if node.id in self.bound or hasattr(builtins, node.id):
            return self.others.get(node.id)
        return Other(self.at(node))

    def _other_of_call(self, node: ast.Call, statement: ast.stmt) -> Other | None:
        path = path_of(node.func)
        name = path[-1] if path else getattr(node.func, "attr", "")
        if len(path) == 1 and (name[:1].isupper() or name in COLLECTS):
            given = [*node.args, *(k.value for k in node.keywords)]
            return either(*(self.other(g, statement) for g in given if self.may(g)))
        if (len(path) == 1 and hasattr(builtins, name)) or name in FORM:
            return None
        return Other(self.at(node))

    def _other_of_part(
        self, node: ast.Attribute | ast.Subscript, statement: ast.stmt
    ) -> Other | None:
        if isinstance(node, ast.Attribute) and node.attr in FORM:
            return None
        if not self._holds_it(node.value):
            inside = self.other(node.value, statement)
            return inside if inside is not None and inside.given else Other(self.at(node))
        if isinstance(node, ast.Subscript) and self.is_collection(node.value):
            fixed = isinstance(node.slice, ast.Constant | ast.UnaryOp | ast.Slice)
            fields = (
                self.of_name[node.value.id] if isinstance(node.value, ast.Name) else frozenset()
            )
            if not fixed and not self.known_value(node.slice) and ANYWHERE not in (fields or ()):
                return Other(self.at(node))
        return self.other(node.value, statement)

    def check_alone(self, node: ast.expr, statement: ast.stmt) -> None:
        """Refuse an expression that may be the value or another one.

        One that the caller of a model of transformers gives is noted: it has to come from the new
        model.
        """
        other = self.other(node, statement)
        if other is None or (other.nothing and not other.given):
            return
        if other.given:
            self.check.note_given(other.given, self.at(statement))
            return
        raise UnobservedLine(
            f"{self.at(statement)} may read another value, put in its place at {other.place}: "
            f"{ast.unparse(node).splitlines()[0][:60]}"
        )

    def others_in(self, function: Function, call: ast.Call | None, fixed: Fixed) -> Others:
        """Return the parameters of a function that a call may give other values."""
        names = [name for name in function.parameters if name not in dict(fixed)]
        names = names[1:] if names[:1] == ["self"] else names
        place = f"{function.file.rpartition('/')[2]}:{function.node.lineno}"
        if call is None:
            return frozenset((name, Other(place)) for name in names)
        statement = ast.Expr(call, lineno=call.lineno, end_lineno=call.end_lineno, col_offset=0)
        given = given_expressions(function, call)
        spread = [a.value for a in call.args if isinstance(a, ast.Starred)]
        spread += [k.value for k in call.keywords if k.arg is None]
        loose = either(*(self.other(part, statement) for part in spread))
        found = {n: self.other(given[n], statement) if n in given else loose for n in names}
        return frozenset((name, other) for name, other in found.items() if other is not None)

    # -- binding --------------------------------------------------------------------------------

    def bind(
        self,
        target: ast.expr,
        value: ast.expr | None,
        held: bool,
        node: ast.stmt,
        other: Other | None = None,
    ) -> None:
        """Note what a target holds after an assignment of `value`, or of a part of something."""
        if isinstance(target, ast.Name):
            self._bind_name(target, value, held, other)
        elif isinstance(target, ast.Tuple | ast.List):
            self._bind_parts(target, value, held, node, other)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, None, held, node, other)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and held:
            self.names.add(target.value.id)
            self.of_name[target.value.id] = None
        elif held:
            raise UnobservedLine(f"{self.at(node)} keeps it as {ast.unparse(target)}")
        elif isinstance(target, ast.Subscript | ast.Attribute):
            self._check_overwritten(target, value, node)

    def _bind_name(
        self, target: ast.Name, value: ast.expr | None, held: bool, other: Other | None
    ) -> None:
        fields = self.fields_of(value) if value is not None and held else None
        grows = value is target and fields is not None  # by a method that keeps the value
        self.of_name[target.id] = frozenset({ANYWHERE}) if grows else fields
        self.known.pop(target.id, None)
        (self.names.add if held else self.names.discard)(target.id)
        if value is not target:
            self.others.pop(target.id, None)
        if other is not None:
            self.others[target.id] = other

    def _bind_parts(
        self,
        target: ast.Tuple | ast.List,
        value: ast.expr | None,
        held: bool,
        node: ast.stmt,
        other: Other | None,
    ) -> None:
        values: Sequence[ast.expr | None] = [None] * len(target.elts)
        starred = any(isinstance(part, ast.Starred) for part in target.elts)
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) and not starred:
            values = value.elts
        known = value is not None and held and not starred
        fields = self.fields_of(value) if known and value is not None else None
        others = [other if own is None else self.other(own, node) for own in values]
        for place, (part, own) in enumerate(zip(target.elts, values, strict=True)):
            mine = self.parts[own] if own else held and not excludes(fields, str(place))
            kept = others[place] if mine or own else other or Other(self.at(node))
            self.bind(part, own, mine, node, kept)

    def _check_overwritten(
        self, target: ast.Subscript | ast.Attribute, value: ast.expr | None, node: ast.stmt
    ) -> None:
        """Refuse to put another value into what holds the value, on a line that no call took."""
        if self.taken(node) or not self.mentions(target.value) or isinstance(value, ast.Constant):
            return
        key = target.attr if isinstance(target, ast.Attribute) else ANYWHERE
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            key = str(target.slice.value)
        base = target.value
        fields = self.of_name.get(base.id) if isinstance(base, ast.Name) else None
        if not excludes(fields, key):
            self.refuse(node)
