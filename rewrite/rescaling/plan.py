"""The plan of a rescaling: the scale of each channel, and recipes that apply it to state dicts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine
from rewrite.affine.layers import Layer, Side
from rewrite.affine.plan import Absorption, Edit
from rewrite.errors import OptionError
from rewrite.fold.folder import Move
from rewrite.fold.recipes import FoldRecipe
from rewrite.fold.requirements import Requirements
from rewrite.graph.captured import Captured
from rewrite.rescaling.balance import LARGEST_LOG_SCALE, Balance, Balanced
from rewrite.rescaling.couplings import Coupling, Measure, couplings
from rewrite.rescaling.path_kappa import PathCurvature, ones_of
from rewrite.rescaling.scaled_operations import ScaledLayer
from rewrite.rescaling.scales import ScaleGroup, Scales
from rewrite.text.some import some

OBJECTIVES = ("path", "l2", "equalize")


@dataclass(frozen=True, eq=False)
class Rescaling:
    """The scales that balance one model.

    Attributes:
        scales: which channels share a scale.
        groups: the groups of channels whose scales may change.
        log_scales: log d of the units of each group, float64.
        found: how well the scales balance the model.
        left: units that keep their scale, because the balancing one is too large or too small.
    """

    scales: Scales
    groups: tuple[ScaleGroup, ...]
    log_scales: tuple[Tensor, ...]
    found: Balanced
    left: frozenset[int] = frozenset()

    def unmoved(self, number: int) -> str:
        """Return why a group keeps its scales."""
        beyond = len(self.left & set(self.groups[number].units.tolist()))
        if not beyond:
            return "balanced already"
        return f"{beyond} of them would need a scale beyond 2^19 or 2^-19"

    def recipe(self, number: int) -> FoldRecipe:
        """Return the recipe that rescales one group, in this model or another checkpoint."""
        group = self.groups[number]
        place = {unit: position for position, unit in enumerate(group.units.tolist())}

        def index(labels: Tensor) -> Tensor:
            roots = self.scales.free(labels).tolist()
            return torch.tensor([place.get(root, -1) for root in roots])

        edits = [
            Edit(w.layer, Side.OUTPUT, index(w.writes), True, False, False)
            for w in (*group.writers, *group.beside)
        ]
        edits += [
            Edit(r.layer, Side.INPUT, index(r.reads), True, False, True) for r in group.readers
        ]
        scale = self.log_scales[number].exp()
        aliases = {
            edit.layer.name: self.scales.captured.aliases(edit.layer.module)
            for edit in edits
            if edit.layer.module is not None
        }
        return FoldRecipe(
            group.target, Affine(scale, torch.zeros_like(scale)),
            Requirements(adds=False, positive=True, invertible=True),
            (Move(Absorption(tuple(edits), needs_positive=True), "scale"),), aliases,
        )  # fmt: skip


def plan_rescaling(
    scales: Scales, objective: str, wanted: Collection[str] | None = None
) -> Rescaling:
    """Return the scales that balance a model.

    Args:
        scales: the scales of the captured model.
        objective: "path", "l2" or "equalize".
        wanted: the targets of the groups that may change; None for all.

    Raises:
        OptionError: the objective is unknown, "path" lacks an input shape, or squares of weights
            overflow float64.
        CaptureError: the objective is "path", and the model is not positively homogeneous.
    """
    groups = tuple(g for g in scales.groups() if wanted is None or g.target in wanted)
    largest, counted = objective == "equalize", objective == "path"
    edges = edges_of(scales, objective)
    units = [group.units for group in groups]
    left: frozenset[int] = frozenset()
    while True:
        solver = Balance(edges, units, left, largest=largest, counted=counted)
        found = solver.run()
        beyond = found.log_scales.abs() >= LARGEST_LOG_SCALE * (1 - 1e-9)
        if not bool(beyond.any()):
            break
        left |= frozenset(torch.cat(units)[beyond].tolist())
    sizes = [len(group.units) for group in groups]
    parts = torch.split(found.log_scales, sizes) if groups else ()
    return Rescaling(scales, groups, tuple(parts), found, left)


def edges_of(scales: Scales, objective: str) -> list[Coupling]:
    """Return the edges that an objective balances, layer by layer.

    Raises:
        OptionError, CaptureError: as `plan_rescaling`.
    """
    measure = measure_of(scales.captured, objective)
    found = []
    for edge in couplings(scales, measure, objective == "equalize", biases=objective == "path"):
        if bool(edge.matrix.isfinite().all()):
            found.append(edge)
        elif int(edge.writes.max()) >= 0 or int(edge.reads.max()) >= 0:
            raise OptionError(f"what {objective} balances overflows float64 in {edge.name}")
    return found


def measure_of(captured: Captured, objective: str) -> Measure:
    """Return the measure m(w) of an objective for each weight of a layer.

    Raises:
        OptionError, CaptureError: as `plan_rescaling`.
    """
    if objective not in OBJECTIVES:
        raise OptionError(f"objective is {objective!r}; pass one of {', '.join(OBJECTIVES)}")

    def tensor(layer: Layer, attr: str) -> Tensor:
        ref = layer.weight if attr == "weight" else layer.bias
        assert ref is not None
        return captured.values(ref)

    if objective == "path":
        ones = ones_of(captured)
        if ones is None:
            raise OptionError("the shape of an input is unknown; pass example_inputs")
        curvature = PathCurvature(captured, ones).compute()
        return lambda layer, attr, rows: _curved(curvature, tensor(layer, attr))[rows]
    if objective == "equalize":
        return lambda layer, attr, rows: tensor(layer, attr).detach()[rows].double().abs()
    return lambda layer, attr, rows: tensor(layer, attr).detach()[rows].double().square()


def _curved(curvature: dict[int, Tensor], tensor: Tensor) -> Tensor:
    """Return κ of a tensor; 0 if it is on no path, as an unused head."""
    found = curvature.get(id(tensor))
    return torch.zeros_like(tensor, dtype=torch.float64) if found is None else found


def describe(group: ScaleGroup) -> str:
    """Return a short description of a group: "64 channels of conv1, read by conv2"."""

    def names(layers: Sequence[ScaledLayer]) -> str:
        return some([scaled.layer.name for scaled in layers])

    return (
        f"{len(group.units)} channels written by {names(group.writers)}, "
        f"read by {names(group.readers)}"
    )
