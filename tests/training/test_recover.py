from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.errors import CheckpointError, OptionError
from rewrite.training import recover

pytest.importorskip("accelerate")


def _teacher(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes)).eval()


def _student(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(2)
    layers = [nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)]
    return nn.Sequential(*layers).eval()


def _data(count: int = 80) -> list[Tensor]:
    return list(torch.randn(count, 6, generator=torch.Generator().manual_seed(3)).split(16))


def _labelled() -> list[tuple[Tensor, Tensor]]:
    return [(x, _teacher()(x).argmax(1)) for x in _data()]


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_student_comes_to_agree_and_the_arguments_stay() -> None:
    student, teacher = _student(), _teacher()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (student, teacher)]
    drawn = torch.get_rng_state()
    recovered = recover(student, teacher, _data(400), epochs=10, rate=0.01, batch_size=8)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert recovered.ok and recovered.before.top1 is not None and recovered.after.top1 is not None
    assert recovered.after.top1 > 0.85 > recovered.before.top1 + 0.2
    assert recovered.after.error < 0.5 * recovered.before.error
    for model, state in zip((student, teacher), states, strict=True):
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert not model.training and all(p.requires_grad for p in model.parameters())


def test_the_best_state_is_what_comes_back() -> None:
    recovered = recover(_student(), _teacher(), _data(), rate=3.0, epochs=3)
    scores = [held.score for _, held in recovered.agreements]
    assert recovered.after.score == pytest.approx(max(scores))


@pytest.mark.parametrize("options", [{"labels": True}, {"labels": True, "smoothing": "online"}])
def test_labels(options: dict[str, object]) -> None:
    recovered = recover(
        _student(), _teacher(), _labelled(), epochs=4, rate=0.01, batch_size=8, **options
    )
    assert recovered.after.accuracy is not None
    assert recovered.calibration is not None and set(recovered.calibration) == {
        "teacher", "student before", "student after",
    }  # fmt: skip
    assert recovered.calibration["teacher"].reliability.accuracy == 1.0
    assert not recovered.planes  # The teacher answers with two classes: no plane through three.


def test_the_plane_of_a_penultimate_layer_moves_with_the_student(tmp_path: Path) -> None:
    data = [(x, torch.arange(len(x)) % 4) for x in _data()]
    recovered = recover(
        _student(), _teacher(), data, labels=True, epochs=2, rate=0.01, batch_size=8
    )
    assert list(recovered.planes) == ["teacher", "student before", "student after"]
    teacher, before, after = recovered.planes.values()
    held = {label: len(points) for label, points in teacher.items()}
    assert len(held) == 3 and all(points.shape[1] == 2 for points in teacher.values())
    assert {label: len(points) for label, points in after.items()} == held
    assert any(not torch.equal(before[label], after[label]) for label in held)
    assert len(json.loads(recovered.to_json())["planes"]) == 3
    text = recovered.plot(tmp_path / "p.svg").read_text(encoding="utf-8")
    without = recover(_student(), _teacher(), _data(), rate=0.01)
    assert not without.planes
    plain = without.plot(tmp_path / "q.svg").read_text(encoding="utf-8")
    assert text.count('id="axes_') == plain.count('id="axes_') + 4  # reliability, three planes


def test_a_global_batch_is_one_step_however_it_is_divided() -> None:
    results = []
    for batch_size, accumulate in ((24, 1), (8, 3), (5, 5), (12, 2)):
        results.append(
            recover(
                _student().double(), _teacher().double(), _data(), epochs=2, optimizer="sgd",
                batch_size=batch_size, accumulate=accumulate,
            ).model
        )  # fmt: skip

    def distance(one: nn.Module, other: nn.Module) -> float:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    with torch.no_grad():
        assert distance(results[0], results[1]) < 1e-12
        assert distance(results[0], results[3]) < 1e-12
        assert distance(results[0], results[2]) > 1e-6  # 25 samples a step are not 24


_WORKER = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
torch.set_num_threads(1)
import test_recover as t
from rewrite.training import recover
recovered = recover(t._student().double(), t._teacher().double(), t._data(), epochs=2,
                    optimizer="sgd", batch_size=8, weight_decay=0.1)
import os
if os.environ.get("RANK", "0") == "0":
    torch.save(recovered.model.state_dict(), {out!r})
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    here = Path(__file__)
    script = tmp_path / "worker.py"
    out = tmp_path / "two.pt"
    script.write_text(
        _WORKER.format(tests=str(here.parent), root=str(here.parents[2]), out=str(out))
    )
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         str(script)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
             "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    alone = recover(
        _student().double(), _teacher().double(), _data(), epochs=2, optimizer="sgd",
        batch_size=16, weight_decay=0.1,
    )  # fmt: skip
    for key, value in torch.load(out).items():
        torch.testing.assert_close(value, alone.model.state_dict()[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.1, "online"])
