"""Source is found of functions, code objects, classes and lambdas, and nothing is made up."""

import ast
from pathlib import Path

import pytest
from torch import nn

from rewrite.tracing.code.source import functions_in, source_of

ROOT = Path(__file__).parents[3]


class Indented:
    """A class with a method that does not begin at the margin."""

    def forward(self, x):
        return x + 1


PAIR = {
    "one": lambda x: x + 1,
    "other": lambda x, y: x * y,
}
ON_ONE_LINE = (lambda x: x + 1, lambda y: y * 2)  # fmt: skip


def test_a_method_and_its_code_are_the_same_text_from_line_one() -> None:
    wanted = ast.dump(ast.parse("def forward(self, x):\n    return x + 1"))
    for target in (Indented.forward, Indented.forward.__code__):
        tree = source_of(target)
        assert tree is not None and ast.dump(tree) == wanted
        assert tree.body[0].lineno == 1


def test_a_class_is_read_whole() -> None:
    tree = source_of(Indented)
    assert tree is not None and isinstance(tree.body[0], ast.ClassDef)


class Derived(Indented, nn.Identity):
    def backward(self, x):
        return x


def test_functions_of_a_class_come_before_those_of_its_bases() -> None:
    names = [function.name for function in functions_in(Derived, "torch.nn.modules")]
    assert names == ["backward", "forward"]
    names = [function.name for function in functions_in(Derived, "torch.nn.modules.module")]
    assert names == ["backward", "forward", "__init__", "forward"]
    assert functions_in(type("Made", (), {}), "torch") == ()


@pytest.mark.parametrize(("name", "body"), [("one", "x + 1"), ("other", "x * y")])
def test_a_lambda_inside_of_a_statement_is_found_by_its_line_and_arguments(name, body) -> None:
    for target in (PAIR[name], PAIR[name].__code__):
        tree = source_of(target)
        assert tree is not None
        (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        assert ast.unparse(found.body) == body and found.lineno == 1


def test_of_a_whole_statement_every_lambda_is_kept() -> None:
    """The line is a statement: what it holds beside the lambda that was asked for is there, too."""
    tree = source_of(ON_ONE_LINE[0])
    assert tree is not None
    assert sum(isinstance(node, ast.Lambda) for node in ast.walk(tree)) == 2


def test_what_has_no_source_is_none() -> None:
    made: dict[str, object] = {}
    exec("def forward(x):\n    return x", made)
    assert source_of(made["forward"]) is None
    assert source_of(len) is None
    assert source_of(type("Made", (nn.Module,), {})) is None


def test_a_file_that_is_another_one_by_now_is_no_source(tmp_path, monkeypatch) -> None:
    path = tmp_path / "changing.py"
    path.write_text('PAIR = {\n    "one": lambda x: x + 1,\n}\n')
    made: dict[str, object] = {}
    exec(compile(path.read_text(), str(path), "exec"), made)
    path.write_text('PAIR = {\n    "one": lambda x: x + 1,\nx = (\n')
    assert source_of(made["PAIR"]["one"]) is None


def test_nothing_else_reads_the_source_of_a_function() -> None:
    """One reader: what it learns (lambdas inside of statements) holds for all who ask."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py")]
        if "inspect.getsource(" in path.read_text(encoding="utf-8")
    }
    assert readers == {"rewrite/tracing/code/source.py"}
