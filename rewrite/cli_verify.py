"""The commands `rewrite verify` and `rewrite export`: their arguments, and what they run.

Exit codes: 0 verified; 1 something is wrong with the model; 2 wrong usage or unreadable input.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import OptionError

if TYPE_CHECKING:
    from rewrite.onnx_report import OnnxVerification
    from rewrite.verification import Verification

_CONTRACTS = ("exact", "exact-in-eval", "approximate", "redefining")


def add_parsers(subparsers: Any) -> None:
    """Add both commands."""
    _add_verify(subparsers)
    _add_export(subparsers)


def _add_verify(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="hold a model to another one, or an ONNX graph to a model or to itself",
        description="`verify A B` holds B to A; either may be an ONNX file. `verify A.onnx` "
        "verifies a graph by itself. The exit code is 1 when something is wrong.",
    )
    parser.add_argument("model", metavar="A", help="the original: a MODEL or an ONNX file")
    parser.add_argument("other", metavar="B", nargs="?", help="what is held to it")
    parser.add_argument("--contract", choices=_CONTRACTS, default="exact-in-eval",
                        help="what B promises (default exact-in-eval)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the given input alone")
    parser.add_argument("--calibration", metavar="DATA", help="batches of your own to compare on")
    parser.add_argument("--expect", metavar="OP=N", action="append", default=[],
                        help="how often an ONNX operator has to occur (repeatable)")  # fmt: skip
    parser.add_argument("--expect-no", metavar="OP", action="append", default=[],
                        help="an ONNX operator that may not occur (repeatable)")  # fmt: skip
    parser.add_argument("--repro", metavar="DIR",
                        help="write the diverging ONNX node with inputs and outputs")  # fmt: skip
    _add_shared(parser)
    parser.set_defaults(run=run_verify)


def _add_export(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="export a model to ONNX and verify the file",
        description="Export a model to ONNX with a dynamic batch, and verify the file against it.",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("output", metavar="OUT.onnx")
    parser.add_argument("--opset", type=int, default=20, help="of the operators (default 20)")
    parser.add_argument("--dynamic-shape", metavar="INPUT:AXIS=NAME", action="append", default=[],
                        help="one more axis that may vary, as x:2=height (repeatable)")  # fmt: skip
    parser.add_argument("--static-batch", action="store_true", help="fix the batch size")
    parser.add_argument("--external-data", action=argparse.BooleanOptionalAction, default=None,
                        help="weights beside the model (by itself above 2 GB)")  # fmt: skip
    parser.add_argument("--keep-weight-norm", action="store_true",
                        help="keep parametrized weights as computation")  # fmt: skip
    parser.add_argument("--exporter", choices=("dynamo", "torchscript"), default="dynamo",
                        help="torchscript traces what torch.export refuses")  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="do not run the exported file")
    parser.add_argument("--thorough", action="store_true", help="verify on more inputs")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    _add_shared(parser)
    parser.set_defaults(run=run_export)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    from rewrite.cli import add_model_arguments

    add_model_arguments(parser)


def run_verify(options: argparse.Namespace) -> int:
    """Run `rewrite verify`; return 0 if everything holds, else 1."""
    _check_report(options, options.model, options.other)
    if options.repro:
        from rewrite.onnx_repro import check_folder

        check_folder(options.repro)
    onnx_files = [_is_onnx(name) for name in (options.model, options.other) if name is not None]
    if options.other is None and not onnx_files[0]:
        raise OptionError(
            f"{options.model} alone has nothing to be held to; give a second model, or an ONNX file"
        )
    if not any(onnx_files) and (options.expect or options.expect_no or options.repro):
        raise OptionError("--expect, --expect-no and --repro are about ONNX files")
    found = _verify_onnx(options) if any(onnx_files) else _verify_models(options)
    return _finish(options, found)


def _check_report(options: argparse.Namespace, *others: str | None) -> None:
    """Raise when the report cannot be written, or would take the place of another file."""
    if not options.report:
        return
    from rewrite.files import check_writable

    report = check_writable(options.report).resolve()
    for other in (*others, options.input):
        if other is not None and Path(other).resolve() == report:
            raise OptionError(f"--report {options.report}: is {other}; give the report a place")


def _is_onnx(name: str) -> bool:
    return Path(name).suffix.lower() in (".onnx", ".ort")


def _verify_models(options: argparse.Namespace) -> Verification:
    from rewrite.cli import example_inputs, load_model
    from rewrite.protocol import Contract
    from rewrite.verify import Level, verify

    before = load_model(options, options.model)
    return verify(
        before,
        load_model(options, options.other),
        example_inputs(options, before),
        calibration=_calibration(options, before),
        contract=Contract(options.contract),
        level=Level.QUICK if options.quick else Level.THOROUGH,
        seed=options.seed,
    )


def _verify_onnx(options: argparse.Namespace) -> OnnxVerification:
    from rewrite.cli import example_inputs, load_model
    from rewrite.onnx import verify_onnx
    from rewrite.verification import Level

    # The graph is what is verified; where both are ONNX files, the second is held to the first.
    graph, reference = options.model, options.other
    if reference is not None and _is_onnx(reference):
        graph, reference = reference, graph
    model: Any = reference
    if reference is not None and not _is_onnx(reference):
        model = load_model(options, reference)
    inputs: Any = _named_inputs(options)
    if inputs is None:
        # Shapes alone need no model: without one they are of float32 on the CPU.
        typed: Any = None if isinstance(model, str | None) else model
        inputs = example_inputs(options, typed)
    return verify_onnx(
        graph,
        model,
        inputs,
        calibration=None if isinstance(model, str | None) else _calibration(options, model),
        level=Level.QUICK if options.quick else Level.THOROUGH,
        expect=_expected(options.expect),
        expect_no=options.expect_no,
        repro=options.repro,
        seed=options.seed,
    )


def _named_inputs(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the inputs of an .npz file that was saved with names, None for anything else."""
    if options.input is None or not options.input.endswith(".npz"):
        return None
    import numpy as np

    from rewrite.inputs import load_inputs

    values = load_inputs(options.input)
    with np.load(options.input, allow_pickle=False) as archive:
        names = list(archive.files)
    if all(name.startswith("arr_") for name in names):
        return None
    return dict(zip(names, values, strict=True))


