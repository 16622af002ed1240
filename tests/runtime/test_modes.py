from __future__ import annotations

from torch import nn

from rewrite.runtime.modes import evaluating


class Listed(nn.Module):
    """Keeps a dropout where `eval()` does not reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [nn.Dropout()]
        self.own = nn.Dropout()


def test_modules_in_plain_lists_are_evaluated_and_put_back() -> None:
    model = Listed()
    model.own.eval()
    with evaluating(model):
        assert not model.held[0].training and not model.own.training and not model.training
    assert model.held[0].training and not model.own.training and model.training
