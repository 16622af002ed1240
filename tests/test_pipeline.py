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
        report = rewrite.convert(network(), passes, example_inputs=(INPUT,), check=False).report
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
    with pytest.raises(rewrite.ContractError, match=r"careless: 1\.weight changed") as caught:
        rewrite.convert(network(), [Careless()])
    report = caught.value.result.report
    assert not report.ok
    assert report.passes[0].verification is not None and not report.passes[0].verification.ok
    assert report.passes[0].violations == ("1.weight",)
    assert "although no rewritten site names it" in str(report)


def test_the_contract_of_each_pass_is_checked_by_itself() -> None:
    passes = [Careless(), BatchNormToGroupNorm(2)]
    report = rewrite.convert(network(), passes, check=False).report
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


def test_a_made_up_input_is_no_evidence_of_a_rank() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double().eval()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 1.5)
    made_up = rewrite.convert(model, "fold", check=False).report
    assert not made_up.changes and "number of axes" in made_up.skips[0].reason
    given = rewrite.convert(model, "fold", example_inputs=torch.randn(4, 5).double())
    assert len(given.report.changes) == 1 and given.report.ok
    # The first layer of a network of convolutions says the rank.
    images = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    assert len(rewrite.convert(images, "fold").report.changes) == 1


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
    report = rewrite.convert(
        network(), [Careless()], example_inputs=(INPUT,), consume=True, check=False
    ).report
    assert report.passes[0].violations == ("1.weight",) and not report.ok


def test_an_exact_pass_consumes_nothing() -> None:
    model = network()
    rewrite.convert(model, [Careless()], example_inputs=(INPUT,), consume=True, check=False)
    assert torch.equal(model[1].weight, network()[1].weight)


@dataclass(frozen=True)
class Spoiling(Pass):
    """Doubles and halves every norm's weight, but spoils those called in `bad`."""

    name: ClassVar[str] = "spoiling"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    bad: tuple[str, ...] = ()
    names: bool = True
    crash: bool = False

    def find(self, captured):
        for node in captured.nodes():
            if norm_of(captured, node) is not None:
                yield Site(str(node.target), "norm", node)

    def rewrite(self, captured, site):
        ref = norm_of(captured, site.node).weight
        spoilt = site.target in self.bad
        if spoilt and self.crash:
            raise KeyError("lost")
        if spoilt and not self.names:
            other = captured.tensor(norm_of(captured, site.node).bias)
            captured.model[0].weight.data = captured.model[0].weight.data * (1 + other.abs().max())
        factor = 1.001 if spoilt else 1.0
        captured.editor.set_tensor(ref, captured.tensor(ref) * factor)
        return Change(site.target, "norm", "norm")


def deep_network(norms: int = 9) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1)]
    for _ in range(norms):
        layers += [nn.BatchNorm2d(4), nn.SiLU()]
    return models.randomize_norms_(nn.Sequential(*layers).eval(), 0)


@pytest.mark.parametrize("bad", [("5",), ("1", "17")])
@pytest.mark.parametrize("how", [{}, {"names": False}, {"crash": True}])
def test_a_site_that_breaks_the_contract_is_left_out_and_the_rest_is_done(bad, how) -> None:
    result = rewrite.convert(deep_network(), Spoiling(bad, **how), example_inputs=INPUT)
    left_out = {skip.target: skip.reason for skip in result.report.skips}
    assert set(left_out) == set(bad) and result.report.ok
    assert all("breaks the contract" in reason for reason in left_out.values())
    assert len(result.report.changes) == 9 - len(bad)
    assert torch.equal(result.model(INPUT), deep_network()(INPUT))


def test_when_every_site_breaks_the_contract_it_is_an_error_that_holds_the_result() -> None:
    bad = tuple(str(index) for index in range(1, 19, 2))
    with pytest.raises(rewrite.ContractError, match=r"spoiling.*is not exact-in-eval") as caught:
        rewrite.convert(deep_network(), [Spoiling(bad)], example_inputs=INPUT)
    assert len(caught.value.result.report.changes) == 9 and not caught.value.result.report.ok
    result = rewrite.convert(deep_network(), [Spoiling(bad)], example_inputs=INPUT, check=False)
    assert not result.report.ok


@pytest.mark.parametrize(
    "given", ["bn-to-gn", BatchNormToGroupNorm, BatchNormToGroupNorm(), ("bn-to-gn",)]
)
def test_a_pass_is_a_text_a_class_an_instance_or_several(given) -> None:
    expected = rewrite.convert(network(), ["bn-to-gn"], verify=False).report.changes
    assert rewrite.convert(network(), given, verify=False).report.changes == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no pass given"),
        (None, "None is no pass"),
        ([3], "3 is no pass"),
        (nn.ReLU, "is no pass"),
        ({"fold": {}}, "is no pass"),
        (Pass, "Pass: Can't instantiate"),
        ("", "is no pass"),
    ],
)
def test_what_is_no_pass_is_one_clear_error(given, message) -> None:
    with pytest.raises(rewrite.OptionError, match=message):
        rewrite.convert(network(), given)


class Keywords(nn.Module):
    """Takes its image by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, image: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return self.body(image) * factor


@pytest.mark.parametrize("given", [INPUT, (INPUT,), [INPUT], {"image": INPUT}])
def test_example_inputs_are_a_tensor_a_tuple_or_keywords(given) -> None:
    report = rewrite.convert(Keywords().eval(), "fold", example_inputs=given).report
    assert [change.target for change in report.changes] == ["body.1"]
    assert report.verification.cases[0].name == "given"
    model = Keywords().eval()
    assert rewrite.verify(model, model, given).ok
    assert rewrite.inspect_model(model, given).norms[0].name == "body.1"
    captured = rewrite.capture(model, given)
    assert {tuple(captured.shape(node) or ()) for node in captured.nodes()} > {(2, 3, 8, 8)}
