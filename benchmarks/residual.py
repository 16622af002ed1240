"""Zeros at the end of residual branches, over the residual families of timm and torchvision.

    python -m benchmarks.residual                 ten minutes; resumable
    python -m benchmarks.residual --summarize     docs/residual_coverage.md from the results

Per family one architecture, the smallest, in float64 with random weights: the additions of two
computed values in its graphs, how many of them are residual, how many of their branches
`Reinitialize(residual="zero")` switches off, and a proof for each: the graph is run, and where a
branch was switched off its value is exactly zero and the sum is exactly the shortcut. The model
before that is the control: there the branches have to be alive.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from benchmarks.corpus import UnbuildableError, fit_inputs, make
from benchmarks.sweep.rows import complete, read
from passes import Reinitialize
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.init.residual import Residual, residual_branches
from rewrite.init.residual_tails import is_sum
from rewrite.pipeline import convert
from rewrite.runtime.float64 import KeepFloat64
from rewrite.runtime.modes import widen
from rewrite.tracing.regions import Region

RESULTS = Path(__file__).parent / "residual.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "residual_coverage.md"

# Ordered so that a run that is stopped has seen the best known first.
_TIMM = """
resnet18 vit_tiny_patch16_224 convnext_atto mobilenetv3_small_050 efficientnet_b0 regnety_002
nf_resnet26 eca_nfnet_l0 res2net50_14w_8s resnest14d dpn48b dla34 hrnet_w18_small darknet17
cspresnet50 coatnet_pico_rw_224 mixer_s32_224 levit_128s efficientformer_l1 poolformer_s12
convformer_s18 densenet121 swin_tiny_patch4_window7_224 mobilenetv2_035 resnetv2_50
maxvit_nano_rw_256 mobileone_s0 repvgg_a0 fastvit_t8 ghostnet_050 hgnetv2_b0 convnextv2_atto
seresnet18 skresnet18 caformer_s18 poolformerv2_s12 resmlp_12_224 gmlp_s16_224 gmixer_12_224
xcit_nano_12_p8_224 cait_xxs24_224 pit_ti_224 pvt_v2_b0 mobilevit_xxs mobilevitv2_050
edgenext_xx_small inception_next_atto rexnet_100 repvit_m0_9 starnet_s050 shvit_s1 fasternet_t0
swiftformer_xs tiny_vit_5m_224 efficientvit_b0 efficientvit_m0 efficientformerv2_s0
lambda_resnet26t botnet26t_256 halonet26t ese_vovnet19b_dw vovnet39a mambaout_femto
crossvit_tiny_240 visformer_tiny davit_tiny focalnet_tiny_srf hiera_tiny_224 mvitv2_tiny
twins_svt_small convit_tiny swinv2_tiny_window8_256 deit_tiny_patch16_224 regnetz_005
ghostnetv3_050 efficientvim_m1 csatv2 nest_tiny sequencer2d_s coat_tiny convmixer_768_32
volo_d1_224 rdnet_tiny xception41 inception_resnet_v2 wide_resnet50_2 resnext50_32x4d
samvit_base_patch16 beit_base_patch16_224
"""
_TORCHVISION = """
resnet18 regnet_y_400mf mobilenet_v2 mobilenet_v3_small mnasnet0_5 efficientnet_b0 swin_t
shufflenet_v2_x0_5 densenet121 vit_b_16 convnext_tiny r3d_18 maxvit_t raft_small swin_v2_t
efficientnet_v2_s wide_resnet50_2 resnext50_32x4d mc3_18 r2plus1d_18 swin3d_t squeezenet1_0
googlenet inception_v3 lraspp_mobilenet_v3_large fcn_resnet50 ssdlite320_mobilenet_v3_large
"""
FAMILIES = tuple(
    f"{package}:{name}"
    for package, names in (
        ("timm", _TIMM.split()[:25]),
        ("torchvision", _TORCHVISION.split()[:13]),
        ("timm", _TIMM.split()[25:]),
        ("torchvision", _TORCHVISION.split()[13:]),
    )
    for name in names
)


def main() -> int:
    """Measure what has no result yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one")
    parser.add_argument("--summarize", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    if not options.summarize:
        complete(RESULTS, FAMILIES, _measured)
    rows = sorted(read(RESULTS), key=lambda row: FAMILIES.index(row["name"]))
    PAGE.write_text(page(rows), encoding="utf-8")
    return 0


def _measured(name: str) -> dict[str, Any]:
    try:
        return measure(name)
    except Exception as error:  # noqa: BLE001 - the row says what went wrong
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:200]}


def measure(name: str) -> dict[str, Any]:
    """Return the row of one architecture."""
    warnings.simplefilter("ignore")
    try:
        model = make(name)
        inputs = widen(_one_sample(fit_inputs(name, model)))
    except UnbuildableError as error:
        return {"name": name, "error": str(error)[:200]}
    model = model.double()
    zeroed = convert(model, [Reinitialize(residual="zero")], verify=False).model
    captured = capture(zeroed)
    found = residual_branches(captured)
    after = observed(captured, found, inputs)
    before = observed(capture(model), None, inputs)
    proved = [residual for residual in found if residual.tails and after.get(_place(residual))]
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "additions": _additions(captured),
        "residual": len(found),
        "zeroed": sum(1 for residual in found if residual.tails),
        "proved": len(proved),
        # Before, every one of these branches has to be something.
        "alive": sum(before.get(_place(residual)) is False for residual in proved),
        "reasons": Counter(_reason(captured, residual) for residual in found if residual.reason),
    }


