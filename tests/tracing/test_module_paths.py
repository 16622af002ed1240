"""Which module an expression of a function's source stands for."""

from __future__ import annotations

import ast

import pytest

from rewrite.tracing.module_paths import ModulePaths, Path, called


def path(expression: str, code: str = "") -> Path | None:
    paths = ModulePaths({"self": ()})
    paths.learn(ast.parse(code))
    return paths.of(ast.parse(expression, mode="eval").body)


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


def test_a_name_keeps_the_first_module_that_it_is_given() -> None:
    assert path("m", "m = self.first\nm = self.second") == ("first",)


def test_what_a_call_calls() -> None:
    names = [
        called(ast.parse(text, mode="eval").body) for text in ("f(x)", "a.b.g(x)", "x", "f()()")
    ]
    assert names == ["f", "g", "", ""]
