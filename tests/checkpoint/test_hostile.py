"""Files that would run something, lose data or eat the machine are refused in one line."""

from __future__ import annotations

import enum
import functools
import io
import json
import pathlib
import pickle
import time
import zipfile

import pytest
import torch
from torch import nn

from rewrite.checkpoint.exported.schema import check_size
from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Call:
    """Pickles as a call of `function` with `args`, followed by a state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def small():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def refused(path, *words, **options):
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert time.process_time() - start < 2
    for word in words:
        assert word in text, text


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rewritten(source, target, **how):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **how) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


# -- whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_zipped_again_opens_with_its_weights(tmp_path, kind):
    torch.save(small(), tmp_path / "m.pt")
    assert same(
        load(rewritten(tmp_path / "m.pt", tmp_path / "again.pt", compression=kind)), small()
    )


def test_a_folder_zipped_again_opens(tmp_path):
    torch.save(small(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "n.pt", "w") as new:
        new.writestr("folder/", "")
        for name in old.namelist():
            new.writestr("folder/" + name.partition("/")[2], old.read(name))
    assert same(load(tmp_path / "n.pt"), small())


def test_the_old_format_opens_whole_models(tmp_path):
    torch.save(small(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "m.pt"), small())


def test_a_changed_byte_of_a_tensor_is_seen_and_no_checksum_is_no_error(tmp_path):
    torch.save(small(), tmp_path / "m.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    data[data.index(small()[0].weight.detach().numpy().tobytes()) + 5] ^= 1
    (tmp_path / "bad.pt").write_bytes(data)
    refused(tmp_path / "bad.pt", "damaged")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small(), tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load(tmp_path / "m.pt"), small())


@pytest.mark.parametrize("spelling", ["archive/data.pkl", "archive/DATA.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path, spelling):
    torch.save(small(), tmp_path / "m.pt")
    root = zipfile.ZipFile(tmp_path / "m.pt").namelist()[0].partition("/")[0]
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr(spelling.replace("archive", root), b"x")
    refused(tmp_path / "m.pt", "two members")


# -- bounded ------------------------------------------------------------------------------------


def test_sizes_are_known_before_memory_is_taken(tmp_path):
    torch.save(Call(frozenset, range(2 * 10**9)), tmp_path / "range.pt")
    refused(tmp_path / "range.pt", "no list")
    tensor = torch.ones(1).expand(10**11)
    torch.save({"state_dict": {"w": tensor}}, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", ["larger than its bytes", "repeats"][1], factory=LINEAR)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(600 << 20))
    refused(tmp_path / "bomb.pt", "would expand")


def test_circles_and_depth(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["self"] = module
    torch.save(module, tmp_path / "circle.pt")
    refused(tmp_path / "circle.pt", "contains itself")
    nested = {}
    nested["model"] = nested
    torch.save(nested, tmp_path / "nested.pt")
    refused(tmp_path / "nested.pt", "neither a model nor a state dict")
    shared = nn.Linear(2, 2)
    for _ in range(60):
        shared = nn.Sequential(shared, shared)
    torch.save(shared, tmp_path / "paths.pt")
    refused(tmp_path / "paths.pt", "too deep")


LINEAR = 'torch.nn:Linear({"in_features": 2, "out_features": 2})'


@pytest.mark.parametrize(
    "text", ["Mod(9**9**9**9, 7)", "__import__('os')", "Pow(s0, 99999999)", "s0.x", "x" * 3000]
)
def test_sizes_are_numbers_and_symbols(text):
    with pytest.raises(CheckpointError):
        check_size(text)
    check_size("Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))")


# -- names, state, hooks ------------------------------------------------------------------------


class Marked(enum.Enum):
    ONE = 1


def with_attribute(name, value):
    model = nn.Sequential(nn.Linear(2, 2))
    vars(model)[name] = value
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_attribute("modules", functools.partial(nn.Linear, 2)), "in the place of a method"),
        (with_attribute("forward", torch.relu), "in the place of a method"),
        (with_attribute("__call__", torch.relu), "in the place of a method"),
        (with_attribute("options", {nn.Linear: 1}), "as the key of a dict"),
        (with_attribute("_buffers", {"x": nn.ReLU}), "which is none"),
        (with_attribute("_forward_hooks", {0: torch.relu}), "may bring none"),
        (with_attribute("training", 1), "training mode"),
        (with_attribute("act", torch.from_file), "getattr"),
        (with_attribute("act", torch.as_strided), "getattr"),
    ],
)
def test_what_a_module_may_not_have(tmp_path, model, words):
    torch.save(model, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", words)


@pytest.mark.parametrize("name", ["a.b", "a b", 'x")\rimport os#', "x\x1b[2J", ""])
@pytest.mark.parametrize("place", ["_modules", "_parameters", "_buffers"])
def test_names_are_names(tmp_path, name, place):
    model = nn.Sequential(nn.Linear(2, 2))
    value = nn.ReLU() if place == "_modules" else nn.Parameter(torch.ones(1))
    getattr(model, place)[name] = value
    torch.save(model, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "has the name")


def test_an_enum_is_never_called(tmp_path):
    with pytest.raises(ValueError, match="valid"):
        Marked(2)
    for arguments in ((2,), ("E", [("__init__", nn.Linear)]), ((1,),), ()):
        torch.save(with_attribute("x", Call(Marked, *arguments)), tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "Marked", trust=["tests"])
    torch.save({"model": small(), "x": Marked.ONE}, tmp_path / "m.pt")
    assert same(load(tmp_path / "m.pt", trust=["tests"]), small())


@pytest.mark.parametrize(
    "name", ["torch.utils.model_dump.__main__.x", "timm.task.distillation.LogitDistillationTask",
             "torch.jit._script.RecursiveScriptModule", "timm.models._hub.load_custom_from_hf"]
)  # fmt: skip
def test_a_name_is_judged_before_its_module_is_imported(tmp_path, name):
    import sys

    module, _, last = name.rpartition(".")
    stream = b"\x80\x02c" + module.encode() + b"\n" + last.encode() + b"\n)\x81."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("a/data.pkl", stream)
    known = module in sys.modules
    refused(tmp_path / "m.pt", name)
    assert (module in sys.modules) == known


# -- training checkpoints -----------------------------------------------------------------------


class Foreign:
    """A class that no list has."""


def test_with_a_factory_only_tensors_matter(tmp_path):
    import numpy as np

    linear = nn.Linear(2, 2)
    notes = []
    content = {
        "network_weights": linear.state_dict(),
        "best": np.float64(0.9),
        "where": pathlib.Path("x"),
        "args": Foreign(),
        "optimizer": torch.optim.SGD(linear.parameters(), 0.1).state_dict(),
        "never": Call(exec, "raise SystemExit"),
    }
    torch.save(content, tmp_path / "c.pt")
    assert same(load(tmp_path / "c.pt", factory=LINEAR, note=notes.append), linear)
    assert [note.split()[2] for note in notes] == [key for key in content if key[0] != "n"] + [
        "never"
    ]
    refused(tmp_path / "c.pt", "--factory")


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "module.", "ema_model.", "_fsdp_wrapped_module.", "a.b.c."]
)
def test_a_prefix_that_makes_all_keys_fit_is_taken_off_and_said(tmp_path, prefix):
    linear, notes = nn.Linear(2, 2), []
    state = {prefix + key: value for key, value in linear.state_dict().items()}
    beside = {} if prefix[0] == "_" else {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": {**state, **beside}}, tmp_path / "c.pt")
    assert same(load(tmp_path / "c.pt", factory=LINEAR, note=notes.append), linear)
    assert any(prefix.strip(".") in note for note in notes)


def test_several_models_in_one_file_are_told_apart(tmp_path):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"generator": one.state_dict(), "critic": two.state_dict()}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "generator, critic", "--key", factory=LINEAR)
    assert same(load(tmp_path / "c.pt", factory=LINEAR, key="critic"), two)
    refused(tmp_path / "c.pt", "no state dict called x", factory=LINEAR, key="x")
    both = {f"a.{k}": v for k, v in one.state_dict().items()}
    both |= {f"b.{k}": v for k, v in two.state_dict().items()}
    torch.save(both, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "a., b.", "--strip-prefix", factory=LINEAR)
    assert same(load(tmp_path / "c.pt", factory=LINEAR, strip_prefix="b."), two)


def test_a_wrapped_module_gives_its_tensors(tmp_path):
    linear = nn.Linear(2, 2)
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = linear
    data = io.BytesIO()
    wrapper.__class__.__getstate__, before = nn.Module.__getstate__, wrapper.__class__.__getstate__
    try:
        torch.save(wrapper, data)
    finally:
        wrapper.__class__.__getstate__ = before
    (tmp_path / "c.pt").write_bytes(data.getvalue())
    assert same(load(tmp_path / "c.pt", factory=LINEAR), linear)


def test_a_factory_is_seeded_and_the_generators_stay(tmp_path):
    before = torch.get_rng_state()
    one, two = (load(LINEAR, seed=seed) for seed in (3, 3))
    assert same(one, two)
    assert not same(one, load(LINEAR, seed=4))
    assert torch.equal(before, torch.get_rng_state())


# -- load opens what save writes ----------------------------------------------------------------


def kinds():
    import collections
    import datetime
    import math
    import operator

    import numpy as np

    yield from (np.float64(2.0), np.int32(3), np.bool_(True), np.dtype("f4"), np.float32)
    yield from (np.arange(6.0).reshape(2, 3), np.array(["a", "bc"]), np.datetime64("2020-01-02"))
    yield from (pathlib.Path("a/b"), pathlib.PureWindowsPath("c"), datetime.date(2020, 1, 2))
    yield from (datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1), datetime.UTC)
    yield from (int, float, str, list, dict, type(None), object, complex, bytes)
    yield from (torch.tanh, torch.fft.rfft2, torch.nn.functional.gelu, torch.Tensor.relu)
    yield from (torch.special.gammaln, torch.linalg.norm, math.sqrt, operator.add, torch.bmm)
    yield from (torch.float16, torch.strided, torch.device("cpu"), torch.Size([1, 2]), 3 + 4j)
    yield from (b"abc", bytearray(b"x"), {1, 2}, frozenset({3}), range(4), slice(1, 2), Ellipsis)
    yield from (collections.OrderedDict(a=1), collections.defaultdict(list, b=[2]))
    yield from (collections.Counter("aab"), functools.partial(nn.LayerNorm, eps=1e-3), nn.GELU)
    yield from (torch.__version__, torch.ones(2), {"x": (1, "y")}, 2**70)


@pytest.mark.parametrize("value", list(kinds()), ids=lambda value: f"{value}"[:30])
@pytest.mark.parametrize("protocol", [2, 5])
def test_load_opens_every_attribute_that_save_writes(tmp_path, value, protocol):
    model = nn.Linear(2, 2)
    model.extra = value
    if protocol == 2:
        save(model, tmp_path / "m.pt")
    else:
        torch.save(model, tmp_path / "m.pt", pickle_protocol=5)
    back = load(tmp_path / "m.pt").extra
    if isinstance(value, functools.partial):
        assert (back.func, back.args, back.keywords) == (value.func, value.args, value.keywords)
        return
    assert type(back) is type(value)
    assert pickle.dumps(back) == pickle.dumps(value) or back is value or (back == value).all()


def test_what_load_could_not_open_is_not_written(tmp_path):
    model = nn.Linear(2, 2)
    model.options = {nn.Linear: 1}
    with pytest.raises(CheckpointError, match="key of a dict"):
        save(model, tmp_path / "m.pt")
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(json.dumps)
    assert list(tmp_path.iterdir()) == []
    save(hooked, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "json.dumps")
    load(tmp_path / "m.pt", trust=["json.dumps"])
