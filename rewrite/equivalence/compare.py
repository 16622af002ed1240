"""Compare the outputs of two models, whatever their structure (tuples, dicts, dataclasses).

    abs  = max |a - b|                  over one tensor pair
    rel  = max |a - b| / max |a|        relative to the whole tensor, not to each element, which
                                        may be near zero by cancellation
    cos  = <a, b> / (|a| |b|)           over all floating-point values together
    top1 = share of positions where b's largest class is (one of) a's largest

Rules for values that have no distance:

1. Integer and boolean tensors, strings, Python numbers and None must be equal.
2. NaN must be at the same positions, and so must each infinity with its sign; the remaining
   elements are compared.
3. Structures must have the same keys, fields and lengths, and tensors the same shape and dtype.

Everything is computed in float64 (complex128), on the device of the first value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rewrite.runtime.leaves import ROOT, leaves
from rewrite.text.some import some

_CLASS_AXIS_FIRST_FROM = 4


@dataclass(frozen=True)
class Comparison:
    """The distance of two outputs; `reasons` are differences that no distance can express.

    Attributes:
        max_abs: the largest absolute difference.
        max_rel: the largest difference relative to its tensor's largest magnitude.
        cosine: cosine similarity of all floating-point values, None without any.
        agreement: fraction of equal top-1 classes, None without an axis of classes.
        predictions: the number of top-1 classes compared, those with a NaN left out.
        nothing: whether `a` has floating-point values, and all of them are NaN.
        finite: whether every floating-point value of `b` is finite.
        worst: the path to the tensor with `max_rel`.
        structure: differences of keys, lengths, shapes and dtypes; the length of a tensor in a
            list is a value instead (a number of detections).
        reasons: `structure`, and differences of exact values, of NaN and of infinities.
    """

    max_abs: float
    max_rel: float
    cosine: float | None
    agreement: float | None
    finite: bool
    worst: str
    structure: tuple[str, ...]
    reasons: tuple[str, ...]
    predictions: int = 0
    nothing: bool = False


def compare(a: Any, b: Any, dtypes: bool = True) -> Comparison:
    """Compare two outputs tensor by tensor; `dtypes=False` allows other floating-point types."""
    left, right = dict(leaves(a)), dict(leaves(b))
    total = _Total(structure=_missing(left, right))
    for path, value in left.items():
        if path in right:
            total.add(path, value, right[path], dtypes)
    return Comparison(
        max_abs=total.max_abs,
        max_rel=total.max_rel,
        cosine=total.cosine(),
        agreement=total.agreed / total.classified if total.classified else None,
        finite=total.finite,
        worst=total.worst,
        structure=tuple(total.structure),
        reasons=(*total.structure, *total.values),
        predictions=total.classified,
        nothing=0 < total.numbers == total.unknown,
    )


def _missing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    gone = [path for path in left if path not in right]
    new = [path for path in right if path not in left]
    reasons = []
    if gone:
        reasons.append(f"{len(gone)} of {len(left)} values are missing: {some(gone)}")
    if new:
        reasons.append(f"{len(new)} values are new: {some(new)}")
    return reasons


@dataclass
class _Total:
    """Running totals over the pairs of one comparison."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    dot: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    agreed: int = 0
    classified: int = 0
    numbers: int = 0
    unknown: int = 0
    finite: bool = True
    worst: str = ROOT
    structure: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    def add(self, path: str, a: Any, b: Any, dtypes: bool) -> None:
        """Add one pair of values, found at `path`."""
        a, b = _as_tensor(a), _as_tensor(b)
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if type(a) is not type(b):
                self.structure.append(f"{path}: {_show(a)} became {_show(b)}")
            elif not _equal_objects(a, b):
                self.values.append(f"{path}: {_show(a)} became {_show(b)}")
            return
        floating = _is_floating(a) and _is_floating(b)
        if a.shape != b.shape:
            # What a list holds per image (detections) is as long as the values make it.
            varies = "[" in path and a.ndim == b.ndim and a.shape[1:] == b.shape[1:]
            kind = self.values if varies else self.structure
            kind.append(f"{path}: shape {tuple(a.shape)} became {tuple(b.shape)}")
        elif (dtypes or not floating) and a.dtype != b.dtype:
            self.structure.append(f"{path}: {_name(a.dtype)} became {_name(b.dtype)}")
        elif floating:
            self._add_floating(path, _wide(a), _wide(b).to(a.device))
        elif differing := int((a != b.to(a.device)).sum()):
            self.values.append(f"{path}: {differing} of {a.numel()} {_name(a.dtype)} values differ")

    def _add_floating(self, path: str, a: torch.Tensor, b: torch.Tensor) -> None:
        self.finite = self.finite and bool(b.isfinite().all())
        if not a.numel():
            return
        self.values += _special_values(path, a, b)
        plain = a.isfinite() & b.isfinite()
        self.numbers += a.numel()
        self.unknown += int(a.isnan().sum())
        unknown = a.isnan() | b.isnan()
        if not bool(plain.all()):
            a, b = a.where(plain, torch.zeros_like(a)), b.where(plain, torch.zeros_like(b))
        distance = float((a - b).abs().max())
        scale = float(a.abs().max())
        relative = distance / scale if scale else (math.inf if distance else 0.0)
        self.max_abs = max(self.max_abs, distance)
        if relative > self.max_rel:
            self.max_rel, self.worst = relative, path
        self.dot += float((a * b).sum())
        self.square_a += float((a * a).sum())
        self.square_b += float((b * b).sum())
        self._classify(a, b, unknown)

    def _classify(self, a: torch.Tensor, b: torch.Tensor, unknown: torch.Tensor) -> None:
        """Count equal top-1 classes: over channels for images, else over the last axis.

        Predictions with a NaN among their values (`unknown`) are left out.
        """
        if a.ndim < 2:
            return
        axis = 1 if a.ndim >= _CLASS_AXIS_FIRST_FROM else -1
        if a.shape[axis] < 2:
            return
        chosen = a.gather(axis, b.argmax(axis, keepdim=True))
        known = ~unknown.any(axis, keepdim=True)
        same = (chosen == a.amax(axis, keepdim=True)) & known
        self.agreed += int(same.sum())
        self.classified += int(known.sum())

    def cosine(self) -> float | None:
        """Return the cosine similarity over all pairs, None without any values."""
        if not self.square_a or not self.square_b:
            return 1.0 if self.square_a == self.square_b and self.classified else None
        return self.dot / math.sqrt(self.square_a) / math.sqrt(self.square_b)


