"""The tensor writer exchanges tensors of modules, and nothing else in the sources writes any."""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from rewrite.graph.tensor_writer import TensorWriter
from rewrite.nn.weight_norm import WeightNorm

ROOT = Path(__file__).parents[2]

MAY_WRITE = {
    "rewrite/graph/tensor_writer.py": "the writer itself",
    "rewrite/graph/forward_graph.py": "the part of the editor that makes a forward a module",
    "rewrite/nn/": "the classes of saved models keep their own buffers",
    "rewrite/checkpoint/": "makes models out of files",
    "rewrite/hub/": "makes models out of files",
    "rewrite/runtime/copying.py": "makes the copy that is edited",
    "rewrite/runtime/modes.py": "puts back what a forward has changed",
    "rewrite/equivalence/rounding.py": "perturbs a model for one forward, and puts it back",
    "rewrite/grouping/fit.py": "fits scale and bias of a SwappedNorm, which is no module",
    "rewrite/training/": "trains, in place as every optimizer does",
    "rewrite/swap/anchor.py": "lowers an anchor at each step of a training, as an optimizer does",
}

HELD = {"_parameters", "_buffers"}
TENSORS = {"weight", "bias", "running_mean", "running_var", "original0", "original1", "data"}
WRITING = {
    "register_parametrization", "remove_parametrizations",
    "remove_spectral_norm", "load_state_dict", "register_parameter", "register_buffer",
}  # fmt: skip


