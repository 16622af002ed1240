"""What released tools do with the same model, in the same count: batch norms that still run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.sweep.counts import run
from benchmarks.sweep.outputs import relative_difference


def torch_fx_fuse(model: nn.Module) -> nn.Module:
    """Fold by torch.fx's own fuser."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)  # copies it


def opacus_fix(model: nn.Module) -> nn.Module:
    """Replace BatchNorm by Opacus' validator, which copies the model and wants it in train mode."""
    from opacus.validators import ModuleValidator

    logging.getLogger("opacus").setLevel(logging.ERROR)
    modes = [(module, module.training) for module in model.modules()]
    try:
        fixed: nn.Module = ModuleValidator.fix(model.train())
    finally:
        for module, training in modes:
            module.training = training
    return fixed.eval()


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {"fuse": torch_fx_fuse, "opacus": opacus_fix}


def measure(model: nn.Module, example_inputs: tuple[Any, ...], output: Any) -> dict[str, Any]:
    """Return `NAME_left`, the norms that still run after each peer, or `NAME_error`.

    `fuse_diff` is how far the fused model is off in float32.
    """
    row: dict[str, Any] = {}
    for name, convert in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = convert(model)
            peer_output, counts = run(peer, example_inputs)
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way; that is its row
            row[f"{name}_error"] = short(error)
        else:
            row[f"{name}_left"] = len(counts.norms)
            if name == "fuse":
                row["fuse_diff"] = relative_difference(output, peer_output)
    return row


def short(error: BaseException) -> str:
    """Return the class and the first line of an error, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
