from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from passes import BatchNormToGroupNorm, OutOfPlace
from rewrite.protocol import Applied, apply_pass


def _apply(model: nn.Module, *inputs: Tensor) -> Applied:
    return apply_pass(OutOfPlace(), copy.deepcopy(model), inputs or None)


def _same(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Return whether outputs and all gradients agree in float64, in both modes."""
    found = []
    for mode in (False, True):
        for one in (model, other):
            one = copy.deepcopy(one).double().train(mode)
            torch.manual_seed(0)
            source = x.double().requires_grad_()
            output = one(source * 1)
            gradients = torch.autograd.grad(
                output.square().sum(), [source, *one.parameters()], allow_unused=True
            )
            found.append([output.detach(), *(g for g in gradients if g is not None)])
    pairs = [*zip(found[0], found[1], strict=True), *zip(found[2], found[3], strict=True)]
    return all(float((a - b).abs().max()) < 1e-12 for a, b in pairs)


def _writes(model: nn.Module, x: Tensor) -> bool:
    """Return whether a forward writes into what a hooked module returned, as Opacus finds."""
    one = copy.deepcopy(model)
    for module in one.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.register_full_backward_hook(lambda *_: None)
    try:
        one(x.clone().requires_grad_())
    except RuntimeError as error:
        assert "is a view and is being modified inplace" in str(error)
        return True
    return False


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y += x
        return self.relu(y)


class Spelled(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        torch.clamp_(y, -0.5, 0.5)
        y.mul_(2.0).sub_(0.25)
        y = F.leaky_relu(y, 0.1, True) + 1
        y = F.elu(y * 2, inplace=True)
        return torch.sigmoid_(self.out(y)) + F.relu_(self.out(y))


class Aliased(Base):
    """What two names hold is one tensor: both see the write."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        y = x
        x += 1
        self.relu(x)
        return self.out(y) + 2 * x


class PreActivation(Base):
    """The shortcut reads what the activation in place has written."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        y = self.out(self.relu(x))
        y += x
        return y


class Sum(Base):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.fc(x), self.out(x)
        y += z + self.out(2 * y) + x
        return y * z


class Loop(Base):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for block in self.blocks:
            x += block(x * 2)
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = PreActivation()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Copied(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = torch.empty_like(y)
        z.copy_(y)
        z *= 2
        y.fill_(3.0)
        w = self.out(x)
        w.zero_()
        return y + w + z


class Indexed(Base):
    """Assignments through an index, whose forms return a new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, 0] = x[:, 1]
        y[..., -1] = 0.5
        y[1:, ::2] = x[1:, ::2]
        y[:, [1, 3]] = x[:, :2]
        y[-1] *= 2
        y[:, 2:4] += x[:, :2]
        y[y < 0] = 0.1
        z = torch.zeros_like(y)
        z[:, 1:] = y[:, :-1]
        return self.out(z) + y


