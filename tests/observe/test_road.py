"""Folds from observed calls: right where they are made, and refused with the true reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from passes import FoldNorm
from rewrite.errors import CheckpointError
from rewrite.fold.recipes import from_data
from rewrite.fold.replay import apply_report
from tests.observe import blocks
from tests.observe.blocks import WIDTH, Decoder, RMSNorm, randomized, tokens, untraceable


def folded(model: nn.Module, inputs: Any = None, **options: Any) -> Any:
    """Convert, check equality to 1e-12, and return the result."""
    inputs = (tokens(),) if inputs is None else inputs
    result = rewrite.convert(model, FoldNorm(**options), example_inputs=inputs)
    with torch.no_grad():
        before, after = model(*inputs), result.model(*inputs)
    for a, b in zip(_tensors(before), _tensors(after), strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    assert result.report.ok
    return result


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in _tensors(item)]


def targets(result: Any) -> set[str]:
    return {change.target for change in result.report.changes}


def reason(result: Any, target: str) -> str:
    found = [skip.reason for skip in result.report.skips if skip.target == target]
    assert len(found) == 1, result.report.skips
    return found[0]


NORMS = [RMSNorm, blocks.GemmaNorm, blocks.WrittenOutLayerNorm]
NORMS += [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH)]


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_a_decoder_folds(norm: Any) -> None:
    result = folded(randomized(Decoder(norm)))
    names = {f"layers.{i}.norm{n}" for i in (0, 1) for n in (1, 2)} | {"norm"}
    assert targets(result) == names
    assert any("example input" in note for note in result.report.notes)


def test_the_weight_of_a_layer_norm_is_gone_and_that_of_a_class_stays_neutral() -> None:
    standard = folded(randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))).model
    assert not any("norm" in key for key in standard.state_dict())
    assert standard.head.bias is not None, "the shift of the last norm is a bias of the head"
    written = folded(randomized(Decoder(blocks.GemmaNorm)))
    assert not written.model.norm.weight.any(), "1 + w is one where w is zero"
    assert type(written.model) is Decoder
    assert "stays" in next(c.note for c in written.report.changes if c.target == "norm")


def test_a_tied_head_keeps_its_norm_unless_it_is_untied() -> None:
    model = randomized(Decoder(tied=True))
    result = folded(model)
    assert "embed" in reason(result, "norm") and "untie" in reason(result, "norm")
    untied = folded(model, untie=True)
    assert "norm" in targets(untied)
    assert untied.model.head.weight is not untied.model.embed.weight
    assert torch.equal(untied.model.embed.weight, model.embed.weight)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = RMSNorm(), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        return self.head(h + self.inner(h))


def test_a_norm_whose_output_is_the_stream_stays() -> None:
    result = folded(randomized(PostNorm()), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    assert "add" in reason(result, "norm")


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return self.head(h), h


def test_a_norm_whose_output_is_returned_stays() -> None:
    result = folded(randomized(Returned()), (torch.randn(2, WIDTH, dtype=torch.float64),))
    assert "returns" in reason(result, "norm")


class QueryNorm(nn.Module):
    """A norm between projection and rotary embedding, and one of a part of a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.latent = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12)
        self.q_norm, self.latent_norm = RMSNorm(), RMSNorm(8)
        self.k = nn.Linear(8, WIDTH)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        q = self.q_norm(self.q(x))
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        q = (
            q * angle.cos()
            + torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], -1) * angle.sin()
        )
        compressed, rest = self.latent(x).split([8, 4], -1)
        return q @ self.k(self.latent_norm(compressed)).transpose(1, 2) + rest.sum()


def test_a_query_norm_before_rotary_embedding_stays_and_a_latent_norm_folds() -> None:
    result = folded(randomized(QueryNorm()), (torch.randn(2, 3, WIDTH, dtype=torch.float64),))
    assert targets(result) == {"latent_norm"}
    assert "meet other channels" in reason(result, "q_norm")


