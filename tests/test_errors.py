"""Errors: one root, and texts in one line."""

from __future__ import annotations

import pytest

import rewrite
from rewrite import errors
from rewrite.errors import one_line, system_reason


def test_every_error_has_one_root_and_is_public() -> None:
    kinds = [kind for name, kind in vars(errors).items() if name.endswith("Error")]
    assert len(kinds) > 7
    for kind in kinds:
        assert issubclass(kind, rewrite.RewriteError)
        assert getattr(rewrite, kind.__name__) is kind


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  these are wrong:\n  a, b\n  c"), "these are wrong: a, b"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_said_in_one_line(error: Exception, text: str) -> None:
    assert one_line(error) == text


def test_the_system_is_quoted_without_number_and_path() -> None:
    assert system_reason(FileNotFoundError(2, "No such file or directory", "/x")) == (
        "no such file or directory"
    )


def test_a_pass_error_names_its_site_and_a_contract_error_holds_what_was_made() -> None:
    assert errors.PassError("fold: bn: no", "bn").target == "bn"
    assert errors.PassError("fold: no").target == ""
    made = object()
    assert errors.ContractError("not exact", made).result is made