def _calibration(options: argparse.Namespace, model: Any) -> Any:
    if options.calibration is None:
        return None
    from rewrite.calibration_data import open_calibration

    return open_calibration(options.calibration, model)


def _expected(texts: list[str]) -> dict[str, int]:
    expected = {}
    for text in texts:
        kind, _, count = text.partition("=")
        if not kind or not count.isdigit():
            raise OptionError(f"--expect {text}: write it as GroupNormalization=53")
        expected[kind] = int(count)
    return expected


def run_export(options: argparse.Namespace) -> int:
    """Run `rewrite export`; return 0 if the file is verified, else 1."""
    from rewrite.cli import example_inputs, load_model
    from rewrite.files import check_writable

    check_writable(options.output, overwrite=options.force)
    _check_report(options, options.model, options.output)
    axes = _axes(options.dynamic_shape)
    model = load_model(options, options.model).eval()
    from rewrite.onnx import export
    from rewrite.verification import Level

    found = export(
        model,
        options.output,
        example_inputs=example_inputs(options, model),
        opset=options.opset,
        dynamic_shapes=axes,
        dynamic_batch=not options.static_batch,
        external_data=options.external_data,
        bake_weight_norm=not options.keep_weight_norm,
        metadata={"source": options.model},
        exporter=options.exporter,
        verify=not options.no_verify,
        level=Level.THOROUGH if options.thorough else Level.QUICK,
        overwrite=options.force,
        seed=options.seed,
    )
    return _finish(options, found)


def _axes(texts: list[str]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        place, _, label = text.partition("=")
        name, _, axis = place.rpartition(":")
        if not name or not axis.isdigit() or not label.isidentifier():
            raise OptionError(f"--dynamic-shape {text}: write it as x:2=height")
        axes.setdefault(name, {})[int(axis)] = label
    return axes


def _finish(options: argparse.Namespace, found: Verification | OnnxVerification) -> int:
    from rewrite.cli import console

    if options.report:
        from rewrite.files import write_bytes

        write_bytes(options.report, found.to_json())
    if not options.quiet:
        screen = console()
        for item in found.tables():
            screen.print(item)
    return 0 if found.ok else 1