def _special_values(path: str, a: torch.Tensor, b: torch.Tensor) -> list[str]:
    reasons = []
    nan = int((a.isnan() != b.isnan()).sum())
    if nan:
        reasons.append(f"{path}: NaN in other places ({nan} of {a.numel()})")
    infinite = int(((a.isinf() | b.isinf()) & ~a.isnan() & ~b.isnan() & (a != b)).sum())
    if infinite:
        reasons.append(f"{path}: infinite in other places ({infinite} of {a.numel()})")
    return reasons


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, float | complex):
        return torch.tensor(
            value, dtype=torch.float64 if isinstance(value, float) else torch.complex128
        )
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        if plain.is_quantized:
            plain = plain.dequantize()
        return plain.to_dense() if plain.layout != torch.strided else plain
    return value


def _equal_objects(a: Any, b: Any) -> bool:
    if a is None or isinstance(a, bool | int | str | bytes):
        return bool(a == b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return True


def _is_floating(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _wide(value: torch.Tensor) -> torch.Tensor:
    if value.is_complex():
        return torch.view_as_real(value.to(torch.complex128).resolve_conj())
    if value.device.type == "mps":
        value = value.cpu()
    return value.to(torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_name(value.dtype)}{tuple(value.shape)}"
    return repr(value) if isinstance(value, bool | int | str | None) else type(value).__name__
