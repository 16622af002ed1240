"""Signal propagation: what Glorot & Bengio (2010) plotted, for any model.

    forward    per layer and activation: mean and standard deviation of the output, share of
               saturated elements (|f'(z)| < 0.01), share of dead units (saturated everywhere)
    backward   standard deviation of dL/d(output) and of dL/d(weight)
    between    singular values of J = d(layer's output) / d(output of the layer before it)

One forward and one backward: statistics are taken while the tensors pass, so memory is that of a
training step. Calls are watched as they are made (`TorchFunctionMode`), not traced: a functional
`F.relu` is seen like a module, the order is that of the data flow, and untraceable models work too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from rewrite.errors import VerificationError
from rewrite.graph.spellings import ACTIVATION_NAMES
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.leaves import tensors
from rewrite.signals.jacobian import Jacobian, layer_jacobians
from rewrite.signals.report import Signal
from rewrite.signals.rows import SignalRow

_LAYERS: dict[Any, int] = {
    # Function -> axis of the units in its output.
    F.linear: -1,
    torch.addmm: -1,
    F.bilinear: -1,
    F.embedding: -1,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), 1),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1),
}


_SLOPE = 0.01


def signal(
    model: nn.Module,
    example_inputs: Any,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    jacobians: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Signal:
    """Measure how activations and gradients propagate through `model`, in the mode it is in.

    Nothing of the model changes: it runs on detached parameters and copies of its buffers.

    Args:
        model: any model.
        example_inputs: a batch: a tensor, a tuple of positional inputs, or a dict.
        loss: makes a scalar of the model's output; by default every output element is given a
            gradient drawn from N(0, 1), divided by the batch size.
        jacobians: whether to compute singular values between consecutive layers, on one sample.
        seed: of that draw, and of whatever the model draws.
        progress: called with a line as each layer's Jacobian begins.

    Raises:
        VerificationError: the model does not run on the inputs, or nothing there has a gradient.
    """
    inputs = Inputs.of(example_inputs)
    notes: list[str] = []
    with _forked(seed):
        watch = _Watch(model)
        output, state = _run(model, inputs, watch)
        _backward(output, loss, seed)
        del output
    found: dict[int, Jacobian] = {}
    if jacobians:
        with _forked(seed):
            recorder = _Recorder(model)
            sample = inputs if _mixes_batch(model) else _first_sample(inputs)
            output, state = _run(model, sample, recorder)
            found = layer_jacobians(recorder.outputs, notes, seed, progress or (lambda _: None))
            del output, state
    return Signal(tuple(watch.finished(found)), tuple(notes))


@contextlib.contextmanager
def _forked(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def _run(model: nn.Module, inputs: Inputs, mode: _Watch | _Recorder) -> tuple[Any, Any]:
    state = {
        **{n: p.detach().requires_grad_(_floats(p)) for n, p in _named(model, "parameters")},
        **{n: b.detach().clone() for n, b in _named(model, "buffers")},
    }
    args, kwargs = tree_map(_leaf, (inputs.args, dict(inputs.kwargs)))
    try:
        with mode.names(), mode:
            output = torch.func.functional_call(
                model, state, args, kwargs, tie_weights=True, strict=False
            )
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(f"the model does not run on the input: {error}") from error
    return output, state


def _named(model: nn.Module, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield from getattr(model, f"named_{what}")(remove_duplicate=True)


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _backward(output: Any, loss: Callable[[Any], torch.Tensor] | None, seed: int) -> None:
    if loss is not None:
        loss(output).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return
    found = [t for t in tensors(output) if t.requires_grad]
    if not found:
        raise VerificationError("no output of the model depends on a parameter or a float input")
    draws = torch.Generator().manual_seed(seed)
    gradients = [
        (torch.randn(t.shape, generator=draws) / max(1, t.shape[0] if t.dim() else 1)).to(t)
        for t in found
    ]
    torch.autograd.backward(found, gradients)


def _mixes_batch(model: nn.Module) -> bool:
    """Return whether a sample's output depends on the others of its batch."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, batch_norm) and m.training for m in model.modules())


