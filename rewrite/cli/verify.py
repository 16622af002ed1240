"""The command `rewrite verify`.

Exit codes: 0 verified; 1 something is wrong with the model; 2 wrong usage or unreadable input.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rewrite.cli.checks import (
    check_report,
    is_onnx,
)
from rewrite.cli.common import (
    FAILED,
    OK,
    add_model_arguments,
    add_page_argument,
    calibration_data,
    complain,
    example_inputs,
    load_model,
    or_inferred,
    own_provenance,
    write_report,
)
from rewrite.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from rewrite.equivalence.verification import Verification
    from rewrite.onnx.report import OnnxVerification


_CONTRACTS = ("exact", "exact-in-eval", "approximate", "redefining")


def add_parsers(subparsers: Any) -> None:
    """Add the command."""
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
    parser.add_argument("--tolerance", type=float, metavar="X",
                        help="of an ONNX graph under --contract approximate: how far an output "
                        "may be off, relative to its largest value")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the given input alone")
    parser.add_argument("--calibration", metavar="DATA", help="batches of your own to compare on")
    parser.add_argument("--expect", metavar="OP=N", action="append", default=[],
                        help="how often an ONNX operator has to occur (repeatable)")  # fmt: skip
    parser.add_argument("--expect-no", metavar="OP", action="append", default=[],
                        help="an ONNX operator that may not occur (repeatable)")  # fmt: skip
    parser.add_argument("--repro", metavar="DIR",
                        help="write the diverging ONNX node with inputs and outputs")  # fmt: skip
    parser.add_argument("--node-data", metavar="OUT.json",
                        help="write the error of each ONNX node, for Model Explorer")  # fmt: skip
    add_model_arguments(parser)
    add_page_argument(parser)
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    """Run `rewrite verify`; return 0 if everything holds, else 1.

    Raises:
        OptionError: the options do not go together.
    """
    check_report(options)
    if options.repro:
        from rewrite.onnx.repro import check_folder

        check_folder(options.repro)
    onnx_files = [is_onnx(name) for name in (options.model, options.other) if name is not None]
    if options.other is None and not onnx_files[0]:
        raise OptionError(
            f"{options.model} alone has nothing to be held to; give a second model, or an ONNX file"
        )
    about_graphs = options.expect or options.expect_no or options.repro or options.node_data
    if not any(onnx_files) and about_graphs:
        raise OptionError("--expect, --expect-no, --repro and --node-data are about ONNX files")
    if options.node_data and (options.other is None or all(onnx_files)):
        raise OptionError("--node-data needs the PyTorch model that the graph is held to")
    if not any(onnx_files) and options.tolerance is not None:
        raise OptionError("--tolerance is about ONNX files")
    page: str | None = None
    found: Verification | OnnxVerification
    if any(onnx_files):
        from rewrite.progress import ProgressLine

        with ProgressLine(enabled=not options.quiet) as progress:
            progress("verifying the graph")
            found = _verify_onnx(options)
        if options.node_data:
            _write_node_data(options)
        if options.html:
            from rewrite.html.pages import onnx_page

            page = onnx_page(found, own_provenance(options.model, options.other)).render()
    else:
        found, page = _verify_models(options)
    write_report(options, found, page)
    if options.quiet and not found.ok:
        return complain(found.reasons[0], FAILED)
    return OK if found.ok else FAILED


def _suggest_contract(before: nn.Module, after: nn.Module) -> None:
    """Suggest `--contract approximate` where a replaced norm is the likely reason of a failure."""
    from torch.nn import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm

    others = (GroupNorm, LayerNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)
    new = sum(isinstance(m, others) for m in after.modules())
    new -= sum(isinstance(m, others) for m in before.modules())
    if new > 0:
        print(
            f"the second model has {new} group, layer or instance norms more: a swap keeps a model "
            "approximately; --contract approximate measures how far",
            file=sys.stderr,
        )


def _verify_models(options: argparse.Namespace) -> tuple[Verification, str | None]:
    """Verify two models; return the result, and its HTML page with --html."""
    from rewrite.equivalence.verification import Level
    from rewrite.equivalence.verify import verify
    from rewrite.outcomes import Contract
    from rewrite.progress import ProgressLine

    with ProgressLine(enabled=not options.quiet) as progress:
        progress("loading")
        before, after = _two_models(options)
        inputs: Any = example_inputs(options, before)
        found = verify(
            before,
            after,
            inputs,
            calibration=_calibration(options, before),
            contract=Contract(options.contract),
            level=Level.QUICK if options.quick else Level.THOROUGH,
            seed=options.seed,
            progress=progress,
        )
    if not found.ok and found.contract in (Contract.EXACT, Contract.EXACT_IN_EVAL):
        _suggest_contract(before, after)
    if not options.html:
        return found, None
    from rewrite.equivalence.side_by_side import of_runs, side_by_side
    from rewrite.html.pages import verification_page
    from rewrite.provenance import shown_path
    from rewrite.runtime.inputs import Inputs

    if found.runs is not None:
        modules = of_runs(before, after, found.runs)
    else:
        known_inputs = or_inferred(options, before, inputs).inputs
        given = None if known_inputs is None else Inputs.of(known_inputs)
        modules = side_by_side(before, after, given, options.seed)
    known = own_provenance(options.model, options.other)
    title = f"{shown_path(options.other)} held to {shown_path(options.model)}"
    return found, verification_page(found, modules, known, title).render()


def _two_models(options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Open A and B; a state dict without --factory holds weights for the other model's class."""
    from rewrite.checkpoint.load import holds_state, load_into

    states = [holds_state(name, options.key) for name in (options.model, options.other)]
    if options.factory is None and any(states) and not all(states):
        whole, tensors = (
            (options.model, options.other) if states[1] else (options.other, options.model)
        )
        model = load_model(options, whole)
        other = load_into(model, tensors, key=options.key, strip_prefix=options.strip_prefix)
        return (other, model) if states[0] else (model, other)
    one, two = (
        load_model(options, name, factory=is_state or not any(states))
        for name, is_state in zip((options.model, options.other), states, strict=True)
    )
    return one, two


