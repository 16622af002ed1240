from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import models
import rewrite
from models.digits_resnet import accuracy, calibration_batches, load_digits_resnet
from passes import BatchNormToGroupNorm, BatchNormToInstanceNorm, BatchNormToLayerNorm
from rewrite.errors import OptionError
from rewrite.protocol import Pass

LAYOUTS = ({"num_groups": 1}, {"channels_per_group": 16})


def convert(model: nn.Module, item: Pass, calibration: object = None) -> rewrite.Result[nn.Module]:
    return rewrite.convert(model, [item], calibration=calibration, verify=False)  # type: ignore[arg-type]


def network(kind: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), kind(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    return models.randomize_norms_(model)  # type: ignore[return-value]


def batches(count: int = 4, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, 3, 1, 1, generator=generator)
        + torch.randn(size, 3, 10, 10, generator=generator)
        for _ in range(count)
    ]


# -- the digits checkpoint --------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", ["statistics", "function"])
def test_the_digits_model_keeps_what_it_learned(keep: str, layout: dict[str, int]) -> None:
    calibration = calibration_batches(1, 96) if keep == "function" else None
    result = convert(load_digits_resnet(), BatchNormToGroupNorm(keep=keep, **layout), calibration)
    assert accuracy(result.model) >= 0.994
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())


@pytest.mark.parametrize("keep", ["affine", "nothing"])
def test_the_digits_model_is_lost_otherwise(keep: str) -> None:
    result = convert(load_digits_resnet(), BatchNormToGroupNorm(keep=keep, num_groups=1))
    assert accuracy(result.model) < 0.5


def test_layer_norms_keep_it_too() -> None:
    calibration = calibration_batches(1, 96)
    for item, least in (
        (BatchNormToLayerNorm(keep="function"), 0.994),
        (BatchNormToLayerNorm(keep="function", over="c"), 0.9),
    ):
        assert accuracy(convert(load_digits_resnet(), item, calibration).model) >= least


# -- the fit ----------------------------------------------------------------------------------


def test_fitting_lowers_the_error_on_other_data() -> None:
    model, data = network(), torch.cat(batches(40, 8))[-200:]
    errors = {}
    for keep, calibration in (("statistics", None), ("function", batches(12, 8))):
        item = BatchNormToGroupNorm(keep=keep, num_groups=2, anchor=30.0)
        changed = convert(model, item, calibration).model
        with torch.no_grad():
            errors[keep] = float((changed(data) - model(data)).norm())
    assert errors["function"] < 0.6 * errors["statistics"]


@pytest.mark.parametrize("inplace", [False, True])
def test_errors_by_layer_are_the_norms_own_also_where_activations_work_in_place(
    inplace: bool,
) -> None:
    model = network(lambda: nn.ReLU6(inplace))
    model[5] = nn.ReLU(inplace)
    item = BatchNormToGroupNorm(keep="function", num_groups=1)
    errors = [change.metrics["error"] for change in convert(model, item, batches()).report.changes]
    # Had the old values been clamped where they lie, the errors of these norms were near 1.
    assert errors == pytest.approx([0.1, 0.1], abs=0.1)


def test_a_group_of_one_channel_loses_its_mean_and_says_so() -> None:
    result = convert(network(), BatchNormToInstanceNorm(keep="function"), batches())
    assert "the mean of each channel is lost" in result.report.changes[0].note


@pytest.mark.parametrize(
    ("options", "groups"),
    [({}, [1, 1]), ({"num_groups": 32}, [16, 8]), ({"min_channels": 1}, [16, 8]),
     ({"channels_per_group": 2}, [8, 4]), ({"min_channels": 4}, [4, 2])],
)  # fmt: skip
def test_there_is_one_group_where_no_number_was_asked_for(
    options: dict[str, int], groups: list[int]
) -> None:
    item = BatchNormToGroupNorm(keep="function", **options)
    example = (batches(1)[0],)
    result = rewrite.convert(
        network(), [item], example_inputs=example, calibration=batches(), verify=False
    )
    assert [result.model[1].num_groups, result.model[4].num_groups] == groups
    told = "32 groups asked, 4 fit 16 channels with at least 4 a group"
    assert (told in str(result.report.changes[0].note)) == (options == {"min_channels": 4})


def test_the_rest_of_the_model_stays_as_it_is() -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = convert(model, BatchNormToGroupNorm(keep="function", num_groups=1), batches())
    touched = {name for change in result.report.changes for name in change.touched}
    assert touched == {"0", "1", "3", "4"}
    assert torch.equal(result.model.get_parameter("8.weight"), model[8].weight)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_what_reads_regrouped_channels_changes_only_their_order() -> None:
    model = network()
    result = convert(model, BatchNormToGroupNorm(keep="function", num_groups=2), batches())
    touched = {name for change in result.report.changes for name in change.touched}
    assert touched == {"0", "1", "3", "4", "8"}
    old, new = model[8].weight, result.model.get_parameter("8.weight")
    assert sorted(map(tuple, new.T.tolist())) == sorted(map(tuple, old.T.tolist()))
    assert torch.equal(result.model.get_parameter("8.bias"), model[8].bias)


