"""Running statistics of BatchNorm estimated anew from data: the exact average, in one pass.

    μ = Σ x / n,   σ² = (Σ x² − n μ²) / (n − 1),   over all samples and positions of the data

where x is what a norm reads while every norm normalizes by the batch it is given (the usual
`momentum=None` recipe, but with sums over elements instead of an average over batches: batches of
different sizes count by their size).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewrite.calibration.batches import Batches
from rewrite.distributed import all_reduce
from rewrite.errors import OptionError
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.runtime.hooks import hooked, run
from rewrite.runtime.modes import evaluating


@dataclass(frozen=True)
class RecalibrateBatchNorm(Pass):
    """Estimate the running statistics of every BatchNorm module from calibration data.

    Rewrites: modules that keep running statistics and hold them themselves, subclasses included.
    Declines: those without running statistics, or with statistics that others share.
    """

    name: ClassVar[str] = "recalibrate-bn"
    contract: ClassVar[Contract] = Contract.REDEFINING

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every BatchNorm module."""
        for name, module in captured.tree.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            before = f"{type(module).__name__}({module.num_features})"
            if module.running_mean is None or module.running_var is None:
                yield Skip(name, before, "keeps no running statistics")
            elif shared := _shared(captured, name):
                yield Skip(name, before, f"shares its statistics with {shared}")
            else:
                yield Site(name, before)

    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Raise: statistics need data."""
        raise OptionError(f"{self.name}: pass calibration data (--calibration DATA)")

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Run the data through the model once and set the statistics of all sites.

        Raises:
            OptionError: there are no data, or none that the model takes.
        """
        if calibration is None:
            raise OptionError(f"{self.name}: pass calibration data (--calibration DATA)")
        modules = [captured.module(site.target) for site in sites]
        sums = _collect(captured, modules, Batches(captured.model, calibration, hold_out=0))
        return [_change(captured, site, item) for site, item in zip(sites, sums, strict=True)]


def _shared(captured: Captured, name: str) -> str:
    for attr in ("running_mean", "running_var"):
        for ref in captured.tied(TensorRef(name, attr)):
            return ref.name
    return ""


def _collect(captured: Editable, modules: Sequence[nn.Module], data: Batches) -> list[Tensor]:
    """Return (3, channels) sums of 1, x and x² at each norm; its output is that of its batch."""
    sums = [torch.zeros(3, module.num_features, dtype=torch.float64) for module in modules]  # type: ignore[call-overload]  # of a BatchNorm an int

    def hook(index: int, x: Tensor, output: Tensor) -> None:
        rows = x.detach().double().movedim(1, 0).flatten(1)
        counts = torch.full_like(rows[:, 0], rows.shape[1])
        sums[index] += torch.stack([counts, rows.sum(1), (rows * rows).sum(1)]).cpu()

    normalizing = _normalizing_by_batch(captured, modules)
    with evaluating(captured.model), torch.no_grad(), normalizing, hooked(modules, hook):
        for batch in data:
            run(captured.model, batch)
    for item in sums:
        all_reduce(item)
    return sums


@contextlib.contextmanager
def _normalizing_by_batch(captured: Editable, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let each norm normalize by its batch; what it updates meanwhile are copies."""
    buffers = [(module, key, value) for module in modules for key, value in module._buffers.items()]
    try:
        for module in modules:
            module.training = True
        for module, key, value in buffers:
            captured.editor.share(module, key, None if value is None else value.clone())
        yield
    finally:
        for module in modules:
            module.training = False
        for module, key, value in buffers:
            captured.editor.share(module, key, value)


def _change(captured: Editable, site: Site, sums: Tensor) -> Change:
    count, total, square = sums
    if float(count.max()) < 2:
        return Change(site.target, site.before, site.before, "left as it was: no data reached it")
    mean = total / count
    var = ((square - count * mean * mean) / (count - 1)).clamp(min=0)
    for attr, value in (("running_mean", mean), ("running_var", var)):
        ref = TensorRef(site.target, attr)
        captured.editor.set_tensor(ref, value.to(captured.tensor(ref)))
    note = f"statistics of {int(count.max())} values a channel"
    return Change(site.target, site.before, site.before, note)
