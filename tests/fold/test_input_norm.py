"""Preprocessing, (x - mean) / std, folds into what reads the first input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewrite
from passes import FoldNorm
from rewrite.errors import OptionError, PassError
from rewrite.fold.folder import Fold, Folder
from rewrite.fold.input_norm import InputNorm, fold_input, parse_input_norm
from rewrite.graph.capture import capture
from rewrite.outcomes import Declined

TEXT = "0.5,-0.25,2/0.2,4,1.5"


def test_the_text_is_mean_and_std() -> None:
    mean, std = parse_input_norm(TEXT)
    assert mean.tolist() == [0.5, -0.25, 2.0] and std.tolist() == [0.2, 4.0, 1.5]
    assert mean.dtype is std.dtype is torch.float64


@pytest.mark.parametrize(
    "text", ["", "1,2", "1/2/3", "a/1", "1,2/1", "1,2/1,0", "1/-1", "1,/1,1", "1/nan"]
)
def test_a_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="input_norm"):
        parse_input_norm(text)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 5, 5), (2, 3, 2, 2, 2)])
def test_the_module_normalizes_axis_one_in_the_inputs_dtype(shape: tuple[int, ...]) -> None:
    norm = InputNorm(*parse_input_norm(TEXT))
    x = torch.randn(*shape)
    made = norm(x)
    mean, std = (value.float() for value in parse_input_norm(TEXT))
    assert made.dtype is torch.float32 and norm.state_dict() == {}
    torch.testing.assert_close(made.transpose(1, -1), (x.transpose(1, -1) - mean) / std)


def folder(model: nn.Module, *inputs: Tensor) -> Folder:
    return Folder(capture(model.eval(), example_inputs=inputs or None))


@pytest.mark.parametrize("padding", [0, 1])
def test_it_folds_into_a_convolution_that_pads_nothing(padding: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.ReLU())
    found = fold_input(folder(model, torch.randn(1, 3, 8, 8)), *parse_input_norm(TEXT))
    assert isinstance(found, Declined if padding else Fold)
    if isinstance(found, Fold):
        assert found.layers == ("0",)
        mean, std = parse_input_norm(TEXT)
        torch.testing.assert_close(found.affine.scale, 1 / std)
        torch.testing.assert_close(found.affine.shift, -mean / std)


def test_a_forward_that_cannot_be_traced_is_declined() -> None:
    class ByValue(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    found = fold_input(folder(ByValue()), *parse_input_norm(TEXT))
    assert isinstance(found, Declined) and "cannot be traced" in found.reason


def test_the_folded_model_takes_the_raw_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    made = rewrite.convert(model, FoldNorm(input_norm=TEXT), example_inputs=x).model
    want = model(InputNorm(*parse_input_norm(TEXT))(x))
    assert (made(x) - want).abs().max() < 1e-12 * want.abs().max()
    assert (made(x) - model(x)).abs().max() > 1e-3


def test_what_the_input_cannot_be_folded_into_is_an_error_with_the_reason() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(x, 1)

    with pytest.raises(PassError, match="input_norm cannot be folded"):
        rewrite.convert(
            Nothing(), FoldNorm(input_norm=TEXT), example_inputs=torch.randn(1, 3, 4, 4)
        )
