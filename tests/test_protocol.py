from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import models
import rewrite
from passes import BatchNormToGroupNorm
from rewrite.errors import OptionError, PassError
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass, apply_pass


def traced() -> torch.fx.GraphModule:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    return symbolic_trace(models.randomize_norms_(model, 0))


def test_a_pass_is_callable_on_a_graph_module() -> None:
    model = traced()
    result = BatchNormToGroupNorm(num_groups=2)(model)
    assert isinstance(result, PassResult) and result.modified
    assert result.graph_module is model and type(model.get_submodule("1")) is nn.GroupNorm
    assert not BatchNormToGroupNorm()(model).modified


def test_runs_inside_torch_pass_manager_beside_others() -> None:
    def relu_to_silu(graph_module: torch.fx.GraphModule) -> PassResult:
        graph_module.set_submodule("2", nn.SiLU())
        return PassResult(graph_module, True)

    manager = PassManager(passes=[BatchNormToGroupNorm(num_groups=2), relu_to_silu], steps=1)
    result = manager(traced())
    assert result is not None
    kinds = [type(module) for module in result.graph_module.children()]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.SiLU]
    assert torch.isfinite(result.graph_module(torch.randn(2, 3, 8, 8))).all()


def test_a_graph_module_has_no_orphans_after_a_line_of_it_changed() -> None:
    model, inputs = models.build("functional_norm")
    graph_module = symbolic_trace(model)
    assert BatchNormToGroupNorm(num_groups=2)(graph_module).modified
    graph_module.graph.lint()
    used = {str(n.target).split(".")[0] for n in graph_module.graph.nodes if n.op == "call_module"}
    assert {name for name, _ in graph_module.named_children()} <= used
    assert not any("running" in name for name, _ in graph_module.named_buffers())
    assert torch.isfinite(graph_module(*inputs)).all()


def test_a_pattern_given_as_a_text_is_one_pattern() -> None:
    """Its characters would be patterns of their own, and "*" match everything."""
    model, inputs = models.build("residual")
    report = rewrite.convert(model, "fold", example_inputs=inputs, only="nothing.*").report
    assert not report.changes and report.skips
    report = rewrite.convert(model, "fold", example_inputs=inputs, skip="nothing.*").report
    assert report.changes


def test_touched_names_the_target_and_every_alias() -> None:
    model, inputs = models.build("norm_under_two_names")
    applied = apply_pass(BatchNormToGroupNorm(keep="affine"), model, inputs)
    assert applied.changes[0].touched == ("norm1", "norm2")


def test_a_flag_without_value_takes_none() -> None:
    with pytest.raises(OptionError, match="takes no value"):
        BatchNormToGroupNorm.from_flag(["x"])


class Looks(BatchNormToGroupNorm):
    """A pass whose `find` tries to edit."""

    def find(self, captured: Captured) -> Iterator[Site | Skip]:
        yield Skip("", "", f"editor: {hasattr(captured, 'editor')}")
        yield from super().find(captured)

    def rewrite_all(self, captured: Editable, sites: Any, calibration: Any = None) -> list[Change]:
        assert captured.editor is captured.editor
        assert not hasattr(captured.evidence, "editor")
        return super().rewrite_all(captured, sites, calibration)


def test_find_gets_what_cannot_edit_and_rewrite_what_can() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    applied = apply_pass(Looks(num_groups=2), model, (torch.randn(1, 3, 6, 6),))
    assert "editor: False" in [skip.reason for skip in applied.skips]
    assert len(applied.changes) == 1


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass whose `find` or `rewrite` is not what it has to be."""

    name: ClassVar[str] = "wrong"
    contract: ClassVar[Contract] = Contract.REDEFINING
    found: Any = ()

    def find(self, captured: Captured) -> Any:
        return self.found(captured) if callable(self.found) else self.found

    def rewrite(self, captured: Editable, site: Site) -> Any:
        return None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "wrong: find failed"),
        (["x"], "wrong: find yields a str; yield a Site or a Skip"),
        (lambda captured: captured.editor, "find changes nothing: edit in rewrite"),
        ([Site("0", "ReLU")], "wrong: 0: rewrite returns a NoneType; return a Change"),
    ],
)
def test_a_pass_that_is_wrong_is_told_so(found: Any, said: str) -> None:
    with pytest.raises(PassError, match=re.escape(said)):
        apply_pass(Wrong(found), nn.Sequential(nn.ReLU()))


class Settings(nn.Module):
    """Numbers of its own beside a norm by function, whose line a fold takes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.scale, self.unread, self.options = 2.0, 3, SimpleNamespace(name="a", power=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = self.bn
        y = F.batch_norm(self.conv(x), b.running_mean, b.running_var, b.weight, b.bias, eps=b.eps)
        return torch.tanh(y * self.scale) ** self.options.power


class SettingsOfAModule(Settings):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.bn(self.conv(x)) * self.scale) ** self.options.power


def test_a_note_names_what_an_edited_forward_does_not_read_any_more() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = models.randomize_norms_(Settings().double().eval())
    result = rewrite.convert(model, "fold", example_inputs=x)
    assert len(result.report.changes) == 1
    (note,) = (note for note in result.report.notes if "was edited" in note)
    assert "the forward of the model (Settings) was edited and keeps " in note
    assert note.endswith(
        "keeps options.power = 2, scale = 2.0: setting them afterwards changes nothing"
    )
    result.model.scale = model.scale = 5.0
    assert (result.model(x) - model(x)).abs().max() > 1e-3  # which is what the note says


def test_a_forward_that_stays_reads_what_it_read_and_nothing_is_said() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = models.randomize_norms_(SettingsOfAModule().double().eval())
    result = rewrite.convert(model, "fold", example_inputs=x)
    assert len(result.report.changes) == 1
    assert not [note for note in result.report.notes if "was edited" in note]
    result.model.scale = model.scale = 5.0
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
