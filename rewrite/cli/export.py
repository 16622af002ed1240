"""The command `rewrite export`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rewrite.cli.checks import (
    check_graph_name,
    check_report,
)
from rewrite.cli.common import (
    FAILED,
    OK,
    add_model_arguments,
    add_page_argument,
    complain,
    example_inputs,
    load_model,
    own_provenance,
    write_report,
)
from rewrite.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from rewrite.onnx.report import OnnxVerification


def add_parsers(subparsers: Any) -> None:
    """Add the command."""
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
    add_model_arguments(parser)
    add_page_argument(parser)
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Run `rewrite export`; return 0 if the file is verified, else 1."""
    from rewrite.files import check_writable

    check_writable(options.output, overwrite=options.force)
    check_graph_name("OUT", options.output)
    check_report(options)
    axes = _axes(options.dynamic_shape)
    model = load_model(options, options.model).eval()
    from rewrite.progress import ProgressLine

    with ProgressLine(enabled=not options.quiet) as progress:
        progress("exporting" if options.no_verify else "exporting and verifying")
        found = _export(options, model, axes)
    page = None
    if options.html:
        from rewrite.html.pages import onnx_page

        page = onnx_page(found, own_provenance(options.model)).render()
    write_report(options, found, page)
    if not found.ok:
        return complain(f"{options.output}: {found.reasons[0]}; no model was written", FAILED)
    return OK


def _export(
    options: argparse.Namespace, model: nn.Module, axes: dict[str, dict[int, str]]
) -> OnnxVerification:
    from rewrite.equivalence.verification import Level
    from rewrite.onnx.export import export

    return export(
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


def _axes(texts: list[str]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        place, _, label = text.partition("=")
        name, _, axis = place.rpartition(":")
        if not name or not axis.isdigit() or not label.isidentifier():
            raise OptionError(f"--dynamic-shape {text}: write it as x:2=height")
        axes.setdefault(name, {})[int(axis)] = label
    return axes
