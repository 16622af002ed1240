"""The recipes with the real libraries, and what they promise of structure."""

from __future__ import annotations

import copy
import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import models
import rewrite
from models.digits_resnet import digits_resnet, load_digits_resnet

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "recipes"


@pytest.fixture
def _beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where a reader of the pages stands: in a folder that holds the model."""
    shutil.copy(ROOT / "models" / "digits_resnet.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_beside_the_model")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_opacus(mode: str) -> None:
    pytest.importorskip("opacus")
    text = (RECIPES / "opacus.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert 'MODE = "hooks"' in code
    code = code.replace('MODE = "hooks"', f'MODE = "{mode}"')
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "opacus.md", "exec"), names)
    if mode == "hooks":
        as_one_layer = text.split("```python\n")[2].split("```")[0]
        exec(compile(as_one_layer, "opacus.md", "exec"), names)


@pytest.mark.filterwarnings("ignore")
def test_opacus_stops_without_it() -> None:
    """The negative twin: the same model, still in place."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule

    x = torch.rand(2, 1, 8, 8)
    swapped = rewrite.convert(load_digits_resnet(), ["bn-to-gn"], example_inputs=(x,)).model
    with pytest.raises(RuntimeError, match="is being modified inplace"):
        GradSampleModule(swapped.train())(x)