class Packed(nn.Module):
    """Packed attention of torch.nn, transposed weights, expert weights of three axes, a router."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm() for _ in range(3))
        self.shifted = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, 6))
        self.transposed = nn.Parameter(torch.randn(WIDTH, 5))
        self.bias = nn.Parameter(torch.randn(5))

    @untraceable
    def forward(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        h, memory = self.norms[0](x), self.norms[1](y)
        a = self.attention(h, memory, memory, need_weights=False)[0]
        flat = self.norms[2](x).reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        e = torch.bmm(flat[:, None], self.experts[chosen])[:, 0]
        t = torch.addmm(self.bias, self.shifted(x).view(-1, WIDTH), self.transposed)
        return a, e, t


def test_packed_transposed_and_expert_weights_take_norms_up() -> None:
    x, y = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (3, 4))
    result = folded(randomized(Packed()), (x, y))
    assert targets(result) == {"norms.0", "norms.1", "norms.2", "shifted"}
    assert result.model.experts.shape == (3, WIDTH, 6)


class Merger(nn.Module):
    """Four patches become one: a view between the norm and the layer repeats its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.merge = nn.LayerNorm(4), nn.Linear(16, 3)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.merge(self.norm(x).view(-1, 16))


def test_a_patch_merger_takes_its_norm_up() -> None:
    result = folded(randomized(Merger()), (torch.randn(8, 4, dtype=torch.float64),))
    assert targets(result) == {"norm"}


class Shared(nn.Module):
    """One layer behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.layer = RMSNorm(), RMSNorm(), nn.Linear(WIDTH, WIDTH)

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(self.two(self.layer(self.one(x))))


def test_a_layer_behind_two_norms_takes_neither_up() -> None:
    result = folded(randomized(Shared()), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert not targets(result)
    assert "layer" in reason(result, "one")


class Raw(nn.Module):
    """An argument that no example call gives chooses what else reads the value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head, self.other = RMSNorm(), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.post_norm = False

    @untraceable
    def forward(self, x: Tensor, raw: bool = False, **kwargs: Any) -> Tensor:
        if self.post_norm:
            x = self.norm(x * 2)
        h = self.norm(x)
        if self.kind == "reads" and raw:
            return h * 2
        y = self.head(h)
        if self.kind == "overwritten" and raw:
            h = y
            return h * 3
        if self.kind == "calls" and raw:
            return self.head(x)
        return y


@pytest.mark.parametrize(
    ("kind", "folds"), [("reads", False), ("calls", False), ("overwritten", True)]
)
def test_a_line_that_no_call_took_counts(kind: str, folds: bool) -> None:
    result = folded(randomized(Raw(kind)), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"norm"} if folds else set())
    if not folds:
        assert "test_road.py:" in reason(result, "norm") and "no call took it" in reason(
            result, "norm"
        )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    @untraceable
    def forward(self, x: Tensor, twice: Tensor | None = None, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        return self.head(h) if twice is None else self.head(h) + h[..., :4]


def test_several_calls_are_all_evidence() -> None:
    model = randomized(Residual())
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_calls=[(x,), {"x": x, "twice": x}])
    assert not targets(result)
    assert any("call 1" in note and "call 2" in note for note in result.report.notes)


def test_a_scale_passes_a_gate_and_a_shift_does_not() -> None:
    class Gated(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.out = norm, nn.Linear(WIDTH, WIDTH)

        @untraceable
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.out(self.norm(x) * F.silu(x))

    x = (torch.randn(3, WIDTH, dtype=torch.float64),)
    assert targets(folded(randomized(Gated(RMSNorm())), x)) == {"norm"}
    refused = folded(randomized(Gated(nn.LayerNorm(WIDTH))), x)
    assert "no shift" in reason(refused, "norm")


def test_a_call_that_the_model_refuses_is_an_error_with_what_it_said() -> None:
    with pytest.raises(rewrite.RewriteError, match=r"call 2.*index"):
        rewrite.convert(
            randomized(Decoder()), "fold",
            example_calls=[(tokens(),), (torch.full((1, 3), 999),)],
        )  # fmt: skip


def test_the_argument_is_untouched() -> None:
    model = randomized(Decoder(tied=True))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded(model, untie=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.head.weight is model.embed.weight


def test_a_report_folds_another_checkpoint() -> None:
    from rewrite.fold.replay import apply_recipes

    report = folded(randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))).report
    drop = [key for c in report.changes for key, new in c.keys.items() if new is None]
    other = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)), seed=5)
    state = apply_recipes([c.recipe for c in report.changes], drop, other.state_dict())
    expected = folded(other).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("norm.weight", float("nan"), r"norm: .*norm\.weight holds values that are not finite"),
        ("norm.bias", float("inf"), r"norm: .*norm\.bias holds values that are not finite"),
        ("head.weight", float("nan"), r"head\.bias would hold values that are not finite"),
        ("head.weight", None, r"the checkpoint has no head\.weight"),
    ],
)
def test_another_checkpoint_that_breaks_the_plan_is_refused(
    key: str, value: float | None, reason: str
) -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    report = folded(model).report.to_json()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_report(json.loads(report), state)
    if value is None:
        del state[key]
    else:
        state[key].view(-1)[1] = value
    with pytest.raises(CheckpointError, match=reason):
        apply_report(json.loads(report), state)