def _graph_and_reference(options: argparse.Namespace) -> tuple[str, str | None]:
    """Return the graph that is verified, and what it is held to; of two graphs the second is."""
    first, second = options.model, options.other
    return (second, first) if second is not None and is_onnx(second) else (first, second)


def _verify_onnx(options: argparse.Namespace) -> OnnxVerification:
    from rewrite.equivalence.verification import Level
    from rewrite.onnx.verify import verify_onnx

    graph, reference = _graph_and_reference(options)
    model: Any = reference
    if reference is not None and not is_onnx(reference):
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
        contract=options.contract,
        tolerance=options.tolerance,
        level=Level.QUICK if options.quick else Level.THOROUGH,
        expect=_expected(options.expect),
        expect_no=options.expect_no,
        repro=options.repro,
        seed=options.seed,
    )


def _write_node_data(options: argparse.Namespace) -> None:
    from rewrite.files import write_bytes
    from rewrite.onnx.node_data import node_data, node_errors

    graph, reference = _graph_and_reference(options)
    assert reference is not None  # checked before anything is run
    model = load_model(options, reference).eval()
    given = _named_inputs(options) or example_inputs(options, model)
    inferred = or_inferred(options, model, given)
    if inferred.inputs is None:
        raise OptionError(
            f"--node-data runs both; {inferred.missing}; pass --input, such as 1x3x224x224"
        )
    errors = node_errors(graph, model, inferred.inputs, options.seed)
    write_bytes(options.node_data, node_data(errors).encode())


def _named_inputs(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the arrays of a named .npz file (`np.savez(f, x=…)`), None for any other input."""
    if options.input is None or not options.input.endswith(".npz"):
        return None
    from rewrite.runtime.stored.input_files import load_named_inputs

    values = load_named_inputs(options.input)
    return None if all(name.startswith("arr_") for name in values) else values


def _calibration(options: argparse.Namespace, model: Any) -> Any:
    if options.calibration is None:
        return None
    return calibration_data(options.calibration, model)


def _expected(texts: list[str]) -> dict[str, int]:
    expected = {}
    for text in texts:
        kind, _, count = text.partition("=")
        if not kind or not count.isdigit():
            raise OptionError(f"--expect {text}: write it as GroupNormalization=53")
        expected[kind] = int(count)
    return expected