def _one_sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x[:1] if isinstance(x, torch.Tensor) and x.dim() == 4 else x for x in inputs)


def _place(residual: Residual) -> str:
    return f"{residual.target}/{residual.node}"


def _reason(captured: Captured, residual: Residual) -> str:
    owner = type(captured.module(residual.target)).__name__
    words = [f"[{owner}]" if "." in word else word for word in residual.reason.split()]
    return f"{owner}: {' '.join(words)}"


def _additions(captured: Captured) -> int:
    """Return how many additions take two values, neither of them a parameter."""
    return sum(
        is_sum(node) and sum(source.op != "get_attr" for source in node.all_input_nodes) == 2
        for node in captured.nodes()
    )


# -- the proof -----------------------------------------------------------------------------------


def observed(
    captured: Captured, found: list[Residual] | None, inputs: tuple[Any, ...]
) -> dict[str, bool]:
    """Run the graphs; say per residual whether its branch is zero and its sum the shortcut."""
    found = residual_branches(captured) if found is None else found
    wanted = {residual.node: residual for residual in found if residual.node is not None}
    arguments = _arguments(captured, inputs)
    seen: dict[str, bool] = {}
    with torch.no_grad(), KeepFloat64():
        for region in captured.regions:
            if region.name in arguments and any(n in wanted for n in region.graph.nodes):
                _interpret(captured, region, arguments[region.name], wanted, seen)
    return seen


def _arguments(captured: Captured, inputs: tuple[Any, ...]) -> dict[str, tuple[Any, Any]]:
    """Return what the root of each region is called with."""
    found: dict[str, tuple[Any, Any]] = {"": (inputs, {})}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(name, (_copied(args), _copied(kwargs)))

        return hook

    roots = [region.name for region in captured.regions if region.name]
    hooks = [
        captured.module(name).register_forward_pre_hook(note(name), with_kwargs=True)
        for name in roots
    ]
    with torch.no_grad(), KeepFloat64():
        captured.model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value)


def _interpret(
    captured: Captured,
    region: Region,
    arguments: tuple[Any, Any],
    wanted: dict[Node, Residual],
    seen: dict[str, bool],
) -> None:
    args, kwargs = list(arguments[0]), arguments[1]
    values: dict[Node, Any] = {}
    last = {source: node for node in region.graph.nodes for source in node.all_input_nodes}
    shortcuts = {residual.shortcut for residual in wanted.values()}
    kept: dict[Node, Any] = {}

    def load(argument: Any) -> Any:
        return map_arg(argument, values.__getitem__)

    for node in region.graph.nodes:
        if node.op == "output":
            return
        residual = wanted.get(node)
        if residual is not None:
            assert residual.branch is not None
            assert residual.shortcut is not None
            branch_is_zero = not values[residual.branch].any()
            shortcut = kept[residual.shortcut]
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            values[node] = args.pop(0) if args else kwargs.get(str(node.target), default)
        elif node.op == "get_attr":
            values[node] = _attribute(captured, region, str(node.target))
        elif node.op == "call_module":
            module = captured.module(str(node.target))
            values[node] = module(*load(node.args), **load(node.kwargs))
        elif node.op == "call_method":
            subject, *rest = load(node.args)
            values[node] = getattr(subject, str(node.target))(*rest, **load(node.kwargs))
        else:
            assert callable(node.target)
            values[node] = node.target(*load(node.args), **load(node.kwargs))
        if node in shortcuts:
            kept[node] = values[node].clone()  # code may write into it later
        if residual is not None:
            total = values[node]
            same = torch.equal(total, shortcut.expand_as(total))
            seen[_place(residual)] = branch_is_zero and same
        for source in node.all_input_nodes:
            if last[source] is node:
                del values[source]


def _attribute(captured: Captured, region: Region, name: str) -> Any:
    if name in region.constants:
        return region.constants[name]
    owner, _, attr = name.rpartition(".")
    return getattr(captured.module(owner), attr)


# -- the page ------------------------------------------------------------------------------------


def page(rows: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    good = [row for row in rows if "error" not in row]
    total = {
        key: sum(row[key] for row in good)
        for key in ("additions", "residual", "zeroed", "proved", "alive")
    }
    missing = [name for name in FAMILIES if name not in {row["name"] for row in good}]
    lines = [
        "# Zeros at the end of residual branches",
        "",
        "Written by `python -m benchmarks.residual`: one architecture per family, the smallest, in "
        "float64.",
        "",
        f"- {len(good)} of {len(FAMILIES)} architectures have a result; without one: "
        f"{', '.join(missing) or 'none'}.",
        f"- Of {total['residual']} residual additions, `Reinitialize(residual='zero')` switches "
        f"{total['zeroed']} off.",
        f"- Run, {total['proved']} of these have a branch of exact zeros and a sum that equals the "
        f"shortcut bit for bit; before, {total['alive']} of those are alive.",
        "",
        "*Sums* are all additions of two computed values: attention's biases, rotary embeddings, "
        "pyramids and sums of parallel branches among them, which are no residuals.",
        "",
        "| architecture | sums | residual | zeroed | proved | alive before | not zeroed, why |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | | |")
            continue
        why = "; ".join(f"{count} × {reason}" for reason, count in row["reasons"].items())
        lines.append(
            f"| {row['name']} | {row['additions']} | {row['residual']} | {row['zeroed']} | "
            f"{row['proved']} | {row['alive']} | {why} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
