"""Submodules that are no ordinary float layers: handled or declined with a reason, by every pass.

Never a traceback, and never a wrong model: what a conversion returns has been verified.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import passes
import rewrite
from models.randomize import randomize_norms_
from passes import BatchNormToGroupNorm, FoldNorm, FreezeBatchNorm, Reinitialize, WeightNorm
from rewrite.equivalence.verify import check_untouched
from rewrite.preconditions import why_not_run
from rewrite.runtime.float64 import in_float64

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def chain(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(first or nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), body, head)
    randomize_norms_(model[1:])
    return model.eval()


def half() -> nn.Module:
    return chain().half()


def channels_last() -> nn.Module:
    return chain().to(memory_format=torch.channels_last)


def frozen() -> nn.Module:
    return chain().requires_grad_(False)


def tied() -> nn.Module:
    model = chain(nn.Conv2d(3, 4, 3, padding=1))
    model.append(nn.Linear(5, 5))
    model.append(nn.Linear(5, 5))
    model[5].weight = model[4].weight
    return model.eval()


def scripted() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    randomize_norms_(inner)
    return chain(torch.jit.script(inner))


def dynamically_quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(chain(), {nn.Linear}, dtype=torch.qint8)


def prepared_for_quantization() -> nn.Module:
    model = chain().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare_qat(model)
    prepared(X)
    return prepared.eval()


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = chain()
    prune.random_unstructured(model[0], "weight", 0.3)
    return model


def on_meta() -> nn.Module:
    return chain().to("meta")


def partly_on_meta() -> nn.Module:
    model = chain()
    model[2].to("meta")
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()).eval()


KINDS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        half, channels_last, frozen, tied, scripted, dynamically_quantized,
        prepared_for_quantization, pruned, on_meta, partly_on_meta, lazy,
    )
}  # fmt: skip
PASSES = tuple(name for name in passes.__all__ if name != "RecalibrateBatchNorm")


def shapes(model: nn.Module) -> dict[str, torch.Size | None]:
    return {k: None if is_lazy(p) else p.shape for k, p in model.named_parameters()}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_handles_or_declines(kind: str, pass_name: str) -> None:
    model = KINDS[kind]()
    before = shapes(model)
    example = X.half() if kind == "half" else X
    result = rewrite.convert(model, [getattr(passes, pass_name)()], example_inputs=(example,))
    assert all(skip.reason for skip in result.report.skips)
    assert shapes(model) == before
    if not why_not_run(model):
        assert all(report.verification is None or report.verification.ok
                   for report in result.report.passes)  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_norm_inside_torchscript_is_declined_by_name() -> None:
    result = rewrite.convert(scripted(), [BatchNormToGroupNorm(num_groups=1)], example_inputs=(X,))
    assert [skip.target for skip in result.report.skips] == ["0.1"]
    assert "TorchScript" in result.report.skips[0].reason
    assert {change.target for change in result.report.changes} == {"1", "2.1"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_whole_torchscript_model_is_refused_in_one_line() -> None:
    with pytest.raises(rewrite.CaptureError, match="rewrite the eager model") as error:
        rewrite.convert(torch.jit.script(chain()), [FoldNorm()])
    assert "\n" not in str(error.value)


def test_a_lazy_model_is_not_initialized_in_passing() -> None:
    model = lazy()
    result = rewrite.convert(model, [BatchNormToGroupNorm(num_groups=1)], example_inputs=(X,))
    assert "run one batch through the model first" in result.report.skips[0].reason
    assert not result.report.changes
    assert "0.weight is lazy and has seen no input: nothing was run" in result.report.notes
    assert model[0].has_uninitialized_params() and result.model[0].has_uninitialized_params()


def test_a_lazy_model_that_has_run_is_a_model_like_any_other() -> None:
    model = lazy()
    model(X)
    randomize_norms_(model)
    assert len(rewrite.convert(model, [FoldNorm()], example_inputs=(X,)).report.changes) == 1


@pytest.mark.parametrize(
    "item",
    [BatchNormToGroupNorm(num_groups=1), WeightNorm(), FreezeBatchNorm(), Reinitialize()],
    ids=lambda item: item.name,
)
def test_a_model_without_values_is_rewritten_in_structure(item: rewrite.Pass) -> None:
    """The same sites change as in the model with values, and nothing claims to have been run."""
    with_values = rewrite.convert(chain(), [item], example_inputs=(X,))
    result = rewrite.convert(on_meta(), [item], example_inputs=(X,))
    sites = [change.target for change in with_values.report.changes]
    assert [change.target for change in result.report.changes] == sites
    assert result.report.verification is None
    assert "has no values" in result.report.notes[0]
    assert all(p.is_meta for p in result.model.parameters())


def test_a_fold_declines_norms_without_values() -> None:
    result = rewrite.convert(on_meta(), [FoldNorm()], example_inputs=(X,))
    assert {skip.reason for skip in result.report.skips} == {
        "has no values (it is on the meta device)"
    }


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("kind", [scripted, dynamically_quantized], ids=lambda kind: kind.__name__)
def test_a_wrong_fold_beside_compiled_layers_is_noticed(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    wrong = rewrite.convert(model, [FoldNorm()], example_inputs=(X,)).model
    conv = next(m for m in wrong.modules() if type(m) is nn.Conv2d)
    assert rewrite.verify(model, wrong, (X,)).ok
    with torch.no_grad():
        conv.weight[0] *= 1.001
    assert not rewrite.verify(model, wrong, (X,)).ok


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_running_in_float64_leaves_a_scripted_child_where_it_was() -> None:
    model = scripted()
    child = model[0]
    with torch.no_grad(), in_float64(model):
        assert model(X.double()).dtype is torch.float64
    assert model[0] is child


def test_tensors_without_values_are_compared_by_shape() -> None:
    old, new = on_meta(), on_meta()
    assert check_untouched(old, new, set()) == []
    new[0].weight = nn.Parameter(torch.empty(4, 3, 1, 1, device="meta"))
    assert check_untouched(old, new, set()) == ["0.weight"]
    assert check_untouched(old, copy.deepcopy(old).to_empty(device="cpu"), set())
