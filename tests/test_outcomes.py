"""Outcomes are data: selections with their reasons, changes, choices by name."""

from __future__ import annotations

import pytest

from rewrite.errors import OptionError
from rewrite.outcomes import Change, Contract, Selection, Skip, as_choice


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        (Selection(), None),
        (Selection(only=("layer1.*",)), None),
        (Selection(only=("layer2.*", "layer1.0.bn?")), None),
        (Selection(only=("layer2.*",)), "not matched by --only layer2.*"),
        (Selection(skip=("*.bn1",)), "matched by --skip *.bn1"),
        (Selection(only=("layer1.*",), skip=("layer1.0.*",)), "matched by --skip layer1.0.*"),
    ],
)
def test_selection(selection: Selection, reason: str | None) -> None:
    assert selection.refusal("layer1.0.bn1") == reason


def test_a_change_is_data() -> None:
    change = Change("a", "BatchNorm2d(8)", "GroupNorm(2, 8)")
    assert change == Change("a", "BatchNorm2d(8)", "GroupNorm(2, 8)")
    assert hash(Skip("a", "b", "c")) == hash(Skip("a", "b", "c"))


def test_patterns_are_one_text_or_several() -> None:
    assert Selection.of("a.*", ["b", "c"]) == Selection(("a.*",), ("b", "c"))


def test_a_site_that_is_left_out_has_its_own_reason() -> None:
    selection = Selection(only=("a",), left_out={"a": "breaks the contract"})
    assert selection.refusal("a") == "breaks the contract"
    assert selection.refusal("b") == "not matched by --only a"


def test_a_choice_is_a_member_or_its_name_and_nothing_else() -> None:
    assert as_choice(Contract, "exact-in-eval", "contract") is Contract.EXACT_IN_EVAL
    assert as_choice(Contract, Contract.EXACT, "contract") is Contract.EXACT
    for wrong in ("exactt", "EXACT", "", None):
        with pytest.raises(OptionError, match=r"contract is .*; pass exact, exact-in-eval, appr"):
            as_choice(Contract, wrong, "contract")


def test_what_holds_of_several_contracts_is_the_weakest() -> None:
    order = list(Contract)
    assert order == [
        Contract.EXACT, Contract.EXACT_IN_EVAL, Contract.APPROXIMATE, Contract.REDEFINING
    ]  # fmt: skip
    assert Contract.weakest(reversed(order)) is Contract.REDEFINING
    assert Contract.weakest(order[:2]) is Contract.EXACT_IN_EVAL
    assert Contract.weakest(()) is Contract.EXACT
