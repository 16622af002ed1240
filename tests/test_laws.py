"""Every installed pass, over every model of `models/`, keeps the laws of the protocol."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from rewrite import registry
from rewrite.equivalence.verify import check_untouched
from rewrite.graph.capture import capture
from rewrite.outcomes import Contract
from rewrite.protocol import Pass, apply_pass, find_sites
from rewrite.runtime.copying import copy_model

# Options without which a pass does nothing.
_SPECS = {"reinit": "reinit{scheme=he}"}
# Passes that are another change each time: a stream that was turned can be turned again.
_AGAIN = {"rotate-stream"}
_NAMES = tuple(models.all_models())


def _pass(name: str) -> Pass:
    return registry.parse(_SPECS.get(name, name))


def _state(model: nn.Module) -> dict[str, tuple[int, int, torch.Tensor]]:
    """Return identity, version and value of every tensor, tied and non-persistent ones too."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {
        name: (id(t), t._version, torch.empty(0) if nn.parameter.is_lazy(t) else t.detach().clone())
        for name, t in tensors
    }


def _same(before: dict[str, tuple[int, int, torch.Tensor]], model: nn.Module) -> bool:
    after = _state(model)
    return before.keys() == after.keys() and all(
        old[:2] == after[name][:2] and torch.equal(old[2], after[name][2])
        for name, old in before.items()
    )


def _structure(model: nn.Module) -> list[tuple[str, int, bool, frozenset[str]]]:
    return [
        (n, id(m), m.training, frozenset(vars(m)))
        for n, m in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("model_name", _NAMES)
@pytest.mark.parametrize("pass_name", sorted(registry.entries()))
def test_laws(pass_name: str, model_name: str) -> None:
    rewrite = _pass(pass_name)
    model, inputs = models.build(model_name)

    # `find` changes nothing, and yields each candidate once.
    state, structure = _state(model), _structure(model)
    captured = capture(model, inputs)
    sites, skips = find_sites(rewrite, captured)
    assert _same(state, model) and _structure(model) == structure
    targets = [(outcome.target, outcome.node) for outcome in sites]
    assert len(targets) == len(set(targets))

    # Each candidate ends as one Change or one Skip; the original stays as it was.
    copied = copy_model(model)
    applied = apply_pass(rewrite, copied, inputs, [inputs])
    assert len(applied.changes) == len(sites)
    assert [skip.target for skip in applied.skips] == [skip.target for skip in skips]
    assert _same(state, model) and _structure(model) == structure

    # Untouched state is bit-identical; modes and dtypes survive.
    touched = {name for change in applied.changes for name in change.touched}
    assert check_untouched(model, applied.model, touched) == []
    assert applied.model.training == model.training
    modes = {name: m.training for name, m in model.named_modules()}
    for name, module in applied.model.named_modules():
        assert module.training == modes.get(name, module.training), name
    kinds = {t.dtype for t in model.parameters()}
    assert {t.dtype for t in applied.model.parameters()} <= kinds

    # A second application changes nothing.
    if rewrite.contract is not Contract.REDEFINING and pass_name not in _AGAIN:
        again = apply_pass(rewrite, applied.model, inputs)
        assert [change.target for change in again.changes] == []


def test_every_pass_of_the_project_is_installed() -> None:
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as stream:
        declared = tomllib.load(stream)["project"]["entry-points"]["rewrite.passes"]
    own = {n: e.value for n, e in registry.entries().items() if e.value.startswith("passes:")}
    assert own == declared, "run: pip install -e ."


@pytest.mark.parametrize("pass_name", sorted(registry.entries()))
def test_the_laws_are_not_empty(pass_name: str) -> None:
    for model_name in _NAMES:
        model, inputs = models.build(model_name)
        if apply_pass(_pass(pass_name), model, inputs, [inputs]).changes:
            return
    pytest.fail(f"no model of models/ has a site of {pass_name}: add one")


def test_the_laws_notice_a_pass_that_breaks_them() -> None:
    model, _ = models.build("residual")
    state = _state(model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert not _same(state, model)
