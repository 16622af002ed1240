"""The penultimate layer of a classifier, seen in the plane through three class templates.

The template of class k is row w_k of the last linear layer. With P an orthonormal basis of the
plane through w_a, w_b, w_c, a sample with penultimate activations h is drawn at P (h − w_a). Hard
labels give broad clusters, smoothed labels tight and equidistant ones (Müller et al. 2019, §2; §5
on distillation). (https://arxiv.org/abs/1906.02629)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.files.figure import save_figure
from rewrite.runtime.modes import evaluating
from rewrite.training.plot import draw_plane, new_panels


class NoTemplatesError(OptionError):
    """No linear layer computes the logits of a model."""


def penultimate_plane(
    model: nn.Module, inputs: Tensor, labels: Tensor, classes: Sequence[int] = (0, 1, 2)
) -> dict[int, Tensor]:
    """Project the penultimate activations of three classes onto the plane of their templates.

    Args:
        model: a classifier whose last call of an `nn.Linear` computes its logits.
        inputs: (N, *), as the model takes them.
        labels: (N,), int64.
        classes: three different class numbers.

    Returns:
        The points of the samples by class, (n, 2), float64.

    Raises:
        OptionError: no linear layer computes the logits, or a class is out of range or repeated.
    """
    if len(set(classes)) != 3:
        raise OptionError(f"classes are {tuple(classes)}; pass three different ones")
    last, features = _last_linear(model, inputs)
    templates = last.weight.detach().double().cpu()
    if not 0 <= min(classes) <= max(classes) < len(templates):
        raise OptionError(f"classes are {tuple(classes)}, the model has {len(templates)}")
    first, second, third = (templates[k] for k in classes)
    basis, _ = torch.linalg.qr(torch.stack([second - first, third - first], 1))
    points = (features - first) @ basis
    return {k: points[labels.cpu() == k] for k in classes}


def plot_penultimate(planes: Mapping[str, Mapping[int, Tensor]], path: str | Path) -> Path:
    """Draw the planes of several models side by side, each under its name, into a .png or .svg.

    Args:
        planes: by the name of the model, the points of each class, (n, 2).
        path: the file, ending in .png or .svg; overwritten.

    Raises:
        OptionError: the suffix is another, there is nothing to draw, or matplotlib is missing.
    """
    if not planes:
        raise OptionError("no plane to draw")
    figure, panels = new_panels(len(planes))
    for panel, (name, plane) in zip(panels, planes.items(), strict=True):
        draw_plane(panel, name, plane)
    return save_figure(figure, Path(path))


def _last_linear(model: nn.Module, inputs: Tensor) -> tuple[nn.Linear, Tensor]:
    """Return the linear layer whose output the model returns, and its input, in float64."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, args[0].detach(), output.detach()))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not calls or not isinstance(output, Tensor) or not torch.equal(calls[-1][2], output):
        raise NoTemplatesError(
            "no linear layer makes the logits: there are no templates to look at"
        )
    layer, read, _ = calls[-1]
    return layer, read.double().cpu()
