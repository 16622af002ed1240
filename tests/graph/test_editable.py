"""`find` gets evidence that cannot edit; `rewrite` gets the same state with an editor."""

from __future__ import annotations

import gc

import torch
from torch import nn

from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable


def test_the_evidence_of_a_captured_model_has_no_editor() -> None:
    editable = capture(nn.Sequential(nn.Linear(2, 2)))
    assert type(editable) is Editable and type(editable.evidence) is Captured
    assert not hasattr(editable.evidence, "editor")


def test_evidence_and_editable_are_two_views_of_one_state() -> None:
    editable = capture(nn.Sequential(nn.Linear(2, 2)))
    evidence = editable.evidence
    evidence.notes.append("seen")
    editable.shape_error = "none"
    assert editable.notes == ["seen"] and evidence.shape_error == "none"
    assert Editable.of(evidence).editor is editable.editor


def test_there_is_one_editor_and_what_it_does_is_seen_by_the_evidence() -> None:
    editable = capture(nn.Sequential(nn.Linear(2, 2)))
    assert editable.editor is editable.editor
    new = nn.Linear(2, 2)
    editable.editor.replace("0", new)
    assert editable.evidence.module("0") is new and editable.model[0] is new
    assert torch.equal(editable.evidence.model[0].weight, new.weight)


def test_a_view_keeps_what_it_shares_when_the_view_it_came_from_is_garbage() -> None:
    def view() -> Editable:
        made = capture(nn.Sequential(nn.Linear(2, 2)))
        first = Captured(made.model, made.tree, made.regions, made.opaque)
        assert first.effects.written_tensors == {}  # holds `first`, which holds it: a cycle
        return Editable.of(first)

    editable = view()
    gc.collect()
    assert editable.effects.memory(next(iter(editable.nodes()))) is not None
    assert [str(node.target) for node in editable.calls("0")] == ["0"]
