from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from passes import BatchNormToGroupNorm
from rewrite import registry
from rewrite.errors import OptionError
from rewrite.outcomes import Contract
from rewrite.protocol import Pass


@dataclass(frozen=True)
class Example(Pass):
    """An example."""

    name: ClassVar[str] = "example"
    contract: ClassVar[Contract] = Contract.EXACT

    count: int | None = field(default=None, metadata={"help": "how many"})
    scale: float = 1.0
    flag: bool = False
    text: str = ""

    def find(self, captured):
        return ()

    def rewrite(self, captured, site):
        raise AssertionError


def test_finds_the_passes_of_the_package() -> None:
    assert {"bn-to-gn", "bn-to-ln", "bn-to-in"} <= set(registry.entries())
    assert registry.pass_class("bn-to-gn") is BatchNormToGroupNorm


@pytest.mark.parametrize(
    "rewrite",
    [
        BatchNormToGroupNorm(),
        BatchNormToGroupNorm(num_groups=16, strict=True),
        BatchNormToGroupNorm(channels_per_group=8),
    ],
)
def test_text_and_back(rewrite: Pass) -> None:
    assert registry.parse(registry.spec(rewrite)) == rewrite


def test_a_pass_is_called_as_its_entry_point_and_says_what_it_does() -> None:
    for name in registry.entries():
        kind = registry.pass_class(name)
        assert kind.name == name
        assert kind.__doc__ is not None and kind.__doc__.strip()
        assert isinstance(kind.contract, Contract)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "no such pass; known: .*bn-to-gn"),
        ("bn-to-gn{nonsense=1}", "is no option=value; options: num_groups"),
        ("bn-to-gn{num_groups}", "is no option=value"),
        ("bn-to-gn{num_groups=many}", "num_groups: 'many' is not an integer"),
        ("bn-to-gn{strict=maybe}", "strict: 'maybe' is neither true nor false"),
        ("bn-to-gn{num_groups=0}", "num_groups is 0; pass 1 or more"),
        ("bn to gn", "is no pass"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        registry.parse(text)


def test_options_are_read_off_the_fields() -> None:
    options = {option.name: option for option in registry.options(Example)}
    assert [o.kind for o in options.values()] == [int, float, bool, str]
    assert options["count"].optional and options["count"].help == "how many"
    assert options["count"].flag == "--count" and options["count"].parse("none") is None
    assert options["scale"].parse("0.5") == 0.5
    assert registry.spec(Example(text="a b, c")) == 'example{text="a b, c"}'
