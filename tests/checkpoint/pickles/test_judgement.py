"""Names that a pickle refers to are judged before any object is built."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from tests.checkpoint.files import Call, attack, refused


@pytest.mark.parametrize(
    "payload",
    [
        Call(getattr, nn.Linear, "__init__"),
        Call(getattr, Call(getattr, nn.Linear, "__init__"), "__globals__"),
        Call(eval, "1 + 1"),
        Call(exec, "pass"),
        Call(__import__, "os"),
        Call(torch.load, "x.pt"),
        Call(torch.hub.load, "evil/repo", "model"),
        Call(torch.jit.load, "x.pt"),
        Call(Path.unlink, Path("x")),
    ],
    ids=lambda payload: getattr(payload.reduced[0], "__name__", "?"),
)
def test_functions_are_refused(tmp_path, payload):
    refused(attack(tmp_path, payload))


@pytest.mark.parametrize("trust", [("torch",), ("builtins", "posix", "os")])
def test_trusting_a_package_allows_none_of_its_functions(tmp_path, trap, trust):
    refused(attack(tmp_path, Call(os.system, f"touch {trap}")), trust=trust)
    refused(
        attack(tmp_path, Call(torch.hub.load, "evil/repo", "model")), "torch.hub.load", trust=trust
    )
    refused(attack(tmp_path, Call(eval, "1")), "builtins.eval", trust=trust)
    assert not trap.exists()


def test_a_module_class_may_not_be_called(tmp_path):
    """A constructor does what its arguments say, so only an empty instance is made."""
    refused(attack(tmp_path, Call(nn.Linear, 3, 4)), "calls torch.nn.modules.linear.Linear")


def test_a_class_is_not_called_through_a_rebuild_function(tmp_path):
    rebuild = Call(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (3, 4), {})
    refused(attack(tmp_path, rebuild), "calls torch.nn.modules.linear.Linear")


def test_a_partial_of_a_partial_of_nothing_allowed(tmp_path):
    refused(attack(tmp_path, Call(functools.partial, os.system, "true")), "posix.system")
    refused(attack(tmp_path, Call(functools.partial, functools.partial)), "partial")


def forget(package):
    folder = Path(package.__file__).parent
    (folder / "imported").unlink()
    for name in ("stranger", "stranger.net"):
        sys.modules.pop(name, None)
    return folder


def test_an_untrusted_class_is_refused_with_the_flag_and_not_imported(tmp_path, package):
    path = save(package.Net(), tmp_path / "net.pt")
    folder = forget(package)
    refused(path, "stranger.net.", "--trust stranger")
    assert not (folder / "imported").exists()
    assert type(load(path, trust=["stranger"])).__name__ == "Net"
    assert (folder / "imported").exists()
