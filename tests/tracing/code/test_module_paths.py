"""Which module an expression of a function's source stands for."""

from __future__ import annotations

import ast

import pytest

from rewrite.tracing.code.module_paths import ModulePaths, Path, called, looked_at


def every_path(expression: str, code: str = "") -> list[Path | None]:
    paths = ModulePaths({"self": ()})
    node = ast.parse(expression, mode="eval").body
    return [paths.of(node) for _ in paths.readings(ast.parse(code))]


def path(expression: str, code: str = "") -> Path | None:
    (only,) = every_path(expression, code)
    return only


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("self.norm", ("norm",)), ("self.blocks[0].norm", ("blocks", "0", "norm")),
        ("self.blocks[i].norm", ("blocks", None, "norm")), ("getattr(self, 'bn')", ("bn",)),
        ("getattr(self, name)", (None,)), ("other.norm", None), ("f(self)", None),
    ],
)  # fmt: skip
def test_expressions(expression: str, wanted: Path | None) -> None:
    assert path(expression) == wanted


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("m = self.norm", ("norm",)), ("a = self.norm\nm = a", ("norm",)),
        ("for m in self.blocks: pass", ("blocks", None)),
        ("for i, m in enumerate(self.blocks): pass", ("blocks", None)),
        ("for a, m in zip(self.convs, self.norms): pass", ("norms", None)),
        ("for k, m in self.heads.items(): pass", ("heads", None)),
        ("for m in self.heads.values(): pass", ("heads", None)),
        ("for m in self.heads.keys(): pass", None), ("m = self.norm(x)", None),
        ("m = self", ()), ("m: object = self.norm", ("norm",)), ("f(m := self.norm)", ("norm",)),
        ("m = n = self.norm", ("norm",)), ("a, m = x, self.norm", ("norm",)),
        ("a, m = self.norm, x", None), ("a, m = self.pair", None),
    ],
)  # fmt: skip
def test_names_that_code_gives(code: str, wanted: Path | None) -> None:
    assert path("m", code) == wanted


def test_a_name_is_read_once_for_each_module_that_it_stands_for() -> None:
    assert every_path("m", "m = self.first\nm = self.second") == [("first",), ("second",)]
    assert every_path("m", "for m in self.a: pass\n[m for m in self.b]") == [
        ("a", None), ("b", None)
    ]  # fmt: skip
    assert every_path("n", "m = self.first\nn = m.x\nm = self.second") == [
        ("first", "x"), ("second", "x")
    ]  # fmt: skip


def test_a_name_without_an_end_is_read_a_few_times() -> None:
    assert 2 < len(every_path("m", "m = self.first\nm = m.next")) < 20


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("type(m)", ("m", False)), ("type(m).__name__", ("m", False)), ("dir(m)", ("m", False)),
        ("isinstance(m, K)", ("m", False)), ("issubclass(type(m), K)", ("m", False)),
        ("str(m)", ("m", True)), ("f'{m}'", ("m", True)), ("m.apply(f)", ("m", True)),
        ("m.modules()", ("m", True)), ("attrgetter('eps')(m)", ("m", True)),
        ("m(x)", None), ("m.str(x)", None), ("apply(m)", None), ("m.weight", None),
    ],
)  # fmt: skip
def test_what_code_looks_at(code: str, wanted: tuple[str, bool] | None) -> None:
    found = [looked for node in ast.walk(ast.parse(code)) if (looked := looked_at(node))]
    spelled = [(ast.unparse(expression), below) for expression, below in found]
    assert spelled[:1] == ([] if wanted is None else [wanted])


def test_what_a_call_calls() -> None:
    names = [
        called(ast.parse(text, mode="eval").body) for text in ("f(x)", "a.b.g(x)", "x", "f()()")
    ]
    assert names == ["f", "g", "", ""]