def test_hooks_and_modes_are_put_back() -> None:
    model = network()
    model[2].train()
    result = convert(model, BatchNormToGroupNorm(keep="function"), batches())
    modes = {name: module.training for name, module in model.named_modules()}
    assert {n: m.training for n, m in result.model.named_modules()} == modes
    assert not any(m._forward_hooks for m in result.model.modules())


def test_prefixes_take_factors_where_a_nonlinearity_is_in_between() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.BatchNorm2d(16)).eval()
    models.randomize_norms_(model)
    result = convert(model, BatchNormToGroupNorm(keep="function", num_groups=2), batches())
    assert (result.model.get_parameter("2.affine.weight") < 0).any()
    assert torch.equal(result.model.get_parameter("0.weight"), model[0].weight)


# -- data -------------------------------------------------------------------------------------


def test_any_iterable_of_batches_does() -> None:
    item = BatchNormToGroupNorm(keep="function", num_groups=2)
    labelled = [(batch, torch.zeros(len(batch))) for batch in batches()]

    def stream() -> Iterator[torch.Tensor]:
        yield from batches()

    results = [convert(network(), item, data).model for data in (batches(), labelled, stream())]
    for other in results[1:]:
        for a, b in zip(results[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_function_needs_data() -> None:
    with pytest.raises(OptionError, match="--calibration"):
        convert(network(), BatchNormToGroupNorm(keep="function"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch to fit to"),
        ([torch.zeros(0, 3, 10, 10)], "is empty"),
        ([torch.full((2, 3, 10, 10), float("nan"))], "NaN"),
        ([torch.randn(2, 4, 10, 10)], "the model rejects it"),
        (["text"], "holds no tensor"),
    ],
)
def test_complains_about_bad_data(data: list[object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        convert(network(), BatchNormToGroupNorm(keep="function"), data)


def test_bad_batches_among_good_ones_are_named() -> None:
    data = [*batches(), torch.full((2, 3, 10, 10), float("inf"))]
    result = convert(network(), BatchNormToGroupNorm(keep="function"), data)
    assert any("batch 4: holds NaN or infinity, left out" in note for note in result.report.notes)


@pytest.mark.parametrize("data", [torch.zeros(1, 3, 10, 10), torch.ones(8, 3, 10, 10)])
def test_one_sample_and_constant_images_give_a_finite_model(data: torch.Tensor) -> None:
    changed = convert(network(), BatchNormToGroupNorm(keep="function"), [data]).model
    assert all(torch.isfinite(p).all() for p in changed.parameters())
    assert torch.isfinite(changed(torch.randn(2, 3, 10, 10))).all()


def test_data_of_another_dtype_is_cast() -> None:
    data = [batch.double() for batch in batches()]
    assert convert(network(), BatchNormToGroupNorm(keep="function"), data).report.ok
    whole = [torch.randint(0, 255, (8, 3, 10, 10), dtype=torch.uint8)]
    with pytest.raises(OptionError, match="the model rejects it"):
        convert(network(), BatchNormToGroupNorm(keep="function"), whole)


def test_one_call_verifies_in_the_models_dtype_on_a_batch_that_can_be_used() -> None:
    data = [torch.full((2, 3, 10, 10), float("nan")), *batches()]
    item = BatchNormToGroupNorm(keep="function", num_groups=2)
    result = rewrite.convert(network().double(), [item], calibration=data)
    check = result.report.verification
    assert check is not None and check.ok and result.report.ok
    assert any("batch 0: holds NaN" in note for note in result.report.notes)


# -- norms as they occur in real checkpoints --------------------------------------------------


def _set(index: int, **values: float) -> Callable[[nn.Sequential], object]:
    def edit(model: nn.Sequential) -> None:
        for name, value in values.items():
            getattr(model[index], name).data[::3] = value

    return edit


EXTREME: dict[str, Callable[[nn.Sequential], object]] = {
    "zero variance": _set(1, running_var=0.0),
    "denormal variance": _set(1, running_var=5.6e-45),
    "no gamma": _set(1, weight=0.0),
    "negative gamma": _set(1, weight=-1.5),
    "large eps": lambda model: setattr(model[1], "eps", 50.0),
    "half precision": lambda model: model.half(),
}


@pytest.mark.parametrize("keep", ["statistics", "function"])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_norms_are_kept_better_than_by_copying(case: str, keep: str) -> None:
    model = network()
    EXTREME[case](model)
    dtype = model[0].weight.dtype
    data = torch.cat(batches(8)).to(dtype)
    errors = {}
    for kept in ("affine", keep):
        item = BatchNormToGroupNorm(keep=kept, num_groups=2, anchor=1e6 if kept == keep else None)
        calibration = batches() if kept == "function" else None
        changed = convert(model, item, calibration).model
        assert all(torch.isfinite(p).all() and p.dtype == dtype for p in changed.parameters())
        with torch.no_grad():
            errors[kept] = float((changed(data) - model(data)).float().norm())
    assert errors[keep] < 0.7 * errors["affine"]


def test_an_interrupted_run_says_what_it_had() -> None:
    def stream() -> Iterator[torch.Tensor]:
        yield from batches(2, 8)
        raise KeyboardInterrupt

    with pytest.raises(OptionError, match="interrupted after 16 samples"):
        convert(network(), BatchNormToGroupNorm(keep="function"), stream())
