import pytest
import torch
from torch import nn

import models


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors(item)]


def run(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(*inputs))


@pytest.mark.parametrize("name", models.all_models())
def test_runs_and_repeats(name):
    model, inputs = models.build(name)
    again, inputs_again = models.build(name)
    for first, second in zip(run(model, inputs), run(again, inputs_again), strict=True):
        assert torch.isfinite(first.double()).all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(models.all_models().keys() - {"without_norm"}))
def test_every_norm_matters(name):
    """Randomizing again changes the output: no norm is left close to the identity."""
    first = run(*models.build(name, seed=0))
    second = run(*models.build(name, seed=1))
    assert any(
        (a - b).abs().max() > 1e-3
        for a, b in zip(first, second, strict=True)
        if a.is_floating_point()
    )


@pytest.mark.parametrize("name", sorted(models.all_models().keys() - {"graph_module_root"}))
def test_says_what_is_awkward(name):
    assert "__doc__" in vars(type(models.all_models()[name]()))
    assert type(models.all_models()[name]()).__doc__


def test_modes_are_kept_where_they_are_the_point():
    factories = models.all_models()
    mixed = factories["train_mode_norm"]()
    assert (mixed.training, mixed.bn1.training, mixed.bn2.training) == (False, False, True)
    assert factories["train_mode"]().bn.training
    assert not factories["residual"]().bn1.training


def test_factories_are_deterministic_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = models.all_models()["residual"]()
    assert torch.equal(torch.rand(3), expected)
    two = models.all_models()["residual"]()
    assert torch.equal(one.conv1.weight, two.conv1.weight)


def test_randomize_reaches_functional_norms_and_plain_containers():
    functional = models.randomize_norms_(models.all_models()["functional_norm"]())
    for name, fresh in {"gamma": 1, "beta": 0, "mean": 0, "var": 1}.items():
        assert (getattr(functional, name) - fresh).abs().min() > 1e-4, name
    plain = models.randomize_norms_(models.all_models()["plain_containers"]())
    for norm in (plain.layers[0], plain.heads["norm"]):
        assert (norm.running_mean != 0).all()
        assert (norm.weight != 1).all()


def test_randomize_keeps_what_is_no_norm_and_what_is_extreme():
    fresh = models.all_models()["extreme_statistics"]()
    model = models.randomize_norms_(models.all_models()["extreme_statistics"]())
    assert torch.equal(model.conv.weight, fresh.conv.weight)
    assert model.bn.running_var[0] == 0
    assert 0 < model.bn.running_var[1] < 1e-40
    assert (model.bn.running_var[2:] > 0.1).all()
    assert model.bn.weight[2] < 0
    assert model.bn.weight[3] == 0


def test_randomize_depends_on_the_seed():
    def gamma(seed):
        return models.randomize_norms_(nn.BatchNorm2d(8), seed).weight.detach()

    assert torch.equal(gamma(1), gamma(1))
    assert not torch.equal(gamma(1), gamma(2))


def test_digits_checkpoint_is_small_accurate_and_of_torchvision_alone():
    from models import digits_resnet as digits

    assert digits.CHECKPOINT.stat().st_size < 1_000_000
    names = torch.serialization.get_unsafe_globals_in_checkpoint(digits.CHECKPOINT)
    assert {name.split(".")[0] for name in names} == {"torch", "torchvision"}
    model = digits.load_digits_resnet()
    assert not model.training
    assert digits.accuracy(model) >= 0.994
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 6


def test_digits_accuracy_judges_the_model_and_keeps_its_modes():
    from models import digits_resnet as digits

    untrained = digits.digits_resnet()
    assert digits.accuracy(untrained) < 0.5
    assert all(module.training for module in untrained.modules())


def test_digits_calibration_is_not_the_test_split():
    from models import digits_resnet as digits

    batches = digits.calibration_batches()
    assert [tuple(batch.shape) for batch in batches] == [(64, 1, 8, 8)] * 4
    held_out = {image.numpy().tobytes() for image in digits.held_out()[0]}
    assert not any(image.numpy().tobytes() in held_out for batch in batches for image in batch)
