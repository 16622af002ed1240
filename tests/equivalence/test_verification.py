"""The result of a comparison, as JSON and as text."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import rewrite
from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import verify
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model
from tests.equivalence.networks import X


def test_the_report_is_json_and_text(net):
    other = copy_model(net)
    other.norm.eps = 0.1
    found = verify(net, other, X)
    loaded = json.loads(found.to_json())
    assert loaded["ok"] is False
    assert loaded["divergence"]["target"] == "norm"
    assert "norm" in str(found)
    assert list(found.tables())


@pytest.mark.parametrize("options", [{"contract": "exactt"}, {"level": "nonsense"}])
def test_an_unknown_contract_or_level_is_an_error(options) -> None:
    with pytest.raises(rewrite.OptionError, match=r"is '(exactt|nonsense)'; pass "):
        verify(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2), **options)


def test_a_level_and_a_contract_may_be_texts() -> None:
    model = nn.Linear(2, 2)
    found = verify(model, model, torch.ones(1, 2), level="thorough", contract="exact")
    assert found == verify(model, model, torch.ones(1, 2), contract=Contract.EXACT)
    assert len(found.cases) > 8 and found.level is Level.THOROUGH
