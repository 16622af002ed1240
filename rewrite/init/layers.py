"""What one module needs to be initialized, and doing it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.graph.operators import Activation, conv_of, linear_of
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.init.draw import refusal
from rewrite.init.draw_recipe import Draw, DrawnTensors, Fill, block_shape
from rewrite.init.following_activation import activation_gain, following_activation
from rewrite.init.rules import Rule
from rewrite.outcomes import Skip
from rewrite.weights.assign import assign, assign_refusal, is_frozen, old_hooks
from rewrite.weights.fans import LinearMap, gate_names, linear_maps
from rewrite.weights.layout import Layout
from rewrite.weights.weight_norm import has_old_weight_norm

RuleFor = Callable[[str], Rule | None]


@dataclass(frozen=True)
class Weight:
    """A parameter to draw: its rule, its linear maps (none for a free parameter), its ties."""

    key: str
    rule: Rule
    maps: tuple[LinearMap, ...]
    ties: tuple[TensorRef, ...] = ()
    following: Activation | None = None

    @property
    def gain(self) -> float:
        """The gain of the activation that follows."""
        return activation_gain(self.following)

    def describe(self) -> str:
        """Return the scheme in words, with the gain where the graph chose it."""
        if not self.rule.scheme.follows_graph or not self.maps:
            return self.rule.text
        name = self.following.name if self.following is not None else "no activation"
        return f"{self.rule.text}, gain {self.gain:.4g} ({name})"


@dataclass
class ModulePlan:
    """What is done to one module: weights to draw, and tensors to reset to a constant."""

    module: nn.Module
    weights: list[Weight] = field(default_factory=list)
    resets: dict[str, float] = field(default_factory=dict)
    note: str = ""


def functional_weights(captured: Captured) -> dict[str, LinearMap]:
    """Return the linear maps of the weights that code applies, by qualified name."""
    found: dict[str, LinearMap] = {}
    for node in captured.nodes():
        conv, linear = conv_of(captured, node), linear_of(captured, node)
        if conv is not None and conv.module is None:
            shape = captured.tensor(conv.weight).shape
            layout = Layout(conv.transposed, conv.groups)
            positions = shape[2:].numel()
            stride = torch.Size(conv.stride).numel()
            first, second = shape[0] // conv.groups * positions, shape[1] * positions
            fans = (first / stride, second) if conv.transposed else (second, first / stride)
            found[conv.weight.name] = LinearMap(conv.weight.attr, layout, *fans)
        elif linear is not None and linear.module is None:
            rows, columns = captured.tensor(linear.weight).shape
            found[linear.weight.name] = LinearMap(linear.weight.attr, Layout(), columns, rows)
    return found


def module_plan(
    captured: Captured,
    name: str,
    module: nn.Module,
    rule_for: RuleFor,
    drawn: set[int],
    applied: dict[str, LinearMap],
    *,
    include_frozen: bool,
) -> tuple[ModulePlan, list[Skip]]:
    """Decide about every parameter and statistic that `module` itself holds."""
    plan, skips = ModulePlan(module), list[Skip]()
    before = type(module).__name__.removeprefix("Parametrized")
    maps = _maps(name, module, applied)
    norm = _is_norm(module)
    for key in _own_keys(module):
        weight = module._parameters.get(key)
        if weight is not None and id(weight) in drawn:
            continue
        rule = rule_for(key)
        if rule is None:
            skips.append(Skip(name, before, f"{key} is named by no rule"))
            continue
        if not include_frozen and is_frozen(module, key):
            skips.append(Skip(name, before, f"{key} is frozen; pass frozen=true to draw it too"))
            continue
        if (reason := assign_refusal(module, key)) is not None:
            skips.append(Skip(name, before, reason))
            continue
        constant = _constant(module, key, norm=norm, has_maps=bool(maps))
        if constant is not None:
            plan.resets[key] = constant
            continue
        chosen = _weight(captured, name, module, key, rule, maps.get(key, ()))
        if isinstance(chosen, str):
            skips.append(Skip(name, before, f"{key}: {chosen}"))
            continue
        if weight is not None:
            drawn.add(id(weight))
        plan.weights.append(chosen)
    if norm and (rule_for("running_mean") is not None):
        plan.resets |= _statistics(module)
    return plan, skips


def _maps(
    name: str, module: nn.Module, applied: dict[str, LinearMap]
) -> dict[str, tuple[LinearMap, ...]]:
    found: dict[str, list[LinearMap]] = {}
    for linear_map in linear_maps(module):
        found.setdefault(linear_map.parameter, []).append(linear_map)
    for key in module._parameters:
        full = f"{name}.{key}" if name else key
        if key not in found and full in applied:
            found[key] = [applied[full]]
    return {key: tuple(items) for key, items in found.items()}


def _own_keys(module: nn.Module) -> list[str]:
    """Return the parameters of a module by the names its code uses, parametrized ones included."""
    hooked = tuple(old_hooks(module))
    hidden = {f"{key}_{part}" for key in has_old_weight_norm(module) for part in "gv"}
    hidden |= {f"{key}_orig" for key in hooked}
    old = (*has_old_weight_norm(module), *hooked)
    plain = [k for k, p in module._parameters.items() if p is not None and k not in hidden]
    parametrized = module._modules.get("parametrizations")
    chains = list(parametrized) if isinstance(parametrized, nn.ModuleDict) else []
    return [*old, *chains, *plain]


def _is_norm(module: nn.Module) -> bool:
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
    if isinstance(module, known):
        return True
    # A norm of somebody's own: by its name, and by holding nothing but vectors.
    return "norm" in type(module).__name__.lower() and all(
        p.dim() <= 1 for p in module._parameters.values() if p is not None
    )


def _constant(module: nn.Module, key: str, *, norm: bool, has_maps: bool) -> float | None:
    """Return the value of a parameter that is not drawn, or None."""
    if norm and key in ("weight", "gamma", "scale", "g"):
        return _identity_scale(module, key)
    if norm and key in ("bias", "beta"):
        return 0.0
    if isinstance(module, nn.PReLU):
        return 0.25
    named = "bias" in key.split("_")
    return 0.0 if named and has_maps else None


def _identity_scale(module: nn.Module, key: str) -> float:
    """Return the scale of a norm that only normalizes: 1, or 0 where its code adds 1 or its input.

    With all parameters zero the first kind says nothing about its input, the second does.
    """
    scale = module._parameters[key]
    if type(module).__module__.startswith("torch.nn.") or scale is None:
        return 1.0
    trial, size = copy.deepcopy(module), scale.numel()
    zeros = {name: torch.zeros_like(p) for name, p in trial.named_parameters()}
    random = torch.Generator().manual_seed(0)
    for shape in ((2, size), (2, 3, 3, size), (2, size, 3, 3)):
        one, other = (torch.randn(shape, generator=random).to(scale) for _ in range(2))
        try:
            with torch.no_grad():
                first, second = (functional_call(trial, zeros, (x,)) for x in (one, other))
                return 1.0 if torch.equal(first, second) else 0.0
        except Exception:  # noqa: BLE001 - a forward may raise anything; try a layout more
            continue
    return 1.0


def _statistics(module: nn.Module) -> dict[str, float]:
    fresh = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0.0}
    return {k: v for k, v in fresh.items() if module._buffers.get(k) is not None}


def _weight(
    captured: Captured,
    name: str,
    module: nn.Module,
    key: str,
    rule: Rule,
    maps: tuple[LinearMap, ...],
) -> Weight | str:
    shape = getattr(module, key).shape
    for linear_map in maps or (None,):
        block = shape if linear_map is None else block_shape(linear_map, shape)
        if (reason := refusal(rule.scheme, linear_map, block)) is not None:
            return reason
    ties: tuple[TensorRef, ...] = ()
    if key in module._parameters:
        ref = TensorRef(name, key)
        same = captured.tensor(ref)
        ties = tuple(r for r in captured.tied(ref) if captured.tensor(r) is same)
    following = None
    if len(maps) == 1 and rule.scheme.follows_graph:
        following = following_activation(captured, _calls(captured, name, module, key))
    return Weight(key, rule, maps, ties, following)


def _calls(captured: Captured, name: str, module: nn.Module, key: str) -> tuple[torch.fx.Node, ...]:
    if linear_maps(module):
        return captured.calls(name)
    full = f"{name}.{key}" if name else key
    found = []
    for node in captured.nodes():
        applied = conv_of(captured, node) or linear_of(captured, node)
        if applied is not None and applied.module is None and applied.weight.name == full:
            found.append(node)
    return tuple(found)


# -- writing -------------------------------------------------------------------------------------


def write(
    captured: Editable, name: str, plan: ModulePlan, seed: int, forget_bias: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Initialize one module.

    Returns:
        The standard deviation of each weight that was drawn, and the recipe: an empty one where a
        weight is computed of others, through which it was written.
    """
    metrics: dict[str, float] = {}
    tensors: list[tuple[tuple[str, ...], Draw | Fill]] = []
    for weight in plan.weights:
        made = _drawn(name, plan.module, weight, seed)
        old = getattr(plan.module, weight.key)
        value = old.detach() if old.is_meta else made.values(old.shape)
        ties = [(captured.module(ref.owner), ref.attr) for ref in weight.ties]
        plan.note = "; ".join(
            filter(None, [plan.note, assign(captured.editor, plan.module, weight.key, value, ties)])
        )
        if not old.is_meta:
            metrics[f"std {weight.key}"] = float(value.std(correction=0)) if value.numel() else 0.0
        names = [TensorRef(place, weight.key).name for place in (name, *captured.aliases(name))]
        tensors.append((tuple(dict.fromkeys((*names, *(r.name for r in weight.ties)))), made))
    for key, constant in plan.resets.items():
        fill = _fill(plan.module, key, constant, forget_bias)
        _reset(captured.editor, plan.module, key, fill)
        names = [TensorRef(place, key).name for place in (name, *captured.aliases(name))]
        tensors.append((tuple(names), fill))
    held = plan.module._parameters.keys() | plan.module._buffers.keys()
    plain = {*(weight.key for weight in plan.weights), *plan.resets} <= held
    plain = plain and not old_hooks(plan.module) and not has_old_weight_norm(plan.module)
    return metrics, DrawnTensors(name, tuple(tensors)).to_data() if plain else {}


def _drawn(name: str, module: nn.Module, weight: Weight, seed: int) -> Draw:
    stem = f"{name}." if name else ""
    padding = getattr(module, "padding_idx", None)
    if not weight.maps or not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        padding = None
    gain = weight.gain if weight.maps else 1.0
    return Draw(weight.rule.scheme, seed, stem, weight.key, weight.maps, gain, padding)


def _fill(module: nn.Module, key: str, constant: float, forget_bias: float) -> Fill:
    if not isinstance(module, nn.LSTM | nn.LSTMCell) or not key.startswith("bias_ih"):
        return Fill(constant)
    size = getattr(module, key).shape[0] // len(gate_names(module))
    return Fill(constant, (size, 2 * size, forget_bias))


def _reset(writer: TensorWriter, module: nn.Module, key: str, fill: Fill) -> None:
    if (buffer := module._buffers.get(key)) is not None:
        if not is_lazy(buffer):
            writer.write(module, key, torch.full_like(buffer, fill.value))
        return
    old = getattr(module, key)
    assign(writer, module, key, old.detach() if old.is_meta else fill.values(old.shape))
