"""What the three norm swaps share: finding every BatchNorm, and putting another norm in its place.

BatchNorm in eval mode: y = γ (x − μ) / √(σ² + ε) + β per channel. The norm that comes in keeps γ,
β, ε, dtype, device, mode and `requires_grad`: the very Parameter objects move over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rewrite.affine.tensor_readers import TensorReaders
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.operators import Norm, conv_of, norm_of
from rewrite.outcomes import Change, Site, Skip
from rewrite.runtime.tree import join


@dataclass(frozen=True)
class Candidate:
    """One BatchNorm, however it is spelled, with all of its calls.

    Attributes:
        norm: its first call.
        before: how reports show it.
        num_features: its number of channels.
        shapes: the input's shape at each call; None where unknown.
    """

    norm: Norm
    before: str
    num_features: int
    shapes: tuple[torch.Size | None, ...]

    @property
    def target(self) -> str:
        """The qualified name to report."""
        return self.norm.target

    @property
    def positions(self) -> int | None:
        """The smallest number of positions a channel has (H·W), or None if a call's is unknown."""
        if any(shape is None for shape in self.shapes):
            return None
        return min(shape[2:].numel() for shape in self.shapes if shape is not None)


def find_batch_norms(captured: Captured) -> Iterator[Candidate | Skip]:
    """Yield every BatchNorm once, in data-flow order; those that cannot be replaced as `Skip`."""
    met: set[object] = set()
    owners: set[str] = set()
    for node in captured.nodes():
        norm = norm_of(captured, node)
        if norm is None or norm.kind != "batch":
            continue
        calls = captured.call_sites(node)
        # A module that only lends its tensors to a function call was met with that call.
        if node in met or norm.module in owners:
            continue
        met.update(calls)
        owners.update((norm.target, *_holders(norm)))
        yield _candidate(captured, norm)
    yield from _unseen(captured, owners)


def _holders(norm: Norm) -> tuple[str, ...]:
    """Return the modules that hold the norm's tensors: `F.batch_norm(x, self.bn.running_mean…)`."""
    return tuple({ref.owner for ref in (norm.running_mean, norm.weight) if ref is not None})


def _candidate(captured: Captured, norm: Norm) -> Candidate | Skip:
    before = describe(captured, norm)
    if norm.module is not None and (altered := captured.unsteady(norm.module)) is not None:
        return Skip(norm.target, before, altered)
    hooks = captured.hooks(norm.module) if norm.module is not None else ()
    if hooks:
        return Skip(norm.target, before, f"{hooks[0]}; remove it first, it would be lost")
    if norm.module is not None and (holder := _fused_holder(captured, norm.module)) is not None:
        reason = f"belongs to {holder}, fused for quantization: convert the float model instead"
        return Skip(norm.target, before, reason)
    called = norm.module if norm.node.op == "call_module" else None
    if called is not None and (held := captured.code.exchanged(called)) is not None:
        return Skip(norm.target, before, held)
    if norm.num_features is None:
        return Skip(norm.target, before, "has neither parameters nor statistics: channels unknown")
    if (refusal := captured.lines.refusal(norm.node)) is not None:
        return Skip(norm.target, before, refusal)
    shapes = tuple(
        captured.shape(call.all_input_nodes[0]) for call in captured.call_sites(norm.node)
    )
    return Candidate(norm, before, norm.num_features, shapes)


def _fused_holder(captured: Captured, name: str) -> str | None:
    """Return the layer of torch.ao around a norm that reads its statistics by itself, or None."""
    for parent in captured.tree.parents(name):
        module = captured.module(parent)
        fused = type(module).__module__.startswith("torch.ao.nn.")
        if fused and type(module).forward is not nn.Sequential.forward:
            return parent
    return None


def _unseen(captured: Captured, owners: set[str]) -> Iterator[Skip]:
    """Yield what holds running statistics although no call of a batch norm was seen for it."""
    for name, module in captured.tree.modules():
        # Its own: what a wrapper hands on by `__getattr__` is another module's.
        mean = {**vars(module), **module._parameters, **module._buffers}.get("running_mean")
        if name in owners or mean is None:
            continue
        before = type(module).__name__
        held = (mean, module._parameters.get("weight"))
        tensors = [tensor for tensor in held if tensor is not None]
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            continue
        if any(isinstance(t, torch.Tensor) and is_lazy(t) for t in tensors):
            reason = "is lazy and has seen no input: run one batch through the model first"
        elif name in captured.opaque:
            reason = f"its forward cannot be traced: {captured.opaque[name].reason}"
        elif type(module).__module__.startswith("torch.ao."):
            reason = "is quantized or fused for quantization: convert the float model instead"
        else:
            reason = "its forward calls no batch_norm: a constant map, no batch statistics"
        yield Skip(name, before, reason)
    for name, scripted in captured.tree.scripted():
        for path, module in scripted.named_modules():
            kind = str(getattr(module, "original_name", ""))
            if "BatchNorm" in kind:
                reason = "is TorchScript, whose code is compiled: convert the eager model instead"
                yield Skip(join(name, path) if path else name, kind, reason)


