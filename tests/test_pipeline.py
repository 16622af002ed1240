from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import models
import rewrite
from passes import BatchNormToGroupNorm, BatchNormToLayerNorm
from rewrite.graph.operators import norm_of
from rewrite.outcomes import Change, Contract, Site
from rewrite.protocol import Pass


@dataclass(frozen=True)
class Careless(Pass):
    """Claims to rewrite the first norm, exactly, and doubles a weight elsewhere."""

    name: ClassVar[str] = "careless"
    contract: ClassVar[Contract] = Contract.EXACT

    def find(self, captured):
        for node in captured.nodes():
            if norm_of(captured, node) is not None:
                yield Site(str(node.target), "norm", node)
                return

    def rewrite(self, captured, site):
        ref = norm_of(captured, site.node).weight
        captured.editor.set_tensor(ref, captured.tensor(ref) * (1 + self.size))
        return Change("somewhere.else", "norm", "norm")

    size: float = 1e-4


@dataclass(frozen=True)
class Crashing(Careless):
    """Fails in the middle."""

    name: ClassVar[str] = "crashing"

    def rewrite(self, captured, site):
        raise KeyError("lost")


@dataclass(frozen=True)
class Wrong(Careless):
    """Names what it spoils."""

    name: ClassVar[str] = "wrong"

    def rewrite(self, captured, site):
        super().rewrite(captured, site)
        return Change(site.target, "norm", "norm")


