"""The result of `recover`: agreement before and after, curves, and why it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from rewrite.training.calibration_error import Reliability

if TYPE_CHECKING:
    from rich.console import RenderableType

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Held:
    """The agreement of student and teacher on held-out samples.

    Attributes:
        samples: the number of samples.
        top1: fraction of samples with the same top-1 class; None if the output has no classes.
        cosine: cosine similarity of the outputs.
        error: ‖student − teacher‖ / ‖teacher − its mean‖, over all outputs.
        accuracy: the student's accuracy; None without labels.
    """

    samples: int
    top1: float | None
    cosine: float
    error: float
    accuracy: float | None = None

    @property
    def score(self) -> tuple[float, float]:
        """The key by which states are ranked: top-1 first, then the error."""
        return (-1.0 if self.top1 is None else self.top1, -self.error)

    def __str__(self) -> str:
        parts = [] if self.top1 is None else [f"same top-1 on {self.top1:.1%}"]
        parts += [f"cosine {self.cosine:.4f}", f"relative error {self.error:.3f}"]
        parts += [] if self.accuracy is None else [f"accuracy {self.accuracy:.1%}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Calibrated:
    """The calibration of one model: its reliability bins, and its best temperature."""

    reliability: Reliability
    temperature: float


@dataclass(frozen=True)
class Recovered(Generic[Model]):
    """A trained student, and the report of its training.

    Attributes:
        model: the student with its best state on held-out samples, which may be the initial one.
        before, after: agreement with the teacher on held-out samples.
        steps: for each step its number, loss and learning rate.
        agreements: for each evaluation the number of the step before it, and the agreement.
        stopped: why the training ended early; "" if it did not.
        notes: further remarks for the user.
        calibration: with labels, of "teacher", "student before" and "student after".
        planes: with labels, for the same models: the held-out penultimate activations of three
            classes in the plane through their templates, (n, 2) per class.
        seconds: wall-clock time.
    """

    model: Model
    before: Held
    after: Held
    steps: tuple[tuple[int, float, float], ...]
    agreements: tuple[tuple[int, Held], ...]
    stopped: str = ""
    notes: tuple[str, ...] = ()
    calibration: dict[str, Calibrated] | None = None
    planes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the training ran to its end, or stopped by `patience`."""
        return not self.stopped or self.stopped.startswith("no better")

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped it."""
        return self.stopped.startswith("interrupted")

    def to_json(self) -> str:
        """Return everything but the model as JSON."""
        held = {name: asdict(getattr(self, name)) for name in ("before", "after")}
        more: dict[str, Any] = {
            "steps": [dict(zip(("step", "loss", "rate"), row, strict=True)) for row in self.steps],
            "agreements": [{"step": step} | asdict(found) for step, found in self.agreements],
            "stopped": self.stopped,
            "notes": list(self.notes),
        }
        if self.calibration is not None:
            more["calibration"] = {name: asdict(one) for name, one in self.calibration.items()}
        if self.planes:
            more["planes"] = {
                name: {str(label): points.tolist() for label, points in plane.items()}
                for name, plane in self.planes.items()
            }
        return json.dumps(held | more, indent=2)

    def plot(self, path: str | Path) -> Path:
        """Plot the curves, with labels also reliability and penultimate activations.

        Raises:
            OptionError: the suffix is neither .png nor .svg, or matplotlib is not installed.
        """
        from rewrite.training.plot import plot_recovery

        return plot_recovery(self, Path(path))

    def tables(self, *, verbose: bool = False) -> Iterator[RenderableType]:
        """Yield what rich prints of it; with `verbose` every evaluation."""
        from rich.table import Table

        table = Table("", "before", "after", title=f"{self.before.samples} held-out samples")
        rows = [("same top-1", "top1"), ("cosine", "cosine"), ("relative error", "error"),
                ("accuracy", "accuracy")]  # fmt: skip
        for label, key in rows:
            old, new = getattr(self.before, key), getattr(self.after, key)
            if old is not None:
                table.add_row(label, f"{old:.4f}", f"{new:.4f}")
        yield table
        for step, held in self.agreements if verbose else ():
            yield f"after step {step}: {held}"
        for name, one in (self.calibration or {}).items():
            yield (
                f"{name}: calibration error {one.reliability.error:.4f}, best temperature "
                f"{one.temperature:.2f}"
            )
        yield f"{len(self.steps)} steps in {self.seconds:.0f} s"
        yield from (*self.notes, *([self.stopped] if self.stopped else []))