def describe(captured: Captured, norm: Norm) -> str:
    """Return how reports show a norm: "BatchNorm2d(64)", "BatchNormAct2d(64)", "batch_norm(64)"."""
    channels = norm.num_features if norm.num_features is not None else "?"
    owner = captured.module(norm.target)
    if norm.module is not None or isinstance(owner, nn.modules.batchnorm._NormBase):
        return f"{type(owner).__name__}({channels})"
    return f"{norm.node.target.__name__}({channels})"  # type: ignore[union-attr]  # a functional norm is a function


def copy_affine(captured: Editable, norm: Norm, module: nn.Module) -> None:
    """Give `module` the γ and β of `norm`: the very parameters, or None."""
    for key, ref in (("weight", norm.weight), ("bias", norm.bias)):
        captured.editor.share(module, key, _parameter(captured, ref))


def install(captured: Editable, norm: Norm, module: nn.Module) -> tuple[str, str]:
    """Put `module` where `norm` is.

    Returns:
        The qualified name under which `module` stands now, and what to say about the rest of a
        forward that held the norm as a line of code.
    """
    if norm.module is not None and norm.node.op == "call_module":
        captured.editor.replace(norm.module, module)
        return norm.module, ""
    name = captured.editor.substitute(norm.node, module, "norm", holder=norm.target)
    owner = captured.module(captured.owner(norm.node))
    return name, f"the rest of {type(owner).__name__}'s forward is kept"


def _parameter(captured: Captured, ref: TensorRef | None) -> nn.Parameter | None:
    if ref is None:
        return None
    tensor = captured.tensor(ref)
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def describe_norm(module: nn.Module) -> str:
    """Return a norm in short: "GroupNorm(32, 64)"."""
    if isinstance(module, nn.GroupNorm):
        return f"GroupNorm({module.num_groups}, {module.num_channels})"
    if isinstance(module, nn.LayerNorm):
        return f"{type(module).__name__}({module.normalized_shape[0]})"
    return f"{type(module).__name__}({getattr(module, 'num_features', '')})"


def affine_note(norm: Norm) -> str:
    """Say which of γ and β the norm lacks, which the new norm lacks too."""
    if norm.weight is None and norm.bias is None:
        return "no γ and β, as before"
    if norm.bias is None:
        return "no β, as before"
    return "no γ, as before" if norm.weight is None else ""


def sites(captured: Captured, decide: Callable[[Candidate], object]) -> Iterator[Site | Skip]:
    """Yield a `Site` for each candidate that `decide` plans and a `Skip` for each it declines."""
    for candidate in find_batch_norms(captured):
        if isinstance(candidate, Skip):
            yield candidate
            continue
        plan = decide(candidate)
        if isinstance(plan, str):
            yield Skip(candidate.target, candidate.before, plan)
        else:
            yield Site(candidate.target, candidate.before, candidate.norm.node, plan)


def reader_of(captured: Captured, readers: TensorReaders, norm: Norm) -> str | None:
    """Return what else than the norm reads its γ or β, in words, or None."""
    calls = captured.call_sites(norm.node) if norm.module is None else ()
    found = (readers.reader(ref, calls) for ref in (norm.weight, norm.bias) if ref is not None)
    return next((reader for reader in found if reader is not None), None)


def spatial_axes(captured: Captured, candidate: Candidate) -> int | str:
    """Return how many spatial axes there are, by shape, by class, or by what feeds the norm."""
    known = {len(shape) - 2 for shape in candidate.shapes if shape is not None}
    if len(known) > 1:
        return "is called with inputs of different dimensions"
    if known:
        return known.pop()
    owner = captured.module(candidate.target)
    for axes, kind in ((2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        if isinstance(owner, kind):
            return axes
    fed_by = conv_of(captured, candidate.norm.input)
    if fed_by is not None:
        return fed_by.dims
    return "may get (N, C) input, which has no positions; pass an example input to show its shape"


def exchange_class(
    captured: Editable, site: Site, kind: type[nn.modules.batchnorm._BatchNorm]
) -> Change:
    """Replace a norm by one of class `kind`, with the very same tensors."""
    assert site.node is not None
    norm = norm_of(captured, site.node)
    assert norm is not None and norm.num_features is not None
    tracks = norm.running_mean is not None
    with torch.device("meta"):
        module = kind(
            norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=tracks
        )
    copy_affine(captured, norm, module)
    _give_statistics(captured, norm, module)
    name, kept = install(captured, norm, module)
    captured.keep_stored(name, module)
    after = f"{kind.__name__}({norm.num_features})"
    return Change(site.target, site.before, after, kept, (site.target, name))


def _give_statistics(captured: Editable, norm: Norm, module: nn.Module) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    captured.editor.share(module, "running_mean", captured.tensor(norm.running_mean))
    captured.editor.share(module, "running_var", captured.tensor(norm.running_var))
    owner = captured.module(norm.running_mean.owner)
    counter = getattr(owner, "num_batches_tracked", None)
    if not isinstance(counter, torch.Tensor):
        device = captured.tensor(norm.running_mean).device
        counter = torch.zeros((), dtype=torch.long, device=device)
    captured.editor.share(module, "num_batches_tracked", counter)
