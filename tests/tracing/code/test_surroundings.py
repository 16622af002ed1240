"""What the code around a piece of syntax asks for."""

import ast

import pytest
import torch

from rewrite.tracing.code.surroundings import Surroundings


def call(source: str, name: str) -> tuple[Surroundings, ast.Call]:
    """Return the surroundings in `source`, and the call of the method `name` there."""
    tree = ast.parse(source)
    node = next(
        part
        for part in ast.walk(tree)
        if isinstance(part, ast.Call) and getattr(part.func, "attr", "") == name
    )
    return Surroundings(tree, {"nn": torch.nn}), node


@pytest.mark.parametrize(
    ("source", "only"),
    [
        ("for m in self.modules():\n if isinstance(m, nn.Conv2d):\n  m.eval()", True),
        ("for m in self.modules():\n if isinstance(m, nn.Conv2d):\n  pass\n m.eval()", False),
        ("[m.eps for m in self.modules() if isinstance(m, nn.Conv2d)]", True),
        ("[m.eps for m in self.modules()]", False),
        ("for m in self.modules():\n if isinstance(m, unknown):\n  m.eval()", False),
        ("dict(self.modules())", True),
    ],
)
def test_a_loop_looks_at_modules_of_a_class_alone(source: str, only: bool) -> None:
    around, node = call(source, "modules")
    assert around.asks_classes(node) is only


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError(f'{self.extra()}')", True),
        ("assert self.extra()", True),
        ("logger.info('%s', self.extra())", True),
        ("x = self.extra()", False),
    ],
)
def test_a_text_is_only_said(source: str, said: bool) -> None:
    around, node = call(source, "extra")
    assert around.is_said(node) is said


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("next(self.parameters()).dtype", True),
        ("{p.device for p in self.parameters()}", True),
        ("{p.device: p for p in self.parameters()}", False),
        ("sum(p.sum() for p in self.parameters())", False),
        ("next(self.parameters())", False),
    ],
)
def test_a_line_reads_no_more_of_parameters_than_their_kind(source: str, kind: bool) -> None:
    around, node = call(source, "parameters")
    assert around.asks_kind(node) is kind