def writes(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a source that write a tensor which a module holds."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            single = isinstance(node, ast.AugAssign | ast.AnnAssign)
            for target in [node.target] if single else node.targets:
                if _is_held(target):
                    yield line, ast.unparse(target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = node.func.value, node.func.attr
            own = isinstance(owner, ast.Name) and owner.id == "self"
            in_place = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
            of_held = isinstance(owner, ast.Attribute) and owner.attr in HELD
            changes = name in {"pop", "update", "clear", "setdefault", "popitem"}
            reached = isinstance(owner, ast.Attribute) and not _is_own(owner)
            read = isinstance(owner, ast.Call) and ast.unparse(owner.func) == "getattr"
            outside = in_place and (reached or read) and not _is_module(owner)
            if (name in WRITING and not own) or (of_held and changes) or outside:
                yield line, ast.unparse(node.func)


def _is_held(target: ast.expr) -> bool:
    if isinstance(target, ast.Subscript):
        return isinstance(target.value, ast.Attribute) and target.value.attr in HELD
    if isinstance(target, ast.Tuple):
        return any(_is_held(part) for part in target.elts)
    return (
        isinstance(target, ast.Attribute) and target.attr in HELD | TENSORS and not _is_own(target)
    )


def _is_own(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def _is_module(node: ast.expr) -> bool:
    """Return whether this is a module of functions: `nn.init.zeros_`."""
    return ast.unparse(node) in {"nn.init", "torch.nn.init", "torch"}


def test_nothing_else_writes_tensors_of_modules() -> None:
    found = []
    for path in [*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(tuple(MAY_WRITE)):
            found += [f"{name}:{line} {what}" for line, what in writes(path.read_text("utf-8"))]
    assert not found, "write through captured.editor (a TensorWriter):\n" + "\n".join(found)


def test_every_exception_is_needed() -> None:
    for name in MAY_WRITE:
        paths = [ROOT / name] if name.endswith(".py") else [*(ROOT / name).rglob("*.py")]
        texts = [path.read_text("utf-8") for path in paths]
        needed = any(list(writes(text)) for text in texts) or name == "rewrite/nn/"
        assert needed, name


@pytest.mark.parametrize(
    "line",
    [
        "module._parameters['bias'] = None", "module._buffers.update(old)", "layer.weight = value",
        "parameter.data = value", "module.register_parameter('weight', value)",
        "parametrize.register_parametrization(module, 'weight', step)", "del module._buffers[key]",
        "chain.original0.data, chain.original1.data = g, v", "module.weight.mul_(2)",
        "getattr(module, name).copy_(value)", "module._parameters = {}",
    ],
)  # fmt: skip
def test_the_scan_sees(line: str) -> None:
    assert list(writes(line))


@pytest.mark.parametrize(
    "line",
    [
        "value = module._parameters['bias']", "self.weight = value", "result.copy_(value)",
        "torch.empty_like(old).copy_(value)", "nn.init.zeros_(weight)", "held = module._buffers",
        "editor.write(module, 'weight', value)", "chain.weight.requires_grad_(True)",
    ],
)  # fmt: skip
def test_the_scan_leaves_alone(line: str) -> None:
    assert not list(writes(line))


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_is_exchanged_and_keeps_requires_grad(frozen: bool) -> None:
    layer = nn.Linear(2, 2).requires_grad_(not frozen)
    old, value = layer.weight, torch.ones(2, 2)
    before = old.detach().clone()
    TensorWriter().write(layer, "weight", value)
    assert layer.weight is not old and layer.weight.requires_grad is not frozen
    assert torch.equal(layer.weight, value) and torch.equal(old, before)
    TensorWriter().write(layer, "bias", None)
    assert layer.bias is None and "bias" not in layer.state_dict()


def test_a_buffer_stays_a_buffer() -> None:
    norm = nn.BatchNorm1d(3)
    TensorWriter().write(norm, "running_mean", torch.ones(3))
    assert "running_mean" in dict(norm.named_buffers())
    assert torch.equal(norm.running_mean, torch.ones(3))  # type: ignore[arg-type]


def test_shared_is_the_very_parameter() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    TensorWriter().share(second, "weight", first.weight)
    assert second.weight is first.weight
    TensorWriter().refill(first.weight, torch.ones(2, 2))
    assert torch.equal(second.weight, torch.ones(2, 2))


def test_a_copy_holds_the_same_tensors_but_for_those_named() -> None:
    norm = nn.LayerNorm(3)
    new = TensorWriter().copied(norm, {"weight": None})
    assert new.weight is None and new.elementwise_affine is False and new.bias is norm.bias
    assert norm.weight is not None and norm.elementwise_affine is True


def test_the_flag_of_a_norm_follows_its_weight() -> None:
    norm = nn.GroupNorm(1, 3, affine=False)
    TensorWriter().write(norm, "weight", torch.ones(3))
    assert norm.affine is True

    class Other(nn.Linear):
        affine = False  # something of its own, and no norm's

    layer = Other(2, 2)
    TensorWriter().write(layer, "weight", torch.ones(2, 2))
    assert layer.affine is False


def test_a_recurrent_layer_sees_its_new_weights() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    value = torch.randn(16, 3)
    TensorWriter().write(layer, "weight_ih_l0", value)
    wanted = nn.LSTM(3, 4)
    wanted.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0], wanted(x)[0], rtol=0, atol=0)


def test_parametrized_and_back_on_a_deep_copy_leaves_the_original() -> None:
    layer, writer = nn.Linear(3, 2), TensorWriter()
    weight = layer.weight.detach().clone()
    writer.parametrize(layer, "weight", WeightNorm(), True)
    copied = copy.deepcopy(layer)
    made = writer.unparametrize(copied, "weight")
    assert isinstance(made, nn.Parameter) and type(copied) is nn.Linear
    assert parametrize.is_parametrized(layer, "weight")
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(made, weight, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["spectral", "pruned"])
def test_an_old_hook_goes_and_its_weight_stays(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    if kind == "spectral":
        nn.utils.spectral_norm(layer)
        prune.l1_unstructured(layer, "bias", 1)  # a hook of another tensor  # type: ignore
    else:
        prune.l1_unstructured(layer, "weight", 2)  # type: ignore[no-untyped-call]
    layer.eval()
    wanted = layer(torch.eye(3))
    made = TensorWriter().remove_hook(layer, "weight")
    assert layer.weight is made and "weight_orig" not in layer.state_dict()
    torch.testing.assert_close(layer(torch.eye(3)), wanted, rtol=0, atol=0)


def test_restored_tensors_keep_their_identity() -> None:
    layer = nn.Linear(2, 2)
    held = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = layer.weight
    TensorWriter().refill(weight, torch.zeros(2, 2))
    TensorWriter().restore(layer, held)
    assert layer.weight is weight and torch.equal(weight, held["weight"])