def _first_sample(inputs: Inputs) -> Inputs:
    """Return the first sample of a batch, if all its tensors agree on what the batch is."""
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    sizes = {t.shape[0] for t in leaves if isinstance(t, torch.Tensor) and t.dim() > 1}
    if len(sizes) != 1:
        return inputs

    def first(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.dim() > 1
        return value[:1] if batched else value

    args, kwargs = tree_map(first, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


# -- watching ------------------------------------------------------------------------------------


class _Named(TorchFunctionMode):
    """Knows, at each call of a function, the module whose forward makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._stack: list[str] = [""]

    @contextlib.contextmanager
    def names(self) -> Iterator[None]:
        """Follow the model's forwards while it runs."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entered(name), prepend=True))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str) -> Callable[..., None]:
        return lambda *_: self._stack.append(name)

    def _left(self, *_: Any) -> None:
        self._stack.pop()

    @property
    def owner(self) -> str:
        """The innermost module."""
        return self._stack[-1]


@dataclass
class _Draft:
    """A row while its gradients are still to come."""

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    std: float
    saturated: float | None = None
    dead: float | None = None
    gradients: dict[str, float] = field(default_factory=dict)

    def note_gradient(self, key: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self.gradients[key] = _std(gradient)

        return hook


class _Watch(_Named):
    """Takes statistics of layers and activations as they are called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.drafts: list[_Draft] = []
        self._axis = -1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        activation = _activation_name(func)
        local = _slopes(func, args, kwargs) if activation is not None else None
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        if func in _LAYERS:
            self._axis = _LAYERS[func]
            draft = self._draft(func.__name__, out)
            weight = _weight_of(func, args, kwargs)
            if isinstance(weight, torch.Tensor) and weight.requires_grad:
                weight.register_hook(draft.note_gradient("weight"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        elif activation is not None and local is not None:
            draft = self._draft(activation, out)
            draft.saturated, draft.dead = _saturation(local, self._axis)
        else:
            return out
        if out.requires_grad:
            out.register_hook(draft.note_gradient("output"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return out

    def _draft(self, kind: str, out: torch.Tensor) -> _Draft:
        values = out.detach()
        wide = values.float() if values.element_size() < 4 else values
        draft = _Draft(self.owner, kind, tuple(out.shape), float(wide.mean()), _std(wide))
        self.drafts.append(draft)
        return draft

    def finished(self, jacobians: dict[int, Jacobian]) -> Iterator[SignalRow]:
        """Yield the rows; `jacobians` belong to layers by their number."""
        number = 0
        for draft in self.drafts:
            jacobian = None
            if draft.saturated is None:
                jacobian = jacobians.get(number)
                number += 1
            yield SignalRow(
                draft.name, draft.kind, draft.shape, draft.mean, draft.std, draft.saturated,
                draft.dead, draft.gradients.get("output"), draft.gradients.get("weight"), jacobian,
            )  # fmt: skip


class _Recorder(_Named):
    """Keeps the output of each layer, apart from what in-place code does to it later."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.outputs: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _LAYERS or not isinstance(out, torch.Tensor):
            return out
        self.outputs.append((self.owner, out))
        return out.clone()


def _activation_name(func: Any) -> str | None:
    name = getattr(func, "__name__", "").rstrip("_")
    return name if name in ACTIVATION_NAMES else None


def _weight_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position = 2 if func is torch.addmm else 1
    return args[position] if len(args) > position else kwargs.get("weight")


def _slopes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return |f'(z)| of an elementwise function at its input."""
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return None
    z = args[0].detach().clone().requires_grad_()
    rest = [a.detach() if isinstance(a, torch.Tensor) else a for a in args[1:]]
    y = func(z.clone(), *rest, **kwargs)  # a clone, since the function may work in place
    if not isinstance(y, torch.Tensor) or y.shape != z.shape:
        return None
    (slope,) = torch.autograd.grad(y.sum(), z)
    return slope.abs()


def _saturation(slopes: torch.Tensor, axis: int) -> tuple[float, float]:
    flat = slopes < _SLOPE
    share = float(flat.float().mean())
    units = flat.movedim(axis if flat.dim() > 1 else 0, 0).flatten(1)
    return share, float(units.all(1).float().mean())


def _std(values: torch.Tensor) -> float:
    values = values.detach()
    wide = values.float() if values.element_size() < 4 else values
    return float(wide.std(correction=0))
