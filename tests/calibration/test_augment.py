"""Variations of a batch of images: they depend on the batch alone, and nothing else has any."""

from __future__ import annotations

import torch

from rewrite.calibration.augment import variations
from rewrite.runtime.inputs import Inputs


def test_two_variations_of_images_with_the_same_shape() -> None:
    images = torch.rand(4, 3, 8, 8)
    before = images.clone()
    found = [inputs.args[0] for inputs in variations(Inputs((images,)))]
    assert [tuple(each.shape) for each in found] == [(4, 3, 8, 8)] * 2
    assert torch.equal(images, before)
    assert all((each - images).abs().max() > 1e-3 for each in found)
    again = [inputs.args[0] for inputs in variations(Inputs((images,)))]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(found[1][..., :4], found[0][..., :4]), "half is of the first variation"


def test_nothing_else_is_varied() -> None:
    for value in (torch.rand(4, 5, 8, 8), torch.rand(4, 3), torch.ones(2, 3, 8, 8).long()):
        assert not list(variations(Inputs((value,))))
    assert not list(variations(Inputs((), {"x": torch.rand(2, 3, 8, 8)})))
