"""A module of the user's own class whose forward is a graph."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewrite
from tests.graph.test_forward_graph import Plain, X, folded, make


class Dropout(Plain):
    def more(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, self.training)


class Rrelu(Plain):
    def more(self, y: Tensor) -> Tensor:
        return F.rrelu(y, 0.0, 0.9, self.training)


KEPT = (Plain, Dropout, Rrelu)


@pytest.mark.parametrize("kind", KEPT)
def test_an_edited_model_lives_on(kind: type[Plain], tmp_path: Path):
    model = make(kind)
    result = folded(model)
    assert result.report.ok and len(result.report.changes) == 1
    rewrite.save(result.model, tmp_path / "model.pt")
    loaded = rewrite.load(tmp_path / "model.pt", trust=["tests", "torchvision"])
    again = folded(result.model)
    assert not again.report.changes
    for other in (
        result.model, loaded, copy.deepcopy(result.model), again.model,
        pickle.loads(pickle.dumps(result.model)),
    ):  # fmt: skip
        assert isinstance(other, kind) and type(other).__name__ == kind.__name__
        assert (other.limit, other.names) == (3.0, ["a"])
        other.raise_limit()
        assert other.names == ["a", "b"]
        assert torch.allclose(other(X), model(X), rtol=0, atol=1e-12)
        for mode in (True, False):
            with_seed(model.train(mode))
            assert torch.allclose(
                with_seed(other.train(mode)), with_seed(model.train(mode)), rtol=0, atol=1e-12
            )
    assert model.names == ["a"]


def with_seed(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(X)
