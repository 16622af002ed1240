"""Read one function: how it uses the modules that its names stand for, besides calling them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType, ModuleType

from rewrite.tracing.code.callees import callees
from rewrite.tracing.code.module_paths import (
    ModulePaths,
    Path,
    called,
    classes_of,
    looked_at,
    only_watches,
    pattern_of,
)
from rewrite.tracing.code.source import source_of
from rewrite.tracing.code.surroundings import Surroundings

_TENSORS = frozenset(
    {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter",
     "get_buffer", "_parameters", "_buffers", "load_state_dict"}
)  # fmt: skip

_READ_ALL = frozenset({"functional_call", "fuse_conv_bn_eval", "fuse_linear_bn_eval"})
"""Functions of torch that read every tensor of the modules that they are given."""

_REFERS = frozenset({"weakref.ref", "ref", "weakref.proxy", "proxy"})
"""What makes another object of a module, through which code may read of it."""

_NAMES_A_VALUE = (ast.Assign, ast.IfExp, ast.Dict, ast.List, ast.Tuple, ast.Return)

_BY_NAME = frozenset({"getattr", "get_submodule"})

_SETS = frozenset({"setattr", "delattr", "__setattr__", "__delattr__"})

_MOVES = frozenset(
    {"append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove", "reverse",
     "rotate", "sort", "clear", "update", "setdefault"}
)  # fmt: skip


@dataclass(frozen=True)
class ModuleUse:
    """One line that uses a module other than by calling it.

    Attributes:
        path: the path of the module below `self`; None where it is a local variable.
        text: the source of the line.
        place: "file.py:123".
        kinds: the classes that a test names.
        keys: of a choice, a glob pattern of the names that it may choose.
        below: whether a test also examines the submodules.
    """

    path: Path | None
    text: str
    place: str
    kinds: tuple[type, ...] = ()
    keys: str = "*"
    below: bool = False


@dataclass(frozen=True)
class Handed:
    """A call of an attribute of `self` that gets modules below `self` as arguments.

    Attributes:
        callee: the path of the called attribute.
        given: the paths of the module arguments, by position or keyword.
        use: the line.
    """

    callee: Path
    given: tuple[tuple[int | str, Path], ...]
    use: ModuleUse


@dataclass
class ClassCode:
    """The uses of submodules in the code of one class.

    Attributes:
        tests, reads, tensors, choices, assigned: uses by kind. The path of a read or an assignment
            ends with the attribute; that of a use of tensors, or of a choice, is a module's.
        calls: the paths of what is called.
        handed: calls of attributes of `self` that get modules as arguments.
        contexts: context managers entered, and decorators of functions that `forward` reaches.
        stores: assignments to attributes, as statements like those in `assigned`.
        moved: calls that mutate a list or dict of modules, whose items may move by that.
        elsewhere: assignments to attributes in methods that `forward` does not reach.
        others: for each public method that `forward` does not reach, the paths that it mentions.
        functions: what was read.
    """

    tests: list[ModuleUse] = field(default_factory=list)
    reads: list[ModuleUse] = field(default_factory=list)
    tensors: list[ModuleUse] = field(default_factory=list)
    choices: list[ModuleUse] = field(default_factory=list)
    assigned: list[ModuleUse] = field(default_factory=list)
    contexts: list[ModuleUse] = field(default_factory=list)
    stores: list[ModuleUse] = field(default_factory=list)
    moved: list[ModuleUse] = field(default_factory=list)
    elsewhere: list[ModuleUse] = field(default_factory=list)
    calls: list[Path] = field(default_factory=list)
    handed: list[Handed] = field(default_factory=list)
    others: dict[str, list[Path]] = field(default_factory=dict)
    functions: list[CodeType] = field(default_factory=list)


def _gets_a_module(node: ast.Call, paths: ModulePaths) -> bool:
    values = (*node.args, *(keyword.value for keyword in node.keywords))
    return paths.of(node.func) is None and any(paths.of(value) is not None for value in values)


def _may_be_own(node: ast.Attribute, paths: ModulePaths, function: FunctionType) -> bool:
    """Return whether an attribute that a function spells may be one of its `self`.

    That of a Python module (`torch.cuda`), of what `self` holds (`self.embed.to(dtype)`) or of
    another value (`x.to(dtype)`, `mask[:, None].to(dtype)`) is none; one of `super()` or of a class
    by name is.
    """
    if (path := paths.of(node.value)) is not None:
        return path == ()
    if isinstance(node.value, ast.Call):
        return called(node.value) in ("super", "type")
    root: ast.expr = node.value
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name) or root.id in function.__code__.co_varnames:
        return False
    held = function.__globals__.get(root.id)
    return root is not node.value or not isinstance(held, ModuleType)


def _container(value: ast.expr) -> ast.expr:
    """Return what `self.norms`, `dict(self.named_children())` and their like are items of."""
    if called(value) == "dict" and isinstance(value, ast.Call) and value.args:
        value = value.args[0]
    if called(value) in ("named_children", "named_modules"):
        value = getattr(getattr(value, "func", value), "value", value)
    return value


class Reader:
    """The analysis of one function.

    Its first parameter is `self`, unless `env` maps its parameters to modules.
    """

    def __init__(
        self, function: FunctionType, env: Mapping[str, Path], found: ClassCode, depth: int = 0
    ) -> None:
        self.words: set[str] = set()
        self._function = function
        self._found = found
        self._depth = depth
        self._file = function.__code__.co_filename.rpartition("/")[2]
        first = dict.fromkeys(function.__code__.co_varnames[:1], ())
        self._paths = ModulePaths(env or first)
        self._tree: ast.AST = ast.Module([], [])
        self._around = Surroundings(self._tree, {})

    def read(self) -> bool:
        """Analyze the function; return whether its source is available."""
        tree = source_of(self._function.__code__)
        if tree is None:
            return False
        self._tree, self._around = tree, Surroundings(tree, self._function.__globals__)
        nodes = list(ast.walk(tree))
        for _ in self._paths.readings(tree):
            for node in nodes:
                self._node(node)
        return True

    def _use(self, node: ast.AST, path: Path | None, kinds: tuple[type, ...] = ()) -> ModuleUse:
        line = self._function.__code__.co_firstlineno + getattr(node, "lineno", 1) - 1
        return ModuleUse(path, ast.unparse(node), f"{self._file}:{line}", kinds)

    def _node(self, node: ast.AST) -> None:
        if (looked := looked_at(node)) is not None:
            self._test(node, *looked)
        if isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Subscript):
            self._subscript(node)
        elif isinstance(node, ast.If | ast.IfExp | ast.Match):
            self._branch(node)
        elif isinstance(node, ast.With) and not only_watches(node):
            self._found.contexts.append(self._use(node.items[0].context_expr, None))
        if isinstance(node, ast.Attribute | ast.Subscript):
            self._attribute(node)

    def _attribute(self, node: ast.Attribute | ast.Subscript) -> None:
        parent = self._around.parents.get(node)
        if isinstance(node, ast.Attribute) and _may_be_own(node, self._paths, self._function):
            self.words.add(node.attr)
        path = self._paths.of(node)
        if path is None:
            return
        if not isinstance(node.ctx, ast.Load):
            self._found.assigned.append(self._use(node, path))
            self._found.stores.append(self._use(node, path))
        elif isinstance(parent, ast.Call) and parent.func is node:
            if path[-1] is not None and path[-1].endswith("_") and len(path) > 1:
                self._found.assigned.append(self._use(parent, path[:-1]))
            self._found.calls.append(path)
            self._found.reads.append(self._use(node, path))
        elif isinstance(node, ast.Attribute):
            self._found.reads.append(self._use(node, path))
            if node.attr in _TENSORS:
                self._found.tensors.append(self._use(node, path[:-1]))

    def _call(self, node: ast.Call) -> None:
        name = called(node)
        first = node.args[0] if node.args else None
        if name in _READ_ALL:
            given = filter(None, map(self._paths.of, node.args))
            self._found.tensors += [self._use(node, path) for path in given]
        elif ast.unparse(node.func) in _REFERS and first is not None:
            if path := self._paths.of(first):
                self._found.reads.append(self._use(node, (*path, None)))
        elif name in _BY_NAME and first is not None:
            self._by_name(node, first)
        elif name in _SETS and len(node.args) > 1 and first is not None:
            self._set(node, first)
        elif name in _MOVES and isinstance(node.func, ast.Attribute):
            if path := self._paths.of(node.func.value):
                self._found.moved.append(self._use(node, path))
        elif name in _TENSORS and isinstance(node.func, ast.Attribute):
            path = self._paths.of(node.func.value)
            if path is not None and not self._around.asks_kind(node):
                self._found.tensors.append(self._use(node, path))
        elif self._depth < 3 and _gets_a_module(node, self._paths):
            for function in callees(node.func, self._tree, self._function.__globals__):
                self._enter(node, function)
        if callee := self._paths.of(node.func):
            self._hand(node, callee)

    def _hand(self, node: ast.Call, callee: Path) -> None:
        """Note a call of an attribute of `self` that gets modules as arguments."""
        named = [*enumerate(node.args), *((k.arg, k.value) for k in node.keywords)]
        paths = ((name, self._paths.of(value)) for name, value in named if name is not None)
        given = tuple((name, path) for name, path in paths if path is not None)
        if given:
            self._found.handed.append(Handed(callee, given, self._use(node, None)))

    def _test(self, node: ast.AST, looked: ast.expr, below: bool) -> None:
        """Note a line that tests what a module is, unless it only builds a message."""
        path = self._paths.of(looked)
        kinds: tuple[type, ...] = ()
        scope = self._function.__globals__
        if isinstance(node, ast.Call) and len(node.args) > 1:
            kinds = classes_of(node.args[1], scope)
        parent = self._around.parents.get(node)
        if called(node) == "type" and isinstance(parent, ast.Compare):
            kinds = tuple(kind for side in parent.comparators for kind in classes_of(side, scope))
        if called(node) in ("modules", "named_modules") and self._around.asks_classes(node):
            return  # those are tests of their own
        if (path is not None or kinds) and not (below and self._around.is_said(node)):
            self._found.tests.append(replace(self._use(node, path, kinds), below=below))

    def _enter(self, node: ast.Call, function: FunctionType) -> None:
        """Read a function that is given a module."""
        if function.__module__.partition(".")[0] == "torch":
            return
        names = function.__code__.co_varnames
        given = {n: self._paths.of(a) for n, a in zip(names, node.args, strict=False)}
        given |= {k.arg: self._paths.of(k.value) for k in node.keywords if k.arg in names}
        env = {name: path for name, path in given.items() if path is not None}
        if env:
            Reader(function, env, self._found, self._depth + 1).read()

    def _by_name(self, node: ast.Call, first: ast.expr) -> None:
        """Note the read of `getattr(self.bn, "eps")` and the choice of `getattr(self, name)`.

        `self.get_submodule(name)` is a choice, too.
        """
        if called(node) == "getattr" and len(node.args) > 1:
            path, key = self._paths.of(first), node.args[1]
        else:
            path, key = self._paths.of(getattr(node.func, "value", first)), first
        if path is None:
            return
        if isinstance(key, ast.Constant):
            if called(node) == "getattr":
                self._found.reads.append(self._use(node, (*path, str(key.value))))
                if key.value in _TENSORS:
                    self._found.tensors.append(self._use(node, path))
        else:
            use = self._use(node, (*path, None))
            self._found.reads.append(use)
            if self._holds_state(key):
                self._found.choices.append(replace(use, keys=pattern_of(key)))

    def _set(self, node: ast.Call, first: ast.expr) -> None:
        """Note `setattr(self.bn, "eps", 1e-3)` as the assignment that it is."""
        key = node.args[1]
        if (path := self._paths.of(first)) is not None:
            attr = str(key.value) if isinstance(key, ast.Constant) else None
            use = self._use(node, (*path, attr))
            self._found.assigned.append(use)
            self._found.stores.append(use)

    def _subscript(self, node: ast.Subscript) -> None:
        if not self._holds_state(node.slice):
            return
        if isinstance(node.value, ast.Dict | ast.List | ast.Tuple):
            self._choose(ast.walk(node.value), self._use(node, None))
            return
        path = self._paths.of(_container(node.value))
        if path and path[-1] in ("_modules", "__dict__"):
            path = path[:-1]
        if path is not None:
            self._found.choices.append(self._use(node, (*path, None)))

    def _branch(self, node: ast.If | ast.IfExp | ast.Match) -> None:
        test = node.subject if isinstance(node, ast.Match) else node.test
        if not self._holds_state(test):
            return
        inside = set(ast.walk(test))
        use = self._use(test, None)
        word = "match" if isinstance(node, ast.Match) else "if"
        parts = [part for part in ast.walk(node) if part not in inside]
        self._choose(parts, replace(use, text=f"{word} {use.text}"))

    def _choose(self, parts: Iterable[ast.AST], use: ModuleUse) -> None:
        """Note every module that `parts` mention as one that the choice `use` may take."""
        for part in parts:
            names = isinstance(self._around.parents.get(part), _NAMES_A_VALUE)
            spelled = part.func if isinstance(part, ast.Call) else part if names else None
            if spelled is not None and (path := self._paths.of(spelled)):
                self._found.choices.append(replace(use, path=path))

    def _holds_state(self, node: ast.AST) -> bool:
        """Return whether `node` reads an attribute of the module itself, which callers may set."""
        return any(self._is_state(part) for part in ast.walk(node))

    def _is_state(self, node: ast.AST) -> bool:
        named = isinstance(node, ast.Attribute | ast.Name)
        path = self._paths.of(node) if named else None
        return path is not None and len(path) == 1 and path[0] != "training"