INPUT = torch.linspace(-2, 2, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return models.randomize_norms_(model.eval(), 0)


def test_a_divergence_names_the_pass_that_touched_the_module() -> None:
    for passes, names in (([Wrong()], "wrong"), ([Wrong(), "freeze-bn"], "wrong, freeze-bn")):
        report = rewrite.convert(network(), passes, example_inputs=(INPUT,)).report
        assert report.passes[0].verification.divergence.rewrite == "wrong"
        assert report.verification.divergence.target == "1"
        assert report.verification.divergence.rewrite == names
        assert report.verification.divergence.source is None
        assert "rewritten by wrong" in str(report)


def test_the_argument_is_untouched() -> None:
    model = network()
    state = {
        name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    result = rewrite.convert(
        model, [BatchNormToGroupNorm(2)], example_inputs=(torch.randn(2, 3, 8, 8),)
    )
    for name, (identity, version, value) in state.items():
        tensor = model.state_dict(keep_vars=True)[name]
        assert (id(tensor), tensor._version) == (identity, version) and torch.equal(tensor, value)
    assert type(model[1]) is nn.BatchNorm2d and type(result.model) is nn.Sequential
    with torch.no_grad():
        result.model[3].weight.zero_()
    assert torch.equal(model[3].weight, state["3.weight"][2])


def test_what_no_pass_touches_shares_its_storage() -> None:
    model = network()
    result = rewrite.convert(model, [BatchNormToGroupNorm(2, keep="affine")], verify=False)
    for index in (0, 3):
        pair = (model[index].weight, result.model[index].weight)
        assert len({torch._C._data_address(weight) for weight in pair}) == 1


def test_passes_as_text_and_as_objects() -> None:
    by_text = rewrite.convert(network(), ["bn-to-gn{num_groups=2}"], verify=False)
    by_object = rewrite.convert(network(), [BatchNormToGroupNorm(2)], verify=False)
    assert by_text.report.changes == by_object.report.changes


def test_the_report_is_a_table_and_json() -> None:
    report = rewrite.convert(
        network(), [BatchNormToGroupNorm(2)], example_inputs=(torch.randn(1, 3, 8, 8),)
    ).report
    assert "GroupNorm(2, 8)" in str(report) and "cosine" in str(report)
    content = json.loads(report.to_json())
    assert content["passes"][0]["changes"][0]["target"] == "1"
    assert report.ok and content["ok"]


def test_without_an_input_one_is_inferred_and_said() -> None:
    report = rewrite.convert(network(), [BatchNormToGroupNorm(2)]).report
    assert report.verification is not None and "random one of shape" in report.notes[0]


def test_a_pass_that_breaks_its_contract_is_caught_and_so_is_what_it_did_not_name() -> None:
    report = rewrite.convert(network(), [Careless()]).report
    assert not report.ok
    assert report.passes[0].verification is not None and not report.passes[0].verification.ok
    assert report.passes[0].violations == ("1.weight",)
    assert "although no rewritten site names it" in str(report)


def test_the_contract_of_each_pass_is_checked_by_itself() -> None:
    report = rewrite.convert(network(), [Careless(), BatchNormToGroupNorm(2)]).report
    assert [item.ok for item in report.passes] == [False, True] and not report.ok


def test_a_failing_pass_names_itself_the_site_and_what_ran_before() -> None:
    with pytest.raises(
        rewrite.PassError, match=r"crashing: 1: 'lost' \(after bn-to-gn\{num_groups=2\}\)"
    ):
        rewrite.convert(network(), [BatchNormToGroupNorm(2), Crashing()])


def test_an_empty_pipeline_is_an_error() -> None:
    with pytest.raises(rewrite.OptionError, match="no pass given"):
        rewrite.convert(network(), [])


def test_an_input_that_does_not_fit_is_an_error_with_the_models_words() -> None:
    with pytest.raises(rewrite.VerificationError, match="to have 3 channels"):
        rewrite.convert(
            network(), [BatchNormToGroupNorm(2)], example_inputs=(torch.randn(1, 4, 8, 8),)
        )


def test_progress_names_the_steps() -> None:
    steps: list[str] = []
    rewrite.convert(network(), [BatchNormToGroupNorm(2)], progress=steps.append)
    assert steps == ["bn-to-gn", "verifying bn-to-gn"]


def test_a_second_pass_may_find_nothing() -> None:
    report = rewrite.convert(network(), [BatchNormToGroupNorm(2), BatchNormToLayerNorm()]).report
    assert [len(item.changes) for item in report.passes] == [1, 0]


def test_calibration_data_is_what_is_verified_on_where_no_input_is_given() -> None:
    batches = [(INPUT, torch.zeros(2)), (INPUT + 1, torch.zeros(2))]
    report = rewrite.convert(network(), [BatchNormToGroupNorm(2)], calibration=batches).report
    assert report.notes[0] == "verified on the first batch of the calibration data"
    assert report.verification is not None and report.verification.ok
    once = rewrite.convert(network(), [BatchNormToGroupNorm(2)], calibration=iter(batches)).report
    assert "random one of shape" in once.notes[0]


def test_a_consumed_model_gives_the_same_result_and_the_same_report() -> None:
    def converted(**options: bool) -> rewrite.Result[nn.Module]:
        torch.manual_seed(0)
        passes = [BatchNormToGroupNorm(2)]
        return rewrite.convert(network(), passes, example_inputs=(INPUT,), **options)

    kept, consumed = converted(), converted(consume=True)
    assert torch.equal(kept.model(INPUT), consumed.model(INPUT))
    assert kept.report.changes == consumed.report.changes and consumed.report.ok
    pair = (kept.report.verification, consumed.report.verification)
    assert pair[0].cosine == pair[1].cosine and pair[0].max_abs == pair[1].max_abs


def test_consuming_is_no_licence_to_change_what_is_not_named(monkeypatch) -> None:
    monkeypatch.setattr(Careless, "contract", Contract.APPROXIMATE)
    report = rewrite.convert(network(), [Careless()], example_inputs=(INPUT,), consume=True).report
    assert report.passes[0].violations == ("1.weight",) and not report.ok


def test_an_exact_pass_consumes_nothing() -> None:
    model = network()
    rewrite.convert(model, [Careless()], example_inputs=(INPUT,), consume=True)
    assert torch.equal(model[1].weight, network()[1].weight)
