"""What is known of an operator of an exported call is a row of `rewrite.graph.traits`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from rewrite.graph.spellings import CONVS, LINEARS, NORMS, plain_name
from rewrite.graph.traits import EXPORTED, OPERATIONS, Trait, spelled
from rewrite.observe import norms, reductions
from rewrite.observe.spellings import FORM, MOVES, SAME, SCALES, is_active_dropout, op_name
from rewrite.weights import parameter_roles

ROOT = Path(__file__).parents[2] / "rewrite"
ROWS = {spelling: row for row in (*OPERATIONS, *EXPORTED) for spelling in row.spellings}
LAYERS = {plain_name(target) for target in (*NORMS, *CONVS, *LINEARS)}
NO_OPERATORS = {"output", "placeholder", "arange", "zeros", "full", "scalar_tensor"}
"""Kinds of nodes, and what makes a value of none."""

ASKED = {"name", "op_name", "function_name"}


def compared(path: Path) -> Iterator[str]:
    """Yield every name that a module compares the name of an operator with."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Compare):
            continue
        left = node.left.func if isinstance(node.left, ast.Call) else node.left
        if isinstance(left, ast.Name) and left.id in ASKED:
            for side in node.comparators:
                yield from (
                    part.value
                    for part in ast.walk(side)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )


MODULES = [
    *sorted((ROOT / "observe").glob("*.py")),
    ROOT / "streams" / "values.py", ROOT / "streams" / "layers.py", ROOT / "streams" / "norms.py",
    ROOT / "weights" / "parameter_roles.py",
]  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_operator_that_is_asked_for_is_a_row_of_the_table(path: Path) -> None:
    assert not set(compared(path)) - set(ROWS) - LAYERS - NO_OPERATORS


def test_the_comparisons_are_found() -> None:
    assert {"t", "numpy_T", "permute"} <= set(compared(ROOT / "observe" / "weight_axes.py"))


def test_no_spelling_is_two_operations() -> None:
    spellings = [s for row in (*OPERATIONS, *EXPORTED) for s in row.spellings]
    assert len(set(spellings)) == len(spellings)


def test_a_row_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError, match="multiplied"):
        spelled("multiplied")


@pytest.mark.parametrize(
    ("names", "traits"),
    [
        (SAME - {"detach_"}, Trait.IDENTITY),
        (FORM, Trait.ASKS),
        (SCALES, Trait.MULTIPLIES | Trait.SCALES),
        (reductions.REDUCES, Trait.SCALES | Trait.ZERO),
        (norms._VIEWS, Trait.MOVES | Trait.VIEWS),
    ],
)
def test_sets_of_operators_agree_with_their_traits(names: frozenset[str], traits: Trait) -> None:
    assert names
    assert not [name for name in names if traits not in ROWS[name].traits]


def test_what_moves_is_what_the_table_says() -> None:
    said = {name for name, row in ROWS.items() if Trait.MOVES in row.traits}
    assert said - MOVES == {"fold", "im2col", "gather"}
    assert said >= MOVES and not MOVES & SAME


def test_the_products_of_parameters_are_contractions_or_layers() -> None:
    kinds = Trait.CONTRACTS | Trait.LAYER
    assert all(ROWS[name].traits & kinds for name in parameter_roles._PRODUCTS)
    assert not [n for n in parameter_roles._RESHAPES - {"rearrange"} if ROWS[n].traits & kinds]


aten = torch.ops.aten
X = torch.arange(24.0).reshape(4, 6)
EXAMPLES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "numpy_T": (aten.numpy_T.default, (X,)),
    "mT": (aten.mT.default, (X,)),
    "diagonal": (aten.diagonal.default, (X,)),
    "broadcast_to": (aten.broadcast_to.default, (X, (2, 4, 6))),
    "repeat_interleave": (aten.repeat_interleave.self_int, (X, 2)),
    "index": (aten.index.Tensor, (X, [torch.tensor([2, 0])])),
    "unsafe_split": (aten.unsafe_split.Tensor, (X, 2)),
    "hstack": (aten.hstack.default, ([X, X],)),
    "vstack": (aten.vstack.default, ([X, X],)),
    "unfold": (aten.unfold.default, (X, 1, 3, 1)),
    "pixel_shuffle": (aten.pixel_shuffle.default, (X.reshape(4, 2, 3), 2)),
    "native_channel_shuffle": (aten.native_channel_shuffle.default, (X[None, :, :, None], 2)),
    "rot90": (aten.rot90.default, (X,)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_element_of_what_moves_is_one_of_an_operand(name: str) -> None:
    target, arguments = EXAMPLES[name]
    assert name in MOVES
    made = target(*arguments)
    for part in made if isinstance(made, tuple | list) else [made]:
        assert part.numel() and torch.isin(part, X).all()


def test_a_padding_is_none_of_these() -> None:
    made = aten.im2col.default(X[None, None] + 1, [2, 2], [1, 1], [1, 1], [1, 1])
    assert not torch.isin(made, X + 1).all() and "im2col" not in MOVES


def call(target: Any, *arguments: Any, **keywords: Any) -> Node:
    graph = Graph()
    return graph.call_function(target, (graph.placeholder("x"), *arguments), keywords)


def test_the_name_of_an_operator() -> None:
    assert op_name(call(aten.view.dtype, torch.int32)) == "view"
    assert op_name(call(operator.getitem, 0)) == "getitem"
    assert op_name(call(aten.div.Tensor, 2.0)) == "div"


def test_a_quotient_that_is_rounded_scales_nothing() -> None:
    assert op_name(call(aten.div.Tensor_mode, 2.0, rounding_mode="floor")) not in SCALES


def test_an_operator_of_other_code_is_not_known_by_its_name() -> None:
    with torch.library._scoped_library("rewrite_tests", "DEF") as library:
        library.define("mul(Tensor x, float y) -> Tensor")
        node = call(torch.ops.rewrite_tests.mul.default, 2.0)
        assert op_name(node) == "rewrite_tests::mul"


def test_dropout_is_active_unless_it_says_that_it_is_not() -> None:
    assert is_active_dropout(call(aten.dropout.default, 0.5, True))
    assert not is_active_dropout(call(aten.dropout.default, 0.5, False))
    assert not is_active_dropout(call(aten.relu.default))
