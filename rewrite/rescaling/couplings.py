"""The edges between units of a network: a measure of all weights, summed up for each pair.

    M[o, i] = Σ_taps m(W[o, i, tap])        m(w) = w², κ(w) or, with max for Σ, |w|
    after W → D_out W D_in⁻¹:               M[o, i] r_o / r_i,   r = d², d⁻² or d

The weight of a norm has one edge per channel, from a unit of scale 1; so has a bias, if biases
count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.affine.layers import Layer
from rewrite.graph.captured import Captured
from rewrite.rescaling.scaled_operations import ScaledLayer
from rewrite.rescaling.scales import Scales

_BLOCK = 1 << 22
"""Weights that are turned into float64 at a time."""

Measure = Callable[[Layer, str, slice], Tensor]
"""Of a layer, "weight" or "bias", and a range of its first axis: m of each number, in float64."""


@dataclass(eq=False)
class Coupling:
    """The edges of one layer.

    Attributes:
        name: the name of the layer.
        matrix: M, float64, (groups, out, in); edges from a unit to itself are 0.
        writes: the unit of each output, (groups, out); -1 where the scale is 1.
        reads: the unit of each input, (groups, in).
        counts: the number of weights that an edge sums up, (groups, 1, in).
        constant: Σ of m over edges from a unit to itself.
    """

    name: str
    matrix: Tensor
    writes: Tensor
    reads: Tensor
    counts: Tensor
    constant: float = 0.0


def couplings(scales: Scales, measure: Measure, largest: bool, biases: bool) -> list[Coupling]:
    """Return the edges of every layer with at least one free scale.

    Args:
        scales: the scales of a captured model.
        measure: m, applied to each weight.
        largest: take the maximum over the taps of a kernel, not the sum.
        biases: whether biases are edges.
    """
    found: list[Coupling] = []
    for scaled in scales.layers.values():
        reads, writes = scales.free(scaled.reads), scales.free(scaled.writes)
        if scaled.layer.weight is None:
            continue
        if scaled.layer.kind == "kernel":
            found.append(_kernel(scales.captured, scaled, reads, writes, measure, largest))
        else:
            found.append(_vector(scales.captured, scaled.layer, "weight", writes, measure))
        if biases and scaled.layer.bias is not None:
            found.append(_vector(scales.captured, scaled.layer, "bias", writes, measure))
    return found


def _vector(
    captured: Captured, layer: Layer, attr: str, writes: Tensor, measure: Measure
) -> Coupling:
    values = measure(layer, attr, slice(None)).cpu().view(-1, 1, 1)
    one = torch.full((len(writes), 1), -1)
    return Coupling(layer.name, values, writes.view(-1, 1), one, torch.ones(len(writes), 1, 1))


def _kernel(
    captured: Captured,
    scaled: ScaledLayer,
    reads: Tensor,
    writes: Tensor,
    measure: Measure,
    largest: bool,
) -> Coupling:
    layer = scaled.layer
    assert layer.weight is not None
    shape, groups = captured.tensor(layer.weight).shape, layer.layout.groups
    taps = math.prod(shape[2:])
    step = max(1, _BLOCK // max(1, taps * shape[1]))
    parts = []
    for start in range(0, shape[0], step):
        values = measure(layer, "weight", slice(start, start + step)).cpu()
        values = values.view(*values.shape[:2], -1)
        parts.append(values.amax(2) if largest else values.sum(2))
    matrix = torch.cat(parts).view(groups, -1, shape[1])
    if layer.layout.transposed:
        matrix = matrix.transpose(1, 2)
    counts = torch.full((groups, 1, matrix.shape[2]), float(taps))
    coupling = Coupling(layer.name, matrix, writes.view(groups, -1), reads.view(groups, -1), counts)
    _merge_inputs(coupling, largest)
    return _without_loops(coupling)


def _merge_inputs(coupling: Coupling, largest: bool) -> None:
    """Merge the input columns that share a unit after a flatten: 25088 to 512 in a VGG-16."""
    groups, outputs, width = coupling.matrix.shape
    kinds, place = torch.unique(coupling.reads[0], return_inverse=True)
    if groups > 1 or len(kinds) * 2 > width:
        return
    index = place.view(1, 1, -1)
    merged = coupling.matrix.new_zeros(1, outputs, len(kinds))
    how = "amax" if largest else "sum"
    merged.scatter_reduce_(2, index.expand_as(coupling.matrix), coupling.matrix, how)
    counts = coupling.counts.new_zeros(1, 1, len(kinds))
    coupling.counts = counts.scatter_add_(2, index, coupling.counts)
    coupling.matrix, coupling.reads = merged, kinds.view(1, -1)


def _without_loops(coupling: Coupling) -> Coupling:
    """Remove edges from a unit to itself, which no scale changes, into the constant."""
    loops = coupling.writes[:, :, None] == coupling.reads[:, None, :]
    loops &= coupling.writes[:, :, None] >= 0
    if bool(loops.any()):
        coupling.constant = float(coupling.matrix[loops].sum())
        coupling.matrix = coupling.matrix.masked_fill(loops, 0.0)
    return coupling
