"""Plain values of a pickle: built by own code, whatever the file asks for."""

from __future__ import annotations

import argparse
import enum
import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.checkpoint.pickles.unpickle import load_pickle
from rewrite.errors import CheckpointError
from tests.checkpoint.files import (
    Call,
    attack,
    in_eval,
    refused,
    refused_at_once,
    same,
    with_attribute,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_member_of_an_enum_opens_as_python_3_11_2_writes_it(tmp_path, package):
    path = attack(tmp_path, {"mode": Call(getattr, package.Mode, "FAST")})
    assert load_pickle(path, trust=["stranger"])["mode"] is package.Mode.FAST
    refused(path, "package 'stranger' is not trusted")


@pytest.mark.parametrize("name", ["__class__", "mro", "SLOWEST"])
def test_nothing_else_is_looked_up_on_an_enum(tmp_path, package, name):
    path = attack(tmp_path, Call(getattr, package.Mode, name))
    refused(path, f"Mode.{name}", "no member", trust=["stranger"])


def test_plain_data_of_training_scripts_opens(tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1),
        "kinds": frozenset({1, 2}),
        "span": slice(1, 2),
        "model": nn.Linear(2, 2),
    }
    torch.save(content, tmp_path / "training.pt")
    assert isinstance(load(tmp_path / "training.pt"), nn.Linear)


class Marked(enum.Enum):
    ONE = 1


def test_an_enum_is_never_called(tmp_path):
    with pytest.raises(ValueError, match="valid"):
        Marked(2)
    for arguments in ((2,), ("E", [("__init__", nn.Linear)]), ((1,),), ()):
        torch.save(with_attribute("x", Call(Marked, *arguments)), tmp_path / "m.pt")
        refused_at_once(tmp_path / "m.pt", "Marked", trust=["tests"])
    torch.save({"model": in_eval(), "x": Marked.ONE}, tmp_path / "m.pt")
    assert same(load(tmp_path / "m.pt", trust=["tests"]), in_eval())


class Marks(enum.Flag):
    A = 1
    B = 2
    C = 4


class Numbers(enum.IntFlag):
    A = 1
    B = 2


class Pair(enum.Enum):
    ONE = (1, ("x", None))


def kept(tmp_path, value: Any) -> Any:
    """Return what becomes of an attribute of a model that is saved and opened again."""
    model = nn.ReLU()
    model.held = value
    return load(save(model, tmp_path / "m.pt"), trust=["tests"]).held


VALUES = [
    Fraction(-3, 7), Fraction(10**60, 3), Decimal("1." + "3" * 60), Decimal("1E+1000"),
    slice("a", None), slice(0.5, 2.5, None), deque([1, (2,)]), deque([1, 2, 3], maxlen=2),
    frozenset([frozenset([1]), (2,)]), {frozenset([1]): 2}, Marks.A | Marks.C, Marks(0), Marks.B,
    Numbers.A | Numbers.B, Numbers(0), Pair.ONE, nn.init.xavier_uniform_, nn.init.calculate_gain,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: re.sub(" at 0x.*", ">", repr(value)))
def test_a_plain_value_is_what_it_was(tmp_path, value) -> None:
    back = kept(tmp_path, value)
    assert back == value and type(back) is type(value)
    assert getattr(back, "maxlen", None) == getattr(value, "maxlen", None)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "coo": lambda base: base.to_sparse(),
    "csr": lambda base: base.to_sparse_csr(),
    "csc": lambda base: base.to_sparse_csc(),
    "bsr": lambda base: base.to_sparse_bsr((2, 2)),
    "quantized": lambda base: torch.quantize_per_tensor(base, 0.1, 3, torch.qint8),
    "by channel": lambda base: torch.quantize_per_channel(
        base, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 1, 1]), 0, torch.qint8
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("registered", [True, False])
def test_tensors_that_have_no_form_without_numbers(tmp_path, name, registered) -> None:
    value = TENSORS[name](torch.arange(24.0).reshape(4, 6))
    model = nn.ReLU()
    if registered:
        model.register_buffer("held", value)
    else:
        model.held = [value]
    back = load(save(model, tmp_path / "m.pt")).held
    back = back if registered else back[0]
    assert back.layout is value.layout and back.dtype is value.dtype
    dense = "dequantize" if value.is_quantized else "to_dense"
    assert torch.equal(getattr(back, dense)(), getattr(value, dense)())


SOMETHING_ELSE = "makes a plain value of something else"

NO_VALUES = [
    (Call(Fraction, 1, 0), "holds a number that is none"),
    (Call(Fraction, 1.5, 2), SOMETHING_ELSE),
    (Call(Fraction, 1 << 5000, 3), "holds a number of too many digits"),
    (Call(deque, [], -1), "makes a deque of a negative length"),
    (Call(deque, range(10**9)), "makes a set of what is no list"),
    (Call(deque, [], "x"), SOMETHING_ELSE),
    (Call(Decimal, "9" * 2000), "holds a number that is none"),
    (Call(slice, [1]), SOMETHING_ELSE),
    (Call(Marks, 8), "Marks(8), which is no member of that Enum"),
    (Call(Marks, -1), "Marks(-1), which is no member of that Enum"),
    (Call(Pair, (2,)), "Pair((2,)), which is no member of that Enum"),
    (Call(nn.init.normal_, torch.ones(2)), "calls torch.nn.init.normal_, which could run anything"),
    ({frozenset([nn.ReLU()]): 1}, "has a ReLU as the key of a dict or in a set"),
]


@pytest.mark.parametrize(("evil", "words"), NO_VALUES)
def test_what_is_no_plain_value_is_refused(tmp_path, evil, words) -> None:
    torch.save(with_attribute("x", evil), tmp_path / "m.pt")
    refused_at_once(tmp_path / "m.pt", words, trust=["tests"])


def test_the_bytes_of_a_tensor_are_no_value(tmp_path) -> None:
    torch.save(with_attribute("x", [torch.ones(2).untyped_storage()]), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="the bytes of a tensor without the tensor"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize("wrap", [lambda m: deque([m]), lambda m: argparse.Namespace(m=m)])
def test_a_module_in_any_container_is_checked(tmp_path, wrap) -> None:
    inner = nn.ReLU()
    torch.save(with_attribute("x", wrap(inner)), tmp_path / "m.pt")
    assert isinstance(load(tmp_path / "m.pt"), nn.Module)
    vars(inner)["forward"] = 3
    torch.save(with_attribute("x", wrap(inner)), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="in the place of a method"):
        load(tmp_path / "m.pt")
