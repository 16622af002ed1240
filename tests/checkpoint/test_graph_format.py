"""GraphModules and parametrized modules survive a file; a hostile description does not get in."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from rewrite.checkpoint.graph_format import build_graph, describe_graph
from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def forward(self, x, *, flip=False):
        y = torch.relu(self.norm(self.conv(x))) * self.scale + self.shift
        y = torch.nn.functional.max_pool2d(y, 2)
        y = y.permute(0, 2, 3, 1).to(torch.float32)[..., None, 0:4]
        return {"out": self.fc(y.flatten(1, 2).mean(1).squeeze(-2)[..., :4]), "size": x.shape[-1]}


def traced():
    torch.manual_seed(0)
    return torch.fx.symbolic_trace(Net()).eval()


def roundtrip(model, tmp_path, **options):
    return load(save(model, tmp_path / "m.pt"), **options)


def test_a_graph_module_survives(tmp_path):
    model = traced()
    model.fc.weight.requires_grad_(False)
    model.norm.train()
    back = roundtrip(model, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    model.eval(), back.norm.eval()
    assert isinstance(back, torch.fx.GraphModule)
    assert torch.equal(model(x)["out"], back(x)["out"])
    assert back.code == model.code
    assert type(back).__name__ == type(model).__name__
    assert not back.fc.weight.requires_grad
    assert back._non_persistent_buffers_set == {"shift"}
    assert list(back.state_dict()) == list(model.state_dict())


def test_a_loaded_graph_module_can_be_edited_copied_and_saved_again(tmp_path):
    back = roundtrip(traced(), tmp_path)
    for node in back.graph.nodes:
        if node.target is torch.relu:
            node.target = torch.sigmoid
    back.recompile()
    again = roundtrip(copy.deepcopy(back), tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(back(x)["out"], again(x)["out"])
    assert not torch.equal(traced()(x)["out"], again(x)["out"])


def test_a_graph_module_inside_a_model_under_two_names(tmp_path):
    inner = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner, nn.Linear(3, 3))})
    model.hidden = [inner]
    model.b[1].weight = inner.get_parameter("0.weight")
    back = roundtrip(model, tmp_path)
    assert back.a is back.b[0]
    assert back.hidden[0] is back.a
    assert back.b[1].weight is back.a.get_parameter("0.weight")
    assert back.a.graph.owning_module is back.a


@pytest.mark.parametrize("train", [True, False])
def test_parametrized_modules_survive(tmp_path, train):
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
    ).train(train)
    back = roundtrip(model, tmp_path).eval()
    model.eval()
    x = torch.randn(2, 3)
    assert torch.equal(model(x), back(x))
    assert parametrize.is_parametrized(back[0], "weight")
    assert list(back.state_dict()) == list(model.state_dict())
    parametrize.remove_parametrizations(back[0], "weight")
    assert type(back[0]) is nn.Linear


def test_the_hook_for_old_weight_norm_state_dicts_comes_back(tmp_path):
    old = {"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3), "bias": torch.ones(4)}
    back = roundtrip(parametrizations.weight_norm(nn.Linear(3, 4)), tmp_path)
    back.load_state_dict(dict(old))
    assert torch.equal(back.parametrizations.weight.original1, torch.ones(4, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_style_norms_of_weights_survive(tmp_path):
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(3, 4)), nn.utils.spectral_norm(nn.Linear(4, 4))
    )
    back = roundtrip(model.eval(), tmp_path)
    x = torch.randn(2, 3)
    assert torch.equal(model(x), back(x))
    with torch.no_grad():
        back[0].weight_g.mul_(2)
    assert not torch.equal(model[0](x), back[0](x)), "the hook must still compute the weight"


# -- hostile descriptions ------------------------------------------------------------------------


def description(**changes):
    """A good description of one call, with some of its entries changed."""
    call = {
        "op": "call_function",
        "name": "y",
        "target": "torch.relu",
        "args": [{"node": "x"}],
        "kwargs": {},
        "type": None,
    }
    call.update(changes)
    x = {"op": "placeholder", "name": "x", "target": "x", "args": [], "kwargs": {}, "type": None}
    end = {"op": "output", "name": "output", "target": "output", "args": [{"node": call["name"]}]}
    end |= {"kwargs": {}, "type": None}
    return {"nodes": [x, call, end], "signature": None}


def test_a_good_description_builds():
    graph = build_graph(description(), ())
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert torch.equal(module(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
    assert describe_graph(graph) == description()


HOSTILE = [
    {"target": "os.system"},
    {"target": "builtins.eval"},
    {"target": "builtins.exec"},
    {"target": "builtins.__import__"},
    {"target": "_operator.attrgetter"},
    {"target": "_operator.call"},
    {"target": "torch.load"},
    {"target": "torch.from_file"},
    {"target": "torch.hub.load"},
    {"target": "torch.ops.aten.from_file"},
    {"target": "torch.ops.load_library"},
    {"target": "torch.ops.aten.__class__"},
    {"target": "torch.nn.functional.importlib.import_module"},
    {"target": "torch.nn.functional.handle_torch_function"},
    {"target": "builtins.getattr", "args": [{"node": "x"}, "__class__"]},
    {"target": "builtins.getattr", "args": [{"node": "x"}, "numpy"]},
    {"target": "builtins.getattr", "args": [{"node": "x"}, {"node": "x"}]},
    {"target": "builtins.getattr", "args": []},
    {"target": "builtins.max", "kwargs": {"key": {"node": "x"}}},
    {"op": "call_method", "target": "numpy"},
    {"op": "call_method", "target": "apply_"},
    {"op": "call_method", "target": "__reduce__"},
    {"op": "call_method", "target": 'relu", __import__("os"), "'},
    {"op": "call_module", "target": 'a"); import os; ("'},
    {"op": "get_attr", "target": "a\nimport os"},
    {"op": "placeholder", "target": "y=__import__('os').getcwd()", "args": []},
    {"op": "placeholder", "target": "***y", "args": []},
    {"op": "exec", "target": "x"},
    {"name": "y = 1; import os"},
    {"name": "import"},
    {"name": "ｙ"},
    {"kwargs": {"inplace=__import__('os')": True}},
    {"args": [{"node": "y"}]},
    {"args": [{"torch": "load"}]},
    {"args": [{"torch": "__builtins__"}]},
    {"args": [{"exec": ["1"]}]},
    {"args": [{"dict": [[{"tuple": []}, 1]]}]},
    {"args": [object()]},
    {"target": print},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_descriptions_are_refused(changes):
    with pytest.raises(CheckpointError) as caught:
        build_graph(description(**changes), ())
    assert "\n" not in str(caught.value)


def written(tmp_path, change):
    """A saved graph whose state was changed by `change`, as a file."""
    from rewrite.checkpoint import graph_format as graphfile
    from rewrite.checkpoint import pickler

    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    state = graphfile.describe_graph_module(model)
    state["state"] = {**state["state"], "_modules": dict(state["state"]["_modules"])}
    change(state)

    class Made(pickler.Pickler):
        def reducer_override(self, obj):
            if isinstance(obj, torch.fx.GraphModule):
                return graphfile.SavedGraph, (), state
            return NotImplemented

    from types import SimpleNamespace

    torch.save(
        model, tmp_path / "m.pt", pickle_module=SimpleNamespace(__name__="pickle", Pickler=Made)
    )
    return tmp_path / "m.pt"


def test_the_unchanged_file_opens(tmp_path):
    assert load(written(tmp_path, lambda state: None))(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("key", ["_graph", "_code", "_tracer_cls", "meta"])
def test_what_is_made_from_the_graph_is_not_taken_from_the_file(tmp_path, key):
    path = written(tmp_path, lambda state: state["state"].update({key: "import os"}))
    with pytest.raises(CheckpointError, match="ready-made"):
        load(path)


def test_a_child_cannot_pose_as_a_method(tmp_path):
    """`self.add_module(x)` would call the method, whatever child has that name."""

    def change(state):
        state["state"]["_modules"]["add_module"] = nn.Identity()
        for node in state["graph"]["nodes"]:
            if node["op"] == "call_module":
                node["target"] = "add_module"

    with pytest.raises(CheckpointError, match="not there"):
        load(written(tmp_path, change))


def test_an_attribute_that_is_no_tensor_cannot_be_read(tmp_path):
    def change(state):
        state["state"]["secret"] = "text"
        for node in state["graph"]["nodes"]:
            if node["op"] == "call_module":
                node.update(op="get_attr", target="secret", args=[])

    with pytest.raises(CheckpointError, match="not there"):
        load(written(tmp_path, change))


def test_a_class_name_is_a_name(tmp_path):
    with pytest.raises(CheckpointError, match="name"):
        load(written(tmp_path, lambda state: state.update({"class": "A:\n import os"})))


def test_functions_of_other_packages_need_their_full_name(tmp_path):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.pos, (graph.call_function(copy.copy, (x,)),)))
    path = save(torch.fx.GraphModule(nn.Module(), graph), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"--trust copy\.copy"):
        load(path)
    with pytest.raises(CheckpointError, match=r"--trust copy\.copy"):
        load(path, trust=["copy"])
    assert torch.equal(load(path, trust=["copy.copy"])(torch.ones(1)), torch.ones(1))


def test_a_local_function_in_a_graph_cannot_be_saved(tmp_path):
    graph = torch.fx.Graph()
    graph.output(graph.call_function(lambda x: x, (graph.placeholder("x"),)))
    model = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    model._graph = graph
    with pytest.raises(CheckpointError, match="node"):
        save(model, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []
