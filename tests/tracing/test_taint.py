"""Which names of a function depend on its tainted arguments, and what code they choose."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest

from rewrite.tracing.taint import TaintAnalysis, is_super, path_of


def analysis(body: str, *tainted: str, ignored: frozenset[str] = frozenset()) -> TaintAnalysis:
    code = ast.parse(
        f"def f(self, x, mask=None):\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    )
    return TaintAnalysis(code, frozenset(tainted or ("mask",)), ignored=ignored)


def chosen(body: str, *tainted: str, ignored: frozenset[str] = frozenset()) -> set[str]:
    parts = analysis(body, *tainted, ignored=ignored).chosen
    return {"anything" if part is None else ast.unparse(part) for part in parts}


def test_the_first_parameter_is_named() -> None:
    assert analysis("return x").first == "self"


@pytest.mark.parametrize(
    "body",
    [
        "if mask is not None:\n    y = self.a(x)",
        "y = self.a(x) if mask is not None else x",
        "while mask:\n    y = self.a(x)",
        "for m in mask:\n    y = self.a(x)",
        "n = mask\nif n is None:\n    y = self.a(x)",
        "n = bool(mask)\nif n:\n    y = self.a(x)",
        "n = mask.any()\nif n:\n    y = self.a(x)",
        "if (n := mask) is None:\n    y = self.a(x)",
        "match mask:\n    case None:\n        y = self.a(x)",
        "y = [self.a(v) for v in mask]",
        "y = mask and self.a(x)",
    ],
)
def test_code_that_runs_or_not_by_a_tainted_name_is_chosen(body: str) -> None:
    assert any("self.a(" in part for part in chosen(body)), chosen(body)


@pytest.mark.parametrize(
    "body",
    [
        "y = self.a(x)",
        "if x is not None:\n    y = self.a(x)",
        "n = self.b(mask)\nif n:\n    y = self.a(x)",  # what a call returns is not tainted
        "assert mask is None\ny = self.a(x)",
        "if mask is None:\n    raise ValueError('self.a(')\ny = self.a(x)",
        "mask = mask if mask is not None else 3\ny = self.a(x)",
        "if mask is None:\n    mask = 3\ny = self.a(x)",
    ],
)
def test_code_that_runs_whatever_the_argument_is_not_chosen(body: str) -> None:
    assert not any("self.a(" in part for part in chosen(body)), chosen(body)


def test_filling_in_an_argument_chooses_nothing() -> None:
    assert chosen("mask = mask if mask is not None else 3") == set()
    assert chosen("other = mask if mask is not None else self.a") == {"mask", "self.a"}


def test_an_ignored_attribute_says_nothing_of_the_value() -> None:
    body = "if mask.shape[0] > 2:\n    y = self.a(x)"
    assert any("self.a(" in part for part in chosen(body))
    assert chosen(body, ignored=frozenset({"shape"})) == set()


def test_a_computed_attribute_name_may_be_anything() -> None:
    assert "anything" in chosen("y = getattr(self, mask)(x)")
    assert "anything" not in chosen("y = getattr(self, 'a')(x)")


def test_a_tainted_index_chooses_from_what_it_is_an_index_of() -> None:
    assert "self.layers" in chosen("y = self.layers[mask](x)")
    assert chosen("y = self.layers[0](x)") == set()


def test_what_the_chosen_code_names_is_followed_to_what_it_was_assigned() -> None:
    assert "self.block.conv" in chosen("conv = self.block.conv\nif mask:\n    y = conv(x)")
    assert chosen("conv = self.block.conv\ny = conv(x)") == set()
    assert not any(
        "self.b" in part for part in chosen("y = self.b(x)\nif mask:\n    z = self.a(y)")
    )


def test_calls_that_are_given_a_tainted_value_are_listed() -> None:
    found = analysis("a = self.a(x, mask)\nb = self.b(x)\nc = self.c(x, m=mask + 1)\nd = self.d(a)")
    assert {ast.unparse(call.func) for call in found.calls} == {"self.a", "self.c"}


def test_parameters_that_get_a_tainted_value_are_found_by_place_and_by_name() -> None:
    def callee(
        self: object, x: int, m: int = 0, *rest: int, flag: int = 0, **more: int
    ) -> None: ...

    def given(text: str) -> frozenset[str]:
        found = analysis(f"y = self.callee({text})")
        (call,) = [c for c in ast.walk(found._code) if isinstance(c, ast.Call)]
        return found.given(call, callee, 1)

    assert inspect.isfunction(callee)
    assert given("x, mask") == {"m"} and given("mask, x") == {"x"}
    assert given("x, flag=mask") == {"flag"} and given("x, other=mask") == {"rest", "more"}
    assert given("x, 1, 2, mask") == {"rest", "more"}
    assert given("*mask") == {"x", "m", "rest", "flag", "more"}
    assert given("x, **mask") == {"m", "flag", "rest", "more"} and given("x, 1") == frozenset()


def test_a_comparison_with_none_is_listed_with_what_it_chooses() -> None:
    found = analysis("if mask is not None:\n    y = self.a(x)\nif mask > 2:\n    y = self.b(x)")
    names, code = found.by_none({"mask", "x"})
    assert names == {"mask"}
    texts = {ast.unparse(part) for part in code}
    assert "y = self.a(x)" in texts and "y = self.b(x)" not in texts


def test_a_check_that_only_raises_is_no_choice() -> None:
    assert analysis("if mask is None:\n    raise ValueError").by_none({"mask"}) == (set(), [])


def expression(text: str) -> ast.AST:
    return ast.parse(text, mode="eval").body


def test_paths_are_those_of_names_alone() -> None:
    assert path_of(expression("self.block.conv")) == ["self", "block", "conv"]
    assert path_of(expression("self.block[0].conv")) == []
    assert path_of(expression("make().conv")) == []


def test_a_method_of_super_is_told_from_one_of_self() -> None:
    assert is_super(expression("super().forward")) and not is_super(expression("self.forward"))
    assert not is_super(expression("base().forward"))
