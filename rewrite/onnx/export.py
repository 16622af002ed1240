"""Export a model to ONNX with PyTorch's exporter, avoid its known faults, and verify the result.

The exporter writes an inference graph whatever mode the model is in: a norm or a dropout that is in
train mode would become another function without a word. Such models are refused by name. What it
keeps as computation (a weight norm) is baked or kept by choice.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
from onnx_ir.convenience import replace_all_uses_with
from torch import nn

from rewrite import __version__
from rewrite.equivalence.verification import Level
from rewrite.errors import ExportError, OptionError, VerificationError, system_reason
from rewrite.files import atomic_path, check_writable, scratch_folder, together
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.onnx.exporters import Exporter, ExportRequest, export_program
from rewrite.onnx.file import LARGE
from rewrite.onnx.report import OnnxVerification
from rewrite.onnx.verify import verify_onnx
from rewrite.outcomes import as_choice
from rewrite.runtime.copying import copy_model
from rewrite.runtime.infer_inputs import infer_inputs
from rewrite.runtime.inputs import Inputs, device_of
from rewrite.runtime.tree import Tree
from rewrite.text.some import some
from rewrite.weights.weight_norm import remove_weight_norm, weight_normed

MAX_BYTES = 1_900_000_000
"""Above this the weights go into a file beside the model: a protobuf ends at 2 GB."""


OPSET = 20
"""Where norms are right and fastest in onnxruntime: measured, see docs/verification.md."""


_TRACES = ("pkg.torch.onnx.stack_trace", "namespace", "pkg.torch.onnx.fx_node")


def export(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any = None,
    opset: int = OPSET,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    dynamic_batch: bool = True,
    external_data: bool | None = None,
    bake_weight_norm: bool = True,
    metadata: Mapping[str, str] | None = None,
    exporter: Exporter = "dynamo",
    verify: bool = True,
    level: Level | str = Level.QUICK,
    overwrite: bool = True,
    seed: int = 0,
) -> OnnxVerification:
    """Export `model` to `path` and verify the file against it; the model is untouched.

    Args:
        model: any module whose norms and dropouts are in eval mode.
        path: the file to write, completely or not at all.
        example_inputs: positional inputs, or a dict of keyword inputs; inferred where possible.
        opset: version of the operators.
        dynamic_shapes: axes beside the batch that may vary: {"x": {2: "height", 3: "width"}}.
        dynamic_batch: whether the first axis of the inputs may vary.
        external_data: weights in a file beside the model; by itself only where they are too large.
        bake_weight_norm: compute weight-normed weights once, instead of in the graph.
        metadata: written into the file beside versions: the source, the passes, the contract.
        exporter: "dynamo", on torch.export, or "torchscript", which traces what that refuses.
        verify: whether to verify the file against the model.
        level: how thoroughly, quick or thorough.
        overwrite: whether an existing file may be replaced.
        seed: of everything random.

    Raises:
        ExportError: the model cannot be exported as it is, or the exporter fails.
        OptionError: no such exporter or level.
    """
    level = as_choice(Level, level, "level")
    if exporter not in get_args(Exporter):
        raise OptionError(f"exporter is {exporter!r}; pass {', '.join(get_args(Exporter))}")
    target = check_writable(path, overwrite=overwrite)
    check_exportable(model)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    beside = size > MAX_BYTES if external_data is None else external_data
    if beside:
        check_writable(f"{target}.data", overwrite=overwrite)
    inputs = _inputs(model, example_inputs, seed)
    notes = [] if example_inputs is not None else [f"no input was given: exported for {inputs}"]
    ready = _baked(model, notes) if bake_weight_norm else model
    asked = ExportRequest(opset, dynamic_shapes or {}, dynamic_batch, seed)
    program = export_program(ready, inputs, asked, exporter, notes)
    _describe(program.model, metadata or {})
    if shared := _share(program.model, {name for name, _ in ready.named_parameters()}):
        notes.append(f"stored {shared} tensors once that are equal to others")
    with _written(program, target, beside, overwrite) as place:
        found = OnnxVerification(str(place), ())
        if verify:
            try:
                called = "inferred" if example_inputs is None else "given"
                found = verify_onnx(place, model, inputs, level=level, seed=seed, called=called)
            except VerificationError as error:
                raise ExportError(str(error).replace(str(place), str(target))) from error
    return replace(found, path=str(target), notes=tuple(notes))


def check_exportable(model: nn.Module) -> None:
    """Raise ExportError where the exporter would write another function without a word."""
    for name, module in Tree(model).modules():
        where = f"{name or type(model).__name__}: {type(module).__name__}"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
            if module.running_mean is None and not instance:
                raise ExportError(
                    f"{where} has no running statistics: it normalizes by the batch, which ONNX "
                    "cannot say; train it with track_running_stats=True"
                )
            if module.training and module.running_mean is not None:
                raise ExportError(f"{where} is in train mode; call model.eval() before the export")
        elif module.training and _drops(module):
            raise ExportError(f"{where} is in train mode; call model.eval() before the export")


def _drops(module: nn.Module) -> bool:
    """Return whether a module in train mode leaves values out at random."""
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    kind = type(module).__name__
    return ("Drop" in kind or kind == "StochasticDepth") and isinstance(rate, float) and rate > 0


def _inputs(model: nn.Module, example_inputs: Any, seed: int) -> Inputs:
    if example_inputs is not None:
        return Inputs.of(example_inputs).to(device_of(model))
    inferred = infer_inputs(model, seed)
    if inferred.inputs is None:
        raise ExportError(
            f"{type(model).__name__}: {inferred.missing}; pass --input 1x3x224x224 "
            "(example_inputs=(x,) in Python)"
        )
    return Inputs.of(inferred.inputs).to(device_of(model))


def _baked(model: nn.Module, notes: list[str]) -> nn.Module:
    """Return the model with weight norms computed, a copy if there are any."""
    names = [name for name, module in Tree(model).modules() if weight_normed(module)]
    if not names:
        return model
    copied = copy_model(model)
    tree = Tree(copied)
    for name in names:
        module = tree.get(name)
        for key in weight_normed(module):
            remove_weight_norm(TensorWriter(), module, key)
    notes.append(f"baked the weight norm of {len(names)} modules: {some(names)}")
    return copied


def _describe(model: Any, metadata: Mapping[str, str]) -> None:
    """Write what made the file into it, and keep only names of modules on the nodes."""
    model.metadata_props.update(
        {
            "rewrite.version": __version__,
            "torch.version": torch.__version__,
            "onnx.version": onnx.__version__,
            # Names of files may hold bytes that are no text.
            **{
                f"rewrite.{key}": value.encode(errors="backslashreplace").decode()
                for key, value in metadata.items()
            },
        }
    )
    for node in model.graph.all_nodes():
        for key in _TRACES:
            node.metadata_props.pop(key, None)


def _share(model: Any, learned: set[str]) -> int:
    """Store large equal tensors once, such as the index tables of attention layers; return how many
    went. What they share keeps the name of a parameter where one of them is one."""
    initializers = model.graph.initializers
    seen: dict[Any, list[Any]] = defaultdict(list)
    dropped = 0
    for name in sorted(initializers, key=lambda name: name not in learned):
        value = initializers[name]
        held = value.const_value
        if held is None or held.nbytes < LARGE or value.is_graph_output():
            continue
        alike = seen[held.dtype, tuple(held.shape)]
        array = held.numpy()
        first = next((v for v in alike if np.array_equal(v.const_value.numpy(), array)), None)
        if first is None:
            alike.append(value)
        else:
            replace_all_uses_with(value, first)
            del initializers[name]
            dropped += 1
    return dropped


def _scratch(program: Any, target: Path) -> Path:
    """Return a folder for what is verified before it is written: not the target's, if others fit.

    Where a kill leaves its scratch files after all, nobody wants them beside the target.
    """
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values()
               if v.const_value is not None)  # fmt: skip
    usual = Path(tempfile.gettempdir())
    return usual if shutil.disk_usage(usual).free > 2 * size + (64 << 20) else target.parent


@contextlib.contextmanager
def _written(program: Any, target: Path, beside: bool, overwrite: bool) -> Iterator[Path]:
    """Write the model, and the weights beside it, to where it is verified: at the end they move.

    When the block raises, nothing is left and what was at `target` stays.
    """
    try:
        with scratch_folder(_scratch(program, target)) as folder:
            place = folder / target.name
            program.save(str(place), external_data=beside)
            yield place
            # The data first: what names it comes after it.
            written = sorted(folder.iterdir(), key=lambda file: file == place)
            with together():
                for file in written:
                    with atomic_path(target.parent / file.name, overwrite=overwrite) as staged:
                        shutil.copyfile(file, staged)
    except OSError as error:
        raise ExportError(f"{target}: {system_reason(error)}") from error