class _Backbone(nn.Sequential):
    """The smallest backbone that a detector takes, with a norm."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 3, 4, 1), nn.BatchNorm2d(32), nn.ReLU())


@pytest.mark.filterwarnings("ignore")
def test_a_detector_trains_as_one_layer() -> None:
    pytest.importorskip("opacus")
    detection = pytest.importorskip("torchvision.models.detection")
    anchors = detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    torch.manual_seed(0)
    detector = detection.FCOS(_Backbone(), 3, min_size=32, max_size=32, anchor_generator=anchors)
    models.randomize_norms_(detector)
    boxes = torch.tensor([[[2.0, 2, 20, 20], [5, 9, 30, 25]]]).repeat(4, 1, 1)
    labels = torch.tensor([[1, 2], [2, 0], [1, 1], [0, 0]])  # one box, and none, too
    data = torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32), boxes, labels)
    before = {name: p.detach().clone() for name, p in detector.head.named_parameters()}
    names: dict[str, Any] = {"__name__": "recipe", "torch": torch, "rewrite": rewrite}
    exec("from opacus import PrivacyEngine\nfrom rewrite.training import AsOneLayer", names)
    names |= {"detector": detector, "photo": torch.rand(3, 32, 32)}
    names["loader"] = torch.utils.data.DataLoader(data, batch_size=4)
    exec(compile(_blocks("opacus.md")[2], "opacus.md", "exec"), names)
    swapped = names["swapped"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in swapped.modules())
    after = dict(swapped.head.named_parameters())
    assert all(bool(p.isfinite().all()) for p in swapped.parameters())
    assert all(not torch.equal(after[name], old) for name, old in before.items())


def _blocks(page: str) -> list[str]:
    text = (RECIPES / page).read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


@pytest.mark.usefixtures("_beside_the_model")
@pytest.mark.filterwarnings("ignore")
def test_flower_averages_by_samples() -> None:
    pytest.importorskip("flwr.server.strategy.aggregate")
    first, flower = _blocks("federated.md")[:2]
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(first, "federated.md", "exec"), names)
    with torch.no_grad():
        for number, client in enumerate(names["clients"]):
            for parameter in client.parameters():
                parameter.add_(number)
    exec(compile(flower, "federated.md", "exec"), names)
    states = [client.state_dict() for client in names["clients"]]
    for key, value in names["server"].state_dict().items():
        wanted = sum(n * state[key] for n, state in zip((100, 20, 60), states, strict=True)) / 180
        torch.testing.assert_close(value, wanted)
        assert not torch.allclose(value, sum(state[key] for state in states) / 3)


@pytest.mark.filterwarnings("ignore")
def test_segmentation_encoders() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    names: dict[str, Any] = {"__name__": "recipe", "torch": torch, "rewrite": rewrite}
    exec(compile(_blocks("encoders.md")[-1], "encoders.md", "exec"), names)

    def norms(model: nn.Module, kind: type[nn.Module]) -> int:
        return sum(isinstance(module, kind) for module in model.modules())

    whole, net = names["whole"], names["net"]
    assert (norms(whole, nn.GroupNorm), norms(whole, nn.BatchNorm2d)) == (30, 0)
    assert (norms(net, nn.GroupNorm), norms(net, nn.BatchNorm2d)) == (20, 10)
    for model in (whole, net):
        assert model(names["photos"]).shape == (2, 3, 64, 64)
        groups = [m.num_channels // m.num_groups for m in model.modules()
                  if isinstance(m, nn.GroupNorm)]  # fmt: skip
        assert max(groups) == 16


_SPECS = (
    "bn-to-gn", "bn-to-gn{num_groups=4}", "bn-to-gn{channels_per_group=8,keep=affine}",
    "bn-to-gn{anchor=30}", "bn-to-gn{keep=nothing}", "bn-to-in", "bn-to-ln", "bn-to-ln{over=c}",
    "freeze-bn", "freeze-bn{trainable=true}", "bn-to-sync-bn", "weight-norm", "weight-standardize",
    "out-of-place", "reinit{scheme=he}", "recalibrate-bn",
)  # fmt: skip


def _structure(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {
        key: (tuple(value.shape), value.dtype) for key, value in model.state_dict().items()
    }
    found |= {f"{name}.eps": module.eps for name, module in model.named_modules()
              if hasattr(module, "eps")}  # fmt: skip
    return found | {f"{n} is": type(m).__name__ for n, m in model.named_modules()}


@pytest.mark.parametrize("spec", _SPECS)
def test_the_structure_depends_on_architecture_and_options_alone(spec: str) -> None:
    x = torch.rand(4, 1, 8, 8)
    torch.manual_seed(5)
    fresh, other = digits_resnet().eval(), models.randomize_norms_(digits_resnet().eval())
    trained = load_digits_resnet()
    made = [
        rewrite.convert(
            model, [spec], example_inputs=(given,), calibration=[given], verify=False
        ).model
        for model, given in ((trained, x), (fresh, torch.zeros(4, 1, 8, 8)), (other, 100 * x))
    ]
    assert _structure(made[0]) == _structure(made[1]) == _structure(made[2])
    made[1].load_state_dict(made[0].state_dict())
    for model in made:
        model.eval()
    assert torch.equal(made[0](x), made[1](x))


def test_a_fit_keeps_keys_and_shapes() -> None:
    spec = "bn-to-gn{channels_per_group=8,keep=function}"
    made = [
        rewrite.convert(model, [spec], calibration=[scale * torch.rand(40, 1, 8, 8)], verify=False)
        for model, scale in ((load_digits_resnet(), 1.0), (digits_resnet().eval(), 3.0))
    ]
    assert _structure(made[0].model) == _structure(made[1].model)


class _TorchAverage:
    """PyTorch's own average of parameters; it takes the first step whole, and the last buffers."""

    def __init__(self, policy: nn.Module) -> None:
        self.model = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def step(self, policy: nn.Module, number: int) -> float:
        """Take in the parameters of a step, and return the weight of what was before."""
        self.model.update_parameters(policy)
        return 0.5 if number else 0.0

    def deployed(self, start: nn.Module) -> nn.Module:
        """Return the policy that is used."""
        return self.model.module