def test_a_shift_that_the_plan_did_not_have_is_refused() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    report = json.loads(folded(model).report.to_json())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_report(report, state)
    state["norm.bias"][0] = 0.5
    with pytest.raises(CheckpointError, match=r"norm: .*moves no shift \(norm\.bias is not zero"):
        apply_report(report, state)


def test_a_norm_that_is_not_finite_stays_with_its_reason() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    with torch.no_grad():
        model.norm.weight[1] = float("nan")
    report = rewrite.convert(model, "fold", example_inputs=(tokens(),), verify=False).report
    (skip,) = [skip for skip in report.skips if skip.target == "norm"]
    assert skip.reason == "norm.weight holds values that are not finite"


def test_an_incomplete_recipe_is_refused() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    recipes = [change.recipe for change in folded(model).report.changes]
    recipe = next(recipe for recipe in recipes if recipe["do"] == "fold-observed")
    assert from_data(recipe).to_data() == recipe
    with pytest.raises(CheckpointError, match="incomplete: 'factor'"):
        from_data({key: value for key, value in recipe.items() if key != "factor"})


class Chosen(nn.Module):
    """One of several layers, by a key that the calls leave alone."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.heads = nn.ModuleDict({key: nn.Linear(WIDTH, 4) for key in keys})
        self.key = "a"

    @untraceable
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.heads[self.key](self.norm(x))


@pytest.mark.parametrize(("keys", "folds"), [(["a"], True), (["a", "b"], False)])
def test_a_layer_that_no_call_chose_counts(keys: list[str], folds: bool) -> None:
    result = folded(randomized(Chosen(keys)), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"norm"} if folds else set())
    if not folds:
        assert "heads also holds b" in reason(result, "norm")


def test_inspect_shows_what_reads_each_norm() -> None:
    from rewrite.inspection import inspect_model

    rows = {row.name: row for row in inspect_model(randomized(Decoder()), (tokens(),)).norms}
    read = rows["layers.0.norm1"].read_by.split(", ")
    assert read == [f"layers.0.attention.{name}" for name in "qkv"]
    assert rows["norm"].read_by == "head" and rows["norm"].kind == "RMSNorm"
    assert rows["layers.0.norm1"].fed_by == "embed"


class Fields(nn.Module):
    """A value in one field of an object; code that no call took reads another, or this one."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field
        self.inner, self.head = RMSNorm(), nn.Linear(WIDTH, 4)

    def body(self, x: Tensor) -> Output:
        return Output(first=self.inner(x), second=x * 2)

    @untraceable
    def forward(self, x: Tensor, loss: bool = False, **kwargs: Any) -> Tensor:
        output: Output = self.body(x)
        y = self.head(output.first)
        if loss and self.field == "first":
            y = y + output.first.sum()
        if loss and self.field == "second":
            y = y + output.second.sum()
        return y


class Output:
    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


@pytest.mark.parametrize(("field", "folds"), [("first", False), ("second", True)])
def test_the_fields_of_an_object_are_told_apart(field: str, folds: bool) -> None:
    result = folded(randomized(Fields(field)), (torch.randn(3, WIDTH, dtype=torch.float64),))
    assert targets(result) == ({"inner"} if folds else set())


class Nested(nn.Module):
    """What reads the norm is called on the line of the norm itself, and may do something else."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.head = norm(), nn.Linear(WIDTH, 3)

    @untraceable
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.finish(self.norm(x), mask)

    def finish(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return self.head(h)


class NestedMasked(Nested):
    def finish(self, h: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            h = h * mask + 1
        return self.head(h)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH)])
def test_a_function_called_on_the_line_of_the_norm_is_read(norm: Any) -> None:
    inputs = (torch.randn(2, 4, WIDTH, dtype=torch.float64),)
    assert targets(folded(randomized(Nested(norm)), inputs)) == {"norm"}
    assert not targets(folded(randomized(NestedMasked(norm)), inputs))