def test_kill_and_resume_is_bit_identical(tmp_path: Path, smoothing: float | str) -> None:
    settings = {"epochs": 3, "labels": True, "smoothing": smoothing, "batch_size": 8,
                "evaluations": 4}  # fmt: skip
    whole = recover(_student(0.3), _teacher(), _labelled(), **settings)

    def dies(line: str) -> None:
        if line.startswith("step 15 "):
            raise MemoryError

    state = tmp_path / "state"
    with pytest.raises(MemoryError):
        recover(_student(0.3), _teacher(), _labelled(), state=state, progress=dies, **settings)
    resumed = recover(_student(0.3), _teacher(), _labelled(), state=state, **settings)
    assert resumed.steps == whole.steps and resumed.agreements == whole.agreements
    assert _same(resumed.model, whole.model) and not _same(resumed.model, _student(0.3))


def test_an_interrupt_saves_and_goes_on(tmp_path: Path) -> None:
    settings = {"epochs": 2, "batch_size": 8, "evaluations": 2}
    handler = signal.getsignal(signal.SIGINT)
    whole = recover(_student(0.3), _teacher(), _data(), **settings)

    def interrupts(line: str) -> None:
        if line.startswith("step 3 "):
            os.kill(os.getpid(), signal.SIGINT)

    state = tmp_path / "state"
    cut = recover(_student(0.3), _teacher(), _data(), state=state, progress=interrupts, **settings)
    assert "interrupted after step" in cut.stopped and len(cut.steps) < len(whole.steps)
    resumed = recover(_student(0.3), _teacher(), _data(), state=state, **settings)
    assert resumed.steps == whole.steps and _same(resumed.model, whole.model)
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(OptionError, match="the saved state is of steps 16, this training of 24"):
        recover(_student(0.3), _teacher(), _data(), state=state, **{**settings, "epochs": 3})


def test_recentering_leaves_plain_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    data = list(torch.randn(60, 1, 6, 6).split(10))
    student = rewrite.convert(model, ["bn-to-gn{num_groups=4}"], example_inputs=(data[0],)).model
    assert student[1].eps > 0.5
    settings = {"recenter": True, "batch_size": 8, "epochs": 2, "features": 0.1}
    recovered = recover(student, model, data, **settings)
    assert recovered.model[1].eps == pytest.approx(1e-5)
    kept = recover(student, model, data, **{**settings, "recenter": False})
    assert kept.model[1].eps == student[1].eps

    def dies(line: str) -> None:
        if line.startswith("step 8 "):
            raise MemoryError

    with pytest.raises(MemoryError):
        recover(student, model, data, state=tmp_path / "s", progress=dies, **settings)
    resumed = recover(student, model, data, state=tmp_path / "s", **settings)
    assert _same(resumed.model, recovered.model) and resumed.model[1].eps == recovered.model[1].eps


def test_patience_stops_early() -> None:
    recovered = recover(
        _teacher(),
        _teacher(),
        _data(),
        epochs=5,
        rate=1e-6,
        batch_size=8,
        evaluations=20,
        patience=2,
    )
    assert recovered.stopped == "no better agreement in 2 evaluations" and recovered.ok


class Explodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.fc(x) * (float("nan") if self.calls > 3 and self.training else 1.0)


def test_a_loss_that_is_not_a_number_stops_with_the_best_state() -> None:
    recovered = recover(Explodes(), _teacher(), _data(), batch_size=8)
    assert recovered.stopped.startswith("the loss is nan at step 4") and not recovered.ok
    assert all(torch.isfinite(p).all() for p in recovered.model.parameters())


def test_outputs_without_classes() -> None:
    teacher, student = nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 1))
    with pytest.raises(OptionError, match="no classes"):
        recover(student, teacher, _data())
    recovered = recover(student, teacher, _data(), loss="match", epochs=10, rate=0.05, batch_size=8)
    assert recovered.after.top1 is None and recovered.after.error < recovered.before.error / 2


def test_a_class_without_samples_is_named() -> None:
    x = torch.cat(_data())
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    recovered = recover(_student(), _teacher(), data, labels=True)
    assert "3 classes have no sample to train on: 1, 2, 3" in recovered.notes


def test_labels_of_another_shape() -> None:
    data = [(x, y[:, None]) for x, y in _labelled()]
    with pytest.raises(OptionError, match=r"labels of one sample: shape \(1,\); .* asks for \(\)"):
        recover(_student(), _teacher(), data, labels=True)


def test_accelerate_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(OptionError, match=r"needs accelerate; pip install accelerate"):
        recover(_student(), _teacher(), _data())


def test_a_state_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="the state cannot be written"):
        recover(_student(), _teacher(), _data(), state=tmp_path / "file" / "state")


