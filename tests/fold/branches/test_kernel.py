"""Where the kernel of a branch lies in the kernel of the widest one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rewrite.fold.branches.kernel import Merge, Term, identity_window, place_of, window
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Conv, conv_of


def two(inner: nn.Module, outer: nn.Module) -> tuple[Captured, Conv, Conv]:
    captured = capture(nn.ModuleDict({"inner": inner, "outer": outer}))
    found = [conv_of(captured, captured.calls(name)[0]) for name in ("inner", "outer")]
    assert found[0] is not None and found[1] is not None
    return captured, found[0], found[1]


def conv(kernel: int, padding: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(2, 2, kernel, padding=padding, **options).double()


@pytest.mark.parametrize(
    ("inner", "outer", "at"),
    [
        (conv(1, 0), conv(3, 1), (1, 1)),
        (conv(3, 1), conv(3, 1), (0, 0)),
        (conv(3, 1), conv(5, 2), (1, 1)),
        (conv(3, 0), conv(5, 0), None),  # another size comes out
        (conv(1, 1), conv(3, 1), None),
        (conv(1, 0), conv(3, 0), None),
        (conv(1, 0, dilation=1), conv(3, 2, dilation=2), (1, 1)),
    ],
)
def test_a_kernel_put_at_its_window_is_the_same_convolution(
    inner: nn.Conv2d, outer: nn.Conv2d, at: tuple[int, ...] | None
) -> None:
    captured, one, other = two(inner, outer)
    assert window(one, other, captured) == at
    if at is not None:
        padded = torch.zeros_like(outer.weight)
        taps = inner.weight.shape[2:]
        padded[:, :, at[0] : at[0] + taps[0], at[1] : at[1] + taps[1]] = inner.weight.detach()
        x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
        made = F.conv2d(x, padded, inner.bias, padding=outer.padding, dilation=outer.dilation)  # type: ignore[arg-type]  # pairs
        torch.testing.assert_close(made, inner(x))


@pytest.mark.parametrize(
    ("outer", "at"), [(conv(3, 1), (1, 1)), (conv(5, 2), (2, 2)), (conv(3, 0), None)]
)
def test_the_identity_is_a_dirac_at_the_center(
    outer: nn.Conv2d, at: tuple[int, ...] | None
) -> None:
    captured, _, other = two(conv(1, 0), outer)
    assert identity_window(other, captured) == at
    if at is not None:
        dirac = torch.zeros_like(outer.weight)
        dirac[range(2), range(2), at[0], at[1]] = 1
        x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(F.conv2d(x, dirac, padding=outer.padding), x)  # type: ignore[arg-type]  # a pair


def test_the_place_of_a_branch_is_that_of_its_convolution_or_of_the_identity() -> None:
    captured, one, other = two(conv(3, 1), conv(5, 2))
    affine: Any = None  # not read here
    assert place_of(captured, Term(one, affine), other) == (1, 1)
    assert place_of(captured, Term(None, affine), other) == (2, 2)


def test_a_merge_says_how_many_branches_there_are() -> None:
    captured, one, other = two(conv(3, 1), conv(5, 2))
    node = captured.calls("outer")[0]
    affine: Any = None  # not read here
    terms = (Term(one, affine), Term(other, affine))
    assert Merge(node, node, frozenset(), "", terms, other).before == "2 parallel branches"
