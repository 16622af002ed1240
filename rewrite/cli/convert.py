"""The command `rewrite convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite import registry
from rewrite.cli.checks import (
    check_graph_name,
    is_onnx,
)
from rewrite.cli.common import (
    FAILED,
    MODEL_HELP,
    NOTHING,
    OK,
    add_model_arguments,
    add_page_argument,
    calibration_data,
    complain,
    default_output,
    example_inputs,
    load_model,
    or_inferred,
    own_provenance,
    save_model,
    write_report,
)
from rewrite.cli.pass_flags import PassFlags, add_pass_flags
from rewrite.errors import OptionError
from rewrite.text.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from rewrite.onnx.report import OnnxVerification
    from rewrite.pipeline import Result
    from rewrite.protocol import Pass
    from rewrite.report import Report


def add_parsers(commands: Any, argv: Sequence[str]) -> None:
    """Add the command, with the flags of the passes that `argv` names."""
    parser = commands.add_parser(
        "convert",
        help="apply passes to a model and save the result",
        description="Apply passes in the order of their flags, verify each, save the result.",
        epilog="`rewrite passes` lists the passes, `rewrite passes NAME` the options of one, "
        "`rewrite convert --NAME --help` its flags. Example: rewrite convert --bn-to-gn "
        "--num-groups 16 --calibration photos/ model.pt",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-o", "--output", metavar="OUT.pt", help="default: MODEL.rewritten.pt")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="rewrite only sites whose qualified name matches (repeatable)",
    )
    parser.add_argument(
        "--skip",
        metavar="PATTERN",
        action="append",
        default=[],
        help="leave sites alone whose qualified name matches (repeatable)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would change")
    parser.add_argument("--allow-noop", action="store_true", help="exit 0 if nothing is to rewrite")
    parser.add_argument("--no-verify", action="store_true", help="do not run the models")
    parser.add_argument("--calibration", metavar="DATA",
                        help="unlabelled data for passes that fit: a folder of images, a file, or "
                        "package.module:factory")  # fmt: skip
    parser.add_argument(
        "--size", type=int, help="side of calibration images (default: the model's)"
    )
    parser.add_argument("--mean", metavar="R,G,B", help="subtracted from calibration images")
    parser.add_argument("--std", metavar="R,G,B", help="calibration images are divided by it")
    parser.add_argument("--recover", metavar="DATA",
                        help="train the result on unlabelled data until it answers as the model "
                        "did (`rewrite recover` has the options)")  # fmt: skip
    parser.add_argument("--onnx", metavar="OUT.onnx", help="export and verify the result as well")
    add_model_arguments(parser)
    add_page_argument(parser)
    if argv[:1] == ["convert"]:
        add_pass_flags(parser, argv[1:])
    parser.set_defaults(run=_run_convert)


# -- commands ---------------------------------------------------------------------------------


def _run_convert(options: argparse.Namespace) -> int:
    from rewrite.files import is_folder

    flags: PassFlags = options.passes or PassFlags()
    chosen = flags.build(options.seed)
    if not chosen:
        names = ", ".join(f"--{name}" for name in registry.entries())
        raise OptionError(f"no pass given; choose from {names}")
    if is_folder(options.model):
        from rewrite.cli.convert_folder import run_convert_folder

        return run_convert_folder(options, chosen)
    from rewrite.distributed import process_group

    with process_group() as rank:
        options.quiet = options.quiet or rank > 0
        return _convert(options, chosen, first=rank == 0)


def _convert(options: argparse.Namespace, chosen: Sequence[Pass], *, first: bool) -> int:
    """Convert the model, and write the result (of several processes, only the first writes)."""
    output = Path(options.output or default_output(options.model, "rewritten"))
    if is_onnx(str(output)):
        raise OptionError(f"-o {output}: takes a model, .pt; --onnx {output} exports it")
    if options.onnx is not None:
        check_graph_name("--onnx", options.onnx)
    from rewrite.files import check_writable
    from rewrite.files.places import check_distinct

    writes = first and not options.dry_run
    reports = (options.report, options.html)
    given = ("--report", "--html", "--onnx")
    check_distinct([("--output", output), *zip(given, (*reports, options.onnx), strict=True)])
    if not first:
        options.report = options.html = None
    for path in (output, *reports, options.onnx) if writes else reports:
        if path is not None:
            check_writable(path, overwrite=options.force or path in reports)

    from rewrite.pipeline import convert
    from rewrite.progress import ProgressLine

    with ProgressLine(enabled=not options.quiet) as progress:
        progress("loading")
        model = load_model(options, options.model)
        inputs = example_inputs(options, model)
        result = convert(
            model, chosen, example_inputs=inputs,
            calibration=_calibration(options, model), only=options.only, skip=options.skip,
            verify=not (options.no_verify or options.dry_run), seed=options.seed, progress=progress,
            check=False, consume=options.html is None and options.recover is None,
        )  # fmt: skip
        _check_names(options, result.report)
        code = _judge(result.report, len(chosen), options)
        if code == OK and options.recover is not None and result.report.changes:
            result = _recovered(options, result, model)
        shown = model if options.html else None
        del model
        if code == OK and writes and result.report.changes:
            if options.onnx:
                progress("exporting")
                exported = _export(options, result, inputs)
                result = replace(result, report=replace(result.report, exported=exported))
            progress("saving")
            save_model(options, options.model, result.model, output)
        page = None if shown is None else _page(options, result, shown, inputs)
    write_report(options, result.report, page)
    if code == OK and options.dry_run and not (options.quiet or options.json):
        print("nothing written (--dry-run)")
    if code == OK and not result.report.ok:
        return complain(f"{result.report.failure}; no model was written", FAILED)
    return code


def _recovered(
    options: argparse.Namespace, result: Result[nn.Module], model: nn.Module
) -> Result[nn.Module]:
    """Train the result on --recover DATA; report the recovery among the notes."""
    if options.dry_run:
        return result
    from rewrite.cli.recover import open_data
    from rewrite.distributed import rank_and_world
    from rewrite.progress import ProgressLine
    from rewrite.training.recover import recover

    if rank_and_world()[1] > 1:
        raise OptionError(
            "--recover runs in one process; use `accelerate launch -m rewrite recover`"
        )
    data = open_data(options.recover, model, labels=False)
    with ProgressLine(enabled=not options.quiet) as progress:
        trained = recover(result.model, model, data, seed=options.seed, progress=progress)
    if trained.interrupted:
        raise KeyboardInterrupt
    notes = [f"recovered: {trained.before}; after {len(trained.steps)} steps {trained.after}"]
    notes += [trained.stopped] if trained.stopped else []
    report = replace(result.report, notes=(*result.report.notes, *notes))
    return replace(result, model=trained.model, report=report)


def _page(
    options: argparse.Namespace, result: Result[nn.Module], model: nn.Module, inputs: Any
) -> str:
    """Return the HTML page of a conversion, on the given input or an inferred one."""
    check = result.report.verification
    given = inputs
    if check is None or check.runs is None:
        given = or_inferred(options, model, inputs).inputs
    return result.report.to_html(model, result.model, given, own_provenance(options.model))


def _check_names(options: argparse.Namespace, report: Report) -> None:
    """Raise where --only or --skip names a module that no pass found; patterns may match none."""
    found = [change.target for change in report.changes]
    found += [skip.target for skip in report.skips]
    for flag, names in (("--only", options.only), ("--skip", options.skip)):
        for name in names:
            if set(name) & set("*?[") or name in found:
                continue
            hint = did_you_mean(name, found)
            if any(target.startswith(f"{name}.") for target in found):
                hint = f"; write '{name}.*' for what is below it"
            raise OptionError(f"{flag} {name}: no pass finds anything of that name{hint}")


def _judge(report: Any, passes: int, options: argparse.Namespace) -> int:
    """Return the exit code of a conversion, and say on standard error what is wrong with it."""
    if not report.ok:
        what = f"the result breaks its contract: {report.failure}; no model was written"
        return complain(what, FAILED)
    if not report.changes:
        if options.allow_noop:
            return OK
        return complain("nothing to rewrite; nothing was written", NOTHING)
    idle = [part for part in report.passes if not part.changes]
    if idle and passes > 1 and not options.allow_noop:
        names = ", ".join(part.spec for part in idle)
        why = next((f": {s.target}: {s.reason}" for part in idle for s in part.skips), "")
        raise OptionError(
            f"{names} found nothing to rewrite beside the other passes{why}; nothing was "
            "written (--allow-noop accepts that)"
        )
    return OK


def _calibration(options: argparse.Namespace, model: nn.Module) -> Any:
    if options.calibration is None:
        return None
    return calibration_data(
        options.calibration, model, size=options.size,
        mean=_numbers("--mean", options.mean), std=_numbers("--std", options.std),
    )  # fmt: skip


def _numbers(flag: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{flag} {text}: write numbers, as 0.485,0.456,0.406") from None


def _export(
    options: argparse.Namespace, result: Result[nn.Module], inputs: tuple[Any, ...] | None
) -> OnnxVerification:
    from rewrite.onnx.export import export
    from rewrite.runtime.copying import copy_model

    passes = result.report.passes
    metadata = {
        "source": str(options.model),
        "passes": " ".join(pass_.spec for pass_ in passes),
        "contract": " ".join(pass_.contract for pass_ in passes),
    }
    return export(
        copy_model(result.model).eval(), options.onnx, example_inputs=inputs, metadata=metadata,
        overwrite=options.force, seed=options.seed,
    )  # fmt: skip
