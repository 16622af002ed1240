"""Every tensor of a structure is found, with a path that says how to reach it."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch

from rewrite.runtime.leaves import carries_objects, leaves, mapped, tensors

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    logits: Any
    hidden: Any = None


class Cache:
    def __init__(self, keys: Any) -> None:
        self.keys = keys


A, B, C = (torch.full((2,), float(i)) for i in range(3))


def test_paths_are_python() -> None:
    value = {"a": Output(A, [B]), "p": Pair(C, 3)}
    found = dict(leaves(value, "out"))
    assert set(found) == {
        "out['a'].logits",
        "out['a'].hidden[0]",
        "out['p'].left",
        "out['p'].right",
    }
    for path, leaf in found.items():
        assert eval(path, {"out": value}) is leaf


def test_objects_that_carry_tensors_are_opened_and_others_are_leaves() -> None:
    assert [path for path, _ in leaves(Cache([A]))] == ["output.keys[0]"]
    assert [path for path, _ in leaves(Cache({0: A}))] == ["output.keys[0]"]
    plain = Cache("no tensor")
    assert list(leaves(plain)) == [("output", plain)]


def test_objects_that_point_at_each_other_end() -> None:
    one, other = Cache(None), Cache(None)
    one.keys, other.keys = other, one
    assert list(leaves(one)) == [("output", one)]


def test_a_nested_tensor_is_its_parts() -> None:
    nested = torch.nested.nested_tensor([A, torch.zeros(3)], layout=torch.jagged)
    assert [leaf.shape[0] for leaf in tensors([nested])] == [2, 3]


def test_mapped_copies_what_it_changes() -> None:
    cache = Cache([A])
    made = mapped({"c": cache, "b": B}, lambda t: t + 10)
    assert torch.equal(made["c"].keys[0], A + 10) and torch.equal(made["b"], B + 10)
    assert cache.keys[0] is A


def test_objects_are_told_from_containers() -> None:
    assert carries_objects([Cache(A)]) and not carries_objects({"a": [A, 1, None, "x"]})