class Masked(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[y < 0] *= 0.1
        rows = x.sum(1) > 0
        y[rows] = x[rows]
        y[y.sum(1) > 0] = 0.25
        return self.out(y)


class Unrolled(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        for i in range(3):
            y[:, i] = y[:, i + 1] * 2
            y += x[:, i : i + 1]
        return self.out(y)


class Bounds(Base):
    """Slices from the end, and beyond it: `vmap` of a scatter takes no such bounds."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, -3:] = x[:, :3]
        y[:, 1:-1] *= 2
        y[:, :-4] = 0.5
        y[:, -9:2] += 1
        y[:, 4:99] -= x[:, :2]
        y[:, 5:2] = 7.0
        y[:, -5::3] = x[:, :2]
        y[:, 1:-2:2] = 0.25
        y[..., -2:] += 0.5
        return self.out(y) + y


@pytest.mark.parametrize(
    "kind",
    [
        Residual,
        Spelled,
        Aliased,
        PreActivation,
        Sum,
        Loop,
        Twice,
        Copied,
        Indexed,
        Masked,
        Unrolled,
        Bounds,
    ],
)
@pytest.mark.parametrize("shapes", [True, False])
def test_the_function_stays_and_nothing_is_written(kind: type[nn.Module], shapes: bool) -> None:
    model, x = kind().train(), torch.randn(4, 6)
    applied = _apply(model, *[x] * shapes)
    assert applied.changes and not applied.skips
    assert _same(model, applied.model, x)
    assert _writes(model, x) and not _writes(applied.model, x)
    assert not _apply(applied.model, x).changes


def test_redirecting_is_what_keeps_the_function() -> None:
    model, x = PreActivation(), torch.randn(4, 6)
    wrong = copy.deepcopy(model)
    wrong.relu.inplace = False
    assert not _same(model, wrong, x)
    applied = _apply(model, x)
    assert "later lines read the new value" in {change.note for change in applied.changes}


def test_a_flag_changes_no_forward() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True))
    applied = _apply(model, torch.randn(2, 6))
    assert [change.target for change in applied.changes] == ["1", "2"]
    assert type(applied.model[1]) is nn.ReLU and applied.model[1].inplace is False
    assert model[1].inplace is True


def test_the_dtype_of_the_memory_is_kept() -> None:
    class Mixed(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            y += x.double()
            return y

    x = torch.randn(2, 6)
    applied = _apply(Mixed(), x)
    assert applied.changes and applied.model(x).dtype == torch.float32


@pytest.mark.parametrize("kind", [Indexed, Unrolled, Bounds])
def test_per_sample_gradients_through_index_assignments(kind: type[nn.Module]) -> None:
    """`vmap` over samples asks for it: an assignment by mask or a tensor made here stops it."""
    model, x = kind().double(), torch.randn(4, 6, dtype=torch.double)
    converted = _apply(model, x).model
    names, values = zip(*converted.named_parameters(), strict=True)

    def loss(parameters: tuple[Tensor, ...], sample: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        rows = torch.func.functional_call(converted, given, (torch.stack([sample, 2 * sample]),))
        return rows.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for number in range(4):
        pair = model(torch.stack([x[number], 2 * x[number]]))
        wanted = torch.autograd.grad(pair.square().sum(), list(model.parameters()))
        for gradient, of_all in zip(wanted, found, strict=True):
            assert float((gradient - of_all[number]).detach().abs().max()) < 1e-12


class Items(Base):
    """The items of a list are no index: what `+=` writes is the tensor itself."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.fc(x), self.out(x)]
        parts[0] += x
        return parts[0] * parts[1]


def test_the_items_of_a_list() -> None:
    model, x = Items(), torch.randn(4, 6)
    applied = _apply(model, x)
    assert [change.before for change in applied.changes] == ["parts[0] += x", "ReLU(inplace=True)"]
    assert _same(model, applied.model, x) and not _writes(applied.model, x)


# -- what is declined -------------------------------------------------------------------------


class View(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        part = y[:, :3]
        y += 1
        return self.out(y) + part.sum()


class ViewWritten(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        part = y[:, :3]
        part.add_(1)
        return self.out(y)


class Callers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.block = Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.block(y) + y


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.relu_()
        return x * 2


class Counter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.fc(x)


class Random(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.normal_()
        return self.out(y) + x


class Chooses(nn.Module):
    """A block whose shortcut is given by some callers only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Shortcut()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x), 2 * x)


class Shortcut(Base):
    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        y = self.fc(x)
        y += shortcut
        return y


class Opaque(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.sum() > 0:
            y += x
        return self.relu(y)


class NewAxis(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, None] = x[:, None]
        return self.out(y)


class MaskAndPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[x.sum(1) > 0, 0] = 1
        return self.out(y)


class TwiceAtOnePlace(Base):
    """The last value stays, the gradient reaches both: no chain of scatters does that."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, [1, 1]] = x[:, :2]
        return self.out(y)


class MaybeOnePlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y[:, [3, -3]] = x[:, :2]
        return self.out(y)


class Kept(Base):
    """A view that was taken before still sees what the index writes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        part = y[:, :3]
        y[:, 0] = 1
        return self.out(y) + part.sum()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NewAxis, "index with new axes"),
        (MaskAndPlace, "mixes slices and tensors"),
        (TwiceAtOnePlace, "one place of an axis more than once"),
        (MaybeOnePlace, "one place of an axis more than once"),
        (Kept, "read again through getitem"),
        (View, "read again through getitem"),
        (ViewWritten, "what it writes into is read again"),
        (Callers, "is read again in the forward of the model"),
        (Counter, "writes into steps, which is the model's state"),
        (Random, "draws random numbers"),
        (Chooses, "branches on its argument shortcut"),
        (Opaque, "cannot be traced"),
    ],
)
def test_declines_with_the_line(kind: type[nn.Module], reason: str) -> None:
    model, x = kind(), torch.randn(4, 6)
    applied = _apply(model, x)
    skips = [skip for skip in applied.skips if reason in skip.reason]
    assert skips, applied.skips
    assert "test_out_of_place.py:" in skips[-1].reason
    if kind is not Random:
        assert _same(model, applied.model, x)


def test_a_number_is_no_memory() -> None:
    class Sizes(Base):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            m = n
            m += 2
            return self.fc(x) * (m - n)

    applied = _apply(Sizes(), torch.randn(2, 6))
    assert [change.target for change in applied.changes] == ["relu"]


# -- the whole way ----------------------------------------------------------------------------


def _network() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=5).eval()


def test_a_converted_network_has_the_gradients_of_single_samples(tmp_path: Path) -> None:
    model, x = _network(), torch.randn(3, 3, 32, 32)
    result = rewrite.convert(model, [BatchNormToGroupNorm(), OutOfPlace()], example_inputs=(x,))
    assert result.report.ok and not result.report.passes[1].skips
    rewrite.save(result.model, tmp_path / "m.pt")
    converted = rewrite.load(str(tmp_path / "m.pt")).double()
    labels = torch.tensor([0, 3, 1])
    names, values = zip(*converted.named_parameters(), strict=True)

    def loss(parameters: tuple[Tensor, ...], sample: Tensor, label: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        logits = torch.func.functional_call(converted, given, (sample[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        values, x.double(), labels
    )
    for number in range(3):
        alone = torch.autograd.grad(
            F.cross_entropy(
                converted(x.double()[number : number + 1]), labels[number : number + 1]
            ),
            values,
        )
        for together, single in zip(per_sample, alone, strict=True):
            torch.testing.assert_close(together[number], single, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_opacus_trains_it(mode: str) -> None:
    opacus = pytest.importorskip("opacus")
    model, x = _network(), torch.randn(4, 3, 32, 32)
    converted = rewrite.convert(
        model, ["bn-to-gn{keep=statistics}", "out-of-place"], example_inputs=(x,), verify=False
    ).model.train()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.zeros(4, dtype=torch.long)), batch_size=2
    )
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=converted, optimizer=torch.optim.SGD(converted.parameters(), lr=0.1),
        data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )  # fmt: skip
    before = converted.fc.weight.detach().clone()
    F.cross_entropy(private(x), torch.zeros(4, dtype=torch.long)).backward()
    optimizer.step()
    assert not torch.equal(before, converted.fc.weight)


class HeadsInTraining(nn.Module):
    """In training mode another head reads what the activation wrote into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(3, 4), nn.ReLU(inplace=True)
        self.head, self.extra = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        out = self.head(self.act(y))
        return out + self.extra(y) if self.training else out


def test_a_write_that_only_the_other_mode_reads_again_stays() -> None:
    torch.manual_seed(0)
    model, x = HeadsInTraining().double().eval(), torch.randn(5, 3, dtype=torch.float64)
    result = rewrite.convert(model, OutOfPlace(), example_inputs=x, verify=False)
    assert not result.report.changes and "in its other mode" in result.report.skips[0].reason
    torch.testing.assert_close(result.model.train()(x), model.train()(x), rtol=0, atol=1e-12)