class LikeTransformers(nn.Module):
    """Takes labels, and returns their loss beside the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.inner(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Labelled(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, number: int) -> dict[str, Any]:
        x = torch.cat(_data())[number]
        return {"x": x, "labels": number % 4}


def test_a_dataset_of_samples_equals_its_batches_and_labels_stay_out() -> None:
    student, teacher = LikeTransformers(_student()), LikeTransformers(_teacher())
    found = [
        recover(student, teacher, data, epochs=2).model
        for data in (Labelled(), [{"x": x} for x in _data()])
    ]
    assert _same(*found)


def test_ignored_labels_count_nowhere() -> None:
    """Without them accuracy is that of the others; were they wrong answers it would fall."""
    labelled = [(x, torch.where(y == 0, -100, y)) for x, y in _labelled()]
    recovered = recover(_teacher(), _teacher(), labelled, labels=True, epochs=1, rate=1e-9)
    assert recovered.before.accuracy == 1.0 and recovered.calibration is not None
    assert recovered.calibration["teacher"].reliability.accuracy == 1.0
    nothing = [(x, torch.full_like(y, -100)) for x, y in labelled]
    assert recover(_student(), _teacher(), nothing, labels=True).before.accuracy is None


class Pixels(nn.Module):
    """The same answer at each of `side` × `side` positions."""

    def __init__(self, inner: nn.Module, side: int) -> None:
        super().__init__()
        self.inner, self.side = inner, side

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, :, None, None].expand(-1, -1, self.side, self.side)


def test_labels_of_positions_weigh_as_much_as_one_label() -> None:
    whole = recover(_student(), _teacher(), _labelled(), labels=True)
    x = [(x, y[:, None, None].expand(-1, 3, 3)) for x, y in _labelled()]
    parts = recover(Pixels(_student(), 3), Pixels(_teacher(), 3), x, labels=True)
    for one, other in zip(whole.steps, parts.steps, strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)


def test_student_and_teacher_of_two_dtypes() -> None:
    single = recover(_student(), _teacher(), _data())
    double = recover(_student().double(), _teacher(), _data())
    assert double.steps[-1][1] == pytest.approx(single.steps[-1][1], rel=1e-4)


class Numbered(nn.Module):
    """A network whose first parameter is no floating-point one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.arange(4), requires_grad=False)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _without_parameters(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for key in list(module._parameters):
            module.register_buffer(key, module._parameters.pop(key).detach())
    return model


def test_models_need_no_parameter_of_floating_point_in_front() -> None:
    data = [(x, torch.arange(len(x)) % 4) for x in _data()]
    plain = recover(_student(), _teacher(), data, labels=True)
    for student, teacher in (
        (Numbered(_student()), Numbered(_teacher())),
        (_student(), _without_parameters(_teacher())),
        (_student(), _without_parameters(_teacher()).double()),
    ):
        found = recover(student, teacher, data, labels=True)
        assert found.steps[-1][1] == pytest.approx(plain.steps[-1][1], rel=1e-4)
        assert found.planes.keys() == plain.planes.keys() and "teacher" in plain.planes


@pytest.mark.parametrize("what", ["student", "teacher", "data"])
def test_a_state_of_another_training_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "state").mkdir()  # an empty folder is a place to begin in
    recover(_student(), _teacher(), _data(), state=tmp_path / "state")
    student, teacher, data = _student(), _teacher(), _data()
    with torch.no_grad():
        changed = {"student": student[0].weight, "teacher": teacher[0].weight, "data": data[0]}
        changed[what].mul_(1.5)
    with pytest.raises(OptionError, match=f"the saved state is of another {what}; pass a new"):
        recover(student, teacher, data, state=tmp_path / "state")


@pytest.mark.parametrize("saved", [False, True])
def test_only_what_is_saved_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    hashed: list[object] = []
    module = sys.modules["rewrite.training.recover"]
    monkeypatch.setattr(module, "fingerprint", lambda value: hashed.append(value) or "digest")
    recover(_student(), _teacher(), _data(), state=tmp_path / "state" if saved else None)
    assert len(hashed) == (3 if saved else 0)


class Index(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _teacher()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).argmax(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "NoneType; pass batches"),
        ({"data": [torch.rand(8, 6), torch.rand(8, 5)]}, "batch 1 .8x5. differs from batch 0"),
        ({"data": [(torch.rand(8, 6), ["a"] * 8)], "labels": True}, "labels of batch 0: "),
        ({"student": "model.pt"}, "the student is a str; pass a module"),
        ({"student": Index(), "teacher": Index(), "loss": "match"}, "has a gradient"),
        ({"epochs": 1.5}, "epochs is 1.5; pass a whole number"),
        ({"batch_size": float("nan")}, "batch_size is nan; pass a whole number"),
        ({"seed": 2**62}, "seed is 46.*; pass a whole number up to"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"student": _student(), "teacher": _teacher(), "data": _data()} | change
    with pytest.raises(OptionError, match=message) as caught:
        recover(**given)
    assert "\n" not in str(caught.value)


def test_outputs_that_are_not_of_the_samples() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _teacher()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner(x).mean()

    with pytest.raises(OptionError, match=r"a tensor \(\) for \d+ samples; axis 0"):
        recover(Loss(), Loss(), _data())
