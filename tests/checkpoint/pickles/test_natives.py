"""Plain values of a pickle: built by own code, whatever the file asks for."""

from __future__ import annotations

import argparse
import enum

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load
from rewrite.checkpoint.pickles.unpickle import load_pickle
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
