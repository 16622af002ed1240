"""rewrite.tracing.code.code_paths: from a path in a class's code to the modules of a tree."""

from __future__ import annotations

from collections import deque

from torch import nn

from rewrite.runtime.tree import Tree
from rewrite.tracing.code.code_paths import CodePaths


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.turn = deque(self.blocks)
        self.head = nn.Sequential(nn.Linear(2, 2))


def paths() -> CodePaths:
    return CodePaths(Tree(nn.Sequential(Blocks(), nn.ReLU())))


def test_a_path_leads_to_a_module_and_what_is_left_of_it_is_an_attribute() -> None:
    assert list(paths().at("0", ("head", "0"))) == [("0.head.0", ())]
    assert list(paths().at("0", ("head", "0", "weight"))) == [("0.head.0", ("weight",))]
    assert list(paths().at("0", ("missing",))) == [("0", ("missing",))]


def test_an_item_that_code_does_not_spell_is_any_and_so_in_plain_containers() -> None:
    both = [("0.blocks.0", ()), ("0.blocks.1", ())]
    assert list(paths().at("0", ("blocks", None))) == both
    assert list(paths().at("0", ("turn", None))) == both
    assert list(paths().at("0", ("turn", "1"))) == both[1:]


def test_only_classes_of_others_are_read_and_what_is_below_a_place_is_listed() -> None:
    found = paths()
    assert list(found.classes) == [Blocks] and [name for name, *_ in found.owners] == ["0"]
    assert set(found.below("0.blocks")) == {"0.blocks.0", "0.blocks.1"}
