"""A state dict and the model that it is loaded into."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load
from tests.checkpoint.files import LINEAR, refused, refused_at_once, same, small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_several_models_in_one_file_are_told_apart(tmp_path):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"generator": one.state_dict(), "critic": two.state_dict()}, tmp_path / "c.pt")
    refused_at_once(tmp_path / "c.pt", "generator, critic", "--key", factory=LINEAR)
    assert same(load(tmp_path / "c.pt", factory=LINEAR, key="critic"), two)
    refused_at_once(tmp_path / "c.pt", "no state dict called x", factory=LINEAR, key="x")
    both = {f"a.{k}": v for k, v in one.state_dict().items()}
    both |= {f"b.{k}": v for k, v in two.state_dict().items()}
    torch.save(both, tmp_path / "c.pt")
    refused_at_once(tmp_path / "c.pt", "a., b.", "--strip-prefix", factory=LINEAR)
    assert same(load(tmp_path / "c.pt", factory=LINEAR, strip_prefix="b."), two)


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {"model_state_dict": s},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {"model_ema": s},
    ],
    ids=[
        "plain",
        "state_dict",
        "model",
        "model_state_dict",
        "twice",
        "parallel",
        "compiled",
        "ema",
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts_with_a_factory(tmp_path, factories, nest, legacy):
    model = small()
    path = tmp_path / "s.pth"
    torch.save(nest(model.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    back = load(path, factory="makers:build")
    assert same(model, back)
    assert not back.training


def test_safetensors(tmp_path, factories):
    from safetensors.torch import save_file

    save_file(dict(small().state_dict()), tmp_path / "s.safetensors")
    assert same(load(tmp_path / "s.safetensors", factory="makers:build"), small())
    refused(tmp_path / "s.safetensors", "--factory")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 200)
    refused(tmp_path / "bad.safetensors", "safetensors", factory="makers:build")


@pytest.mark.parametrize("dropped", [None, "0.weight", "1.weight"])
def test_tied_parameters_of_the_factory_stay_tied(tmp_path, monkeypatch, dropped):
    """safetensors files keep only one of the keys of a tied parameter."""
    code = """
    from torch import nn
    def build():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        model[0].bias.requires_grad_(False)
        return model
    """
    (tmp_path / "tied_makers.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("tied_makers", None)
    import tied_makers

    state = tied_makers.build().state_dict()
    if dropped is not None:
        del state[dropped]
    torch.save(state, tmp_path / "s.pt")
    back = load(tmp_path / "s.pt", factory="tied_makers:build")
    assert back[0].weight is back[1].weight
    kept = "1.weight" if dropped == "0.weight" else "0.weight"
    assert torch.equal(back[0].weight, state[kept])
    assert not back[0].bias.requires_grad


def test_old_batch_norms_without_a_counter(tmp_path, factories):
    """torch 0.4 wrote no `num_batches_tracked`; the module itself knows how to do without."""
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    del state._metadata
    torch.save(state, tmp_path / "s.pt")
    back = load(tmp_path / "s.pt", factory="makers:build")
    assert torch.equal(back[1].running_var, state["1.running_var"])


def test_the_loaded_model_has_the_dtype_of_the_file(tmp_path, factories):
    torch.save(small().half().state_dict(), tmp_path / "s.pt")
    back = load(tmp_path / "s.pt", factory="makers:build")
    assert back[0].weight.dtype == torch.float16
    assert back[1].num_batches_tracked.dtype == torch.int64


def test_keys_that_do_not_match_are_counted_and_named(tmp_path, factories):
    state = small().state_dict()
    state["extra.weight"] = state.pop("0.weight")
    state["1.weight"] = torch.ones(7)
    torch.save(state, tmp_path / "s.pt")
    refused(
        tmp_path / "s.pt",
        "1 missing (0.weight)",
        "1 unexpected (extra.weight)",
        "1 of another shape (1.weight (7,) instead of (4,))",
        factory="makers:build",
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_loading_a_large_state_dict_holds_it_once(tmp_path):
    """Resident memory of a 200 MB state dict, over that of the imports: at most 1.2 times."""
    program = textwrap.dedent(
        """
        import re, sys
        from pathlib import Path
        from rewrite.checkpoint.load import load
        status = Path("/proc/self/status")
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
        before = peak()
        kwargs = '({"in_features": 5000, "out_features": 10000})'
        model = load(sys.argv[1], factory=f"torch.nn:Linear{kwargs}")
        total = sum(float(p.sum()) for p in model.parameters())
        print((peak() - before) / sum(p.numel() * 4 for p in model.parameters()))
        """
    )
    torch.save(nn.Linear(5000, 10000).state_dict(), tmp_path / "s.pt")
    command = [sys.executable, "-c", program, str(tmp_path / "s.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.2