class _DiffusersAverage:
    """That of diffusers, which knows no buffers."""

    def __init__(self, policy: nn.Module) -> None:
        training = pytest.importorskip("diffusers.training_utils")
        self.model = training.EMAModel(policy.parameters(), decay=0.5)

    def step(self, policy: nn.Module, number: int) -> float:
        """Take in the parameters of a step, and return the weight of what was before."""
        self.model.step(policy.parameters())
        return self.model.get_decay(number + 1)

    def deployed(self, start: nn.Module) -> nn.Module:
        """Return the policy that is used."""
        self.model.copy_to(start.parameters())
        return start


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [_TorchAverage, _DiffusersAverage])
@pytest.mark.parametrize("swaps", [True, False])
def test_the_average_of_a_diffusion_policy(kind: type[Any], swaps: bool) -> None:
    """Parameters alone are averaged, so the statistics of a BatchNorm are those of other weights.

    x_t = √ᾱ_t x + √(1 - ᾱ_t) ε,  ᾱ_t = Π_s≤t (1 - β_s)     what the policy is given of an action
    """
    torch.manual_seed(0)
    encoder, images, spec = load_digits_resnet(), torch.rand(16, 1, 8, 8), _SPECS[0]
    if swaps:
        encoder = rewrite.convert(encoder, [spec], example_inputs=images[:2], verify=False).model
    policy = nn.ModuleDict({"encoder": encoder, "noise": nn.Linear(10 + 4 + 1, 4)}).double()
    images, actions = images.double(), torch.rand(16, 4).double()
    untrained, start = copy.deepcopy(policy), copy.deepcopy(policy.state_dict())
    kept = (1 - torch.linspace(1e-4, 0.02, 100).double()).cumprod(0)[:, None]
    average, optimizer = kind(policy), torch.optim.AdamW(policy.parameters(), lr=1e-3)
    averaged = {key: value.clone() for key, value in start.items()}
    for step in range(4):
        time, noise = torch.randint(0, 100, (16,)), torch.randn(16, 4).double()
        noisy = kept[time].sqrt() * actions + (1 - kept[time]).sqrt() * noise
        policy.train()
        given = torch.cat([policy["encoder"](images), noisy, time[:, None] / 100], 1)
        loss = (policy["noise"](given) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = average.step(policy, step)
        for key, value in policy.state_dict().items():
            averaged[key] = decay * averaged[key] + (1 - decay) * value
    wanted, deployed = copy.deepcopy(policy), average.deployed(untrained)
    wanted.load_state_dict(averaged)
    with torch.no_grad():
        whole, found = (m.eval()["encoder"](images) for m in (wanted, deployed))
    error = float((whole - found).norm() / whole.norm())
    assert error < 1e-12 if swaps else error > 1e-3
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == start.keys()


@pytest.mark.filterwarnings("ignore")
def test_the_encoder_of_a_robot_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """lerobot's own: it swaps norms of fresh weights only, here the function of old ones stays."""
    pytest.importorskip("lerobot")
    root = Path(str(importlib.import_module("lerobot").__file__)).parent
    policies = ModuleType("lerobot.policies")  # its own __init__ imports every policy there is
    policies.__path__ = [str(root / "policies")]
    monkeypatch.setitem(sys.modules, "lerobot.policies", policies)
    name = "lerobot.policies.diffusion"
    code = pytest.importorskip(f"{name}.modeling_diffusion", exc_type=ImportError)
    torch.manual_seed(0)
    shape = SimpleNamespace(shape=(3, 64, 64))
    config: dict[str, Any] = {
        "resize_shape": None, "crop_shape": None, "vision_backbone": "resnet18",
        "pretrained_backbone_weights": None, "use_group_norm": False,
        "image_features": {"top": shape}, "spatial_softmax_num_keypoints": 32,
    }  # fmt: skip
    encoder = models.randomize_norms_(code.DiffusionRgbEncoder(SimpleNamespace(**config)))
    images = torch.rand(24, 3, 64, 64)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        encoder.train()(images)
    encoder.eval()
    spec = "bn-to-gn{channels_per_group=16,keep=function}"
    result = rewrite.convert(
        encoder, [spec], calibration=[images[:20]], example_inputs=images[:2], verify=False
    )
    naive = code._replace_submodules(
        copy.deepcopy(encoder),
        predicate=lambda m: isinstance(m, nn.BatchNorm2d),
        func=lambda m: nn.GroupNorm(m.num_features // 16, m.num_features),
    )
    with torch.no_grad():
        wanted = encoder(images[20:])
        kept, lost = ((m.eval()(images[20:]) - wanted).norm() / wanted.norm()
                      for m in (result.model, naive))  # fmt: skip
    groups = [m for m in result.model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(groups) == 20 and all(m.num_channels // m.num_groups == 16 for m in groups)
    assert kept < lost / 3
