"""The state of the source tree in numbers, beside that of another tree if one is given.

    python -m benchmarks.house [OTHER_TREE]

A floor is a place in the order of imports: what imports nothing of the project stands on the first,
everything else one above the highest of what it imports. Imports inside functions count, those for
type checkers alone do not; an import circle is one floor. Functions are counted without docstrings.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

Graph = dict[str, set[str]]


@dataclass(frozen=True)
class House:
    """One tree: its modules by name, with their syntax and what they import."""

    trees: Mapping[str, ast.Module]
    imports: Graph

    @classmethod
    def of(cls, root: Path) -> House:
        """Read the packages `rewrite` and `passes` of a tree."""
        files = [file for part in ("rewrite", "passes") for file in (root / part).rglob("*.py")]
        trees = {module_name(root, file): ast.parse(file.read_text("utf-8")) for file in files}
        return cls(trees, {name: set(imported(name, trees)) for name in trees})

    def packages(self) -> Graph:
        """Return what each package imports of others; what stands in `rewrite/` is one each."""
        found: Graph = {}
        for name, used in self.imports.items():
            own = found.setdefault(package(name), set())
            own.update(package(other) for other in used if package(other) != package(name))
        return found


def module_name(root: Path, file: Path) -> str:
    """Return the dotted name of a module."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def package(name: str) -> str:
    """Return the package below `rewrite` that holds a module, or `passes`."""
    return "passes" if name.startswith("passes") else ".".join(name.split(".")[:2])


def imported(name: str, known: Mapping[str, ast.Module]) -> Iterator[str]:
    """Yield the modules of `known` that one of them imports at run time."""
    pending: list[ast.AST] = [known[name]]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            deeper = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [other if other in known else node.module for other in deeper]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (other for other in names if other in known and other != name)


def circles(graph: Graph) -> list[set[str]]:
    """Return the sets of names that import each other, directly or not."""
    reached: Graph = {}
    for start in graph:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = graph.get(pending.pop(), set()) - seen
            seen |= new
            pending += new
        reached[start] = seen
    found: list[set[str]] = []
    for name in graph:
        circle = {other for other in reached[name] if name in reached.get(other, ())}
        if circle and circle not in found:
            found.append(circle)
    return found


def floors(graph: Graph) -> int:
    """Return how many floors a graph of imports has; a circle is one place."""
    place = {name: name for name in graph}
    for circle in circles(graph):
        place.update(dict.fromkeys(circle, min(circle)))
    joined: Graph = {place[name]: set() for name in graph}
    for name, used in graph.items():
        joined[place[name]] |= {place[o] for o in used if o in place} - {place[name]}
    floor: dict[str, int] = {}
    for name in TopologicalSorter(joined).static_order():
        floor[name] = 1 + max((floor[other] for other in joined[name]), default=0)
    return max(floor.values(), default=0)


def lengths(trees: Collection[ast.Module], kind: type[ast.AST]) -> list[int]:
    """Return the lines of every definition of a kind, of functions without their docstrings."""
    found = []
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)):
        begin = getattr(node, "lineno", 0)
        if isinstance(node, ast.FunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            begin = first.lineno
        found.append((getattr(node, "end_lineno", 0) or 0) - begin + 1)
    return found


def measured(root: Path) -> dict[str, int]:
    """Return the numbers of one tree, by what they count."""
    house = House.of(root)
    files = [file for part in ("rewrite", "passes") for file in (root / part).rglob("*.py")]
    # passes/ is a catalog of one kind.
    folders = Counter(f.parent for f in files if "__" not in f.name and f.parent != root / "passes")
    sizes = [len(file.read_text("utf-8").splitlines()) for file in files]
    trees = list(house.trees.values())
    return {
        "files": len(house.trees),
        "folders": len({file.parent for file in files}),
        "files in the largest folder": max(folders.values()),
        "floors of imports, by package": floors(house.packages()),
        "floors of imports, by file": floors(house.imports),
        "import circles between files": len(circles(house.imports)),
        "import circles between packages": len(circles(house.packages())),
        "longest class": max(lengths(trees, ast.ClassDef)),
        "longest function": max(lengths(trees, ast.FunctionDef)),
        "files over 400 lines": sum(size > 400 for size in sizes),
    }


def main() -> None:
    """Print the numbers of this tree, and of the other one before it."""
    roots = [*map(Path, sys.argv[1:2]), Path(__file__).parent.parent]
    columns = [measured(root) for root in roots]
    for what in columns[0]:
        print(f"{what:34}" + "".join(f"{numbers[what]:>8}" for numbers in columns))


if __name__ == "__main__":
    main()
