"""State dicts between the three spellings of weight norm."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rewrite.checkpoint.load import load
from rewrite.weights.weight_norm_keys import fit_weight_norm_keys


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv1d(4, 2, 1)))


def old(plain: nn.Sequential) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(plain[0])
        nn.utils.weight_norm(plain[2][0])
    return plain


def new(plain: nn.Sequential) -> nn.Sequential:
    weight_norm(plain[0])
    weight_norm(plain[2][0])
    return plain


FORMS = {"plain": lambda m: m, "old": old, "new": new}


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_every_form_fits_every_other(source, target):
    written = FORMS[source](model())
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.add_(0.1)
    read = FORMS[target](model())
    state = written.state_dict()
    fitted = fit_weight_norm_keys(state, read.state_dict().keys())
    read.load_state_dict(fitted)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(read(x), written(x))
    assert fitted.keys() == read.state_dict().keys()
    if source != target:
        with pytest.raises(RuntimeError, match=r"Missing key\(s\)"), warnings.catch_warnings():
            warnings.simplefilter("error")
            _load_without_help(read, state)


def _load_without_help(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for layer in module.modules():
        layer._load_state_dict_pre_hooks.clear()
    module.load_state_dict(state)


def test_other_keys_that_look_alike_are_left_alone():
    state = {"a.conv_g": torch.ones(2), "a.conv_v": torch.ones(2), "b.weight": torch.ones(2, 2)}
    assert fit_weight_norm_keys(state, state.keys()) == state
    assert fit_weight_norm_keys(state, {"c"}).keys() == state.keys()


@pytest.mark.parametrize("source", ["old", "new"])
def test_a_weight_that_becomes_plain_is_rounded_once_where_its_exact_value_is_asked_for(source):
    torch.manual_seed(0)
    written, plain = FORMS[source](model()), model().state_dict().keys()
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    state, exact = written.state_dict(), {}
    fitted = fit_weight_norm_keys(state, plain, exact)
    wide = fit_weight_norm_keys({key: t.double() for key, t in state.items()}, plain)
    assert fitted.keys() == plain and exact.keys() == {"0.weight", "2.0.weight"}
    for name, value in exact.items():
        assert torch.equal(value(), wide[name])
        assert torch.equal(fitted[name], wide[name].float())
    narrow = fit_weight_norm_keys(state, plain)
    assert any(not torch.equal(narrow[name], fitted[name]) for name in exact)


def test_no_exact_value_is_told_of_a_weight_that_is_not_computed():
    normed, exact = new(model()).state_dict(), {}
    fit_weight_norm_keys(model().state_dict(), normed.keys(), exact)
    fit_weight_norm_keys(normed, old(model()).state_dict().keys(), exact)
    assert exact == {}


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_a_file_of_any_form_loads_into_any_form(source, target, tmp_path, monkeypatch):
    written = FORMS[source](model())
    torch.save(written.state_dict(), tmp_path / "state.pt")
    (tmp_path / "normed_makers.py").write_text(
        f"import sys\nforms = sys.modules[{__name__!r}]\n"
        f"def build():\n    return forms.FORMS[{target!r}](forms.model())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("normed_makers", None)
    read = load(tmp_path / "state.pt", factory="normed_makers:build")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(read(x), written(x))
