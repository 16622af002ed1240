"""The classes and operators that a file may name: read from the packages' sources, kept as data.

    python -m benchmarks.allowed_classes --write     writes the two lists of rewrite/checkpoint
    python -m benchmarks.allowed_classes --check     builds architectures, prints what is missing

A class is listed when its source reads like a layer's: a subclass of nn.Module (or a
configuration, or an enum with members) in which no construction, `__setstate__` or forward opens a
file, reaches the network, evaluates text or imports by name. Nothing of a package is imported to
find that out; a package that is not installed keeps the classes that it had. What the
architectures of the benchmarks are made of is watched by `benchmarks.seen_classes`: a test holds
the list to that. An operator of ATen is listed when it is part of the core set, has a public
function of PyTorch, or occurred in an exported network, and its name is on none of the rules of
`_DENIED`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._table import parser
from benchmarks.corpus import UnbuildableError, construct, names
from rewrite.checkpoint.pickles.names import own_values

DATA = Path(__file__).parent.parent / "rewrite" / "checkpoint"
CLASSES, OPERATORS = DATA / "allowed_classes.json", DATA / "allowed_operators.json"
VALUES = DATA / "allowed_values.json"

PLACES = {
    "torch": (
        *("torch/nn/modules", "torch/nn/utils", "torch/ao/nn", "torch/ao/quantization/stubs.py"),
        "torch/nn/parallel/data_parallel.py",
    ),
    "torchvision": ("torchvision/models", "torchvision/ops"),
    "timm": ("timm/layers", "timm/models"),
    "transformers": (
        *("transformers/models", "transformers/modeling_layers.py", "transformers/activations.py"),
        *("transformers/pytorch_utils.py", "transformers/configuration_utils.py"),
        *("transformers/generation/configuration_utils.py", "transformers/modeling_utils.py"),
        "transformers/modeling_rope_utils.py",
    ),
}
"""Where each package keeps its layers."""

_BAD_NAMES = frozenset({"open", "eval", "exec", "compile", "__import__"})
_BAD_ATTRIBUTES = frozenset(
    {
        *("load_state_dict_from_url", "urlopen", "urlretrieve", "urlparse", "popen", "system"),
        *("import_module", "load_library", "hub", "hf_hub_download", "from_file", "frombuffer"),
        *("read_text", "read_bytes", "write_text", "write_bytes", "unlink", "mkdir", "compile_"),
        *("load_pretrained", "create_model", "build_model_with_cfg", "subprocess", "pickle"),
        *("requests", "ctypes", "from_pretrained", "AutoModel", "AutoConfig", "trust_remote_code"),
    }
)
"""What the construction, `__setstate__` and forward of a listed class may not mention."""

_RUNS = frozenset({"__init__", "__new__", "__setstate__", "__getattr__", "__call__", "forward"})
_NOT_RUN = re.compile(
    r"load_.*|_load_.*|from_.*|save_.*|push_to_hub|init_weights|export.*|get_.*checkpoint.*"
)
_MODULES = frozenset({"Module", "PreTrainedModel"})
_CONFIGS = frozenset({"PretrainedConfig", "PreTrainedConfig"})
_ENUMS = frozenset({"Enum", "IntEnum", "StrEnum", "ExplicitEnum"})

_DENIED = re.compile(
    r"""as_strided.*|.*_strided|.*data_ptr|set_.*|.*resize.*|.*unsafe.*|from_.*|frombuffer|save
    |load|.*sparse_.*tensor.*|fbgemm_.*|.*quantize.*|.*mkldnn.*|.*cudnn.*|.*miopen.*|.*xnnpack.*
    |record_stream|segment_reduce|import_ir_module|.*out_of_place.*|.*backward.*|.*_storage
    |get_device_module|.*pin_memory|_reshape_alias|_index_put_impl.*|.*_impl_|_print|.*_mtia.*
    |set_default.*|.*distributed.*|.*_nested_.*|.*vulkan.*|sym_storage.*|share_memory.*
    |const_.*|mutable_.*|.*_coalesced_.*|_make_.*|_fused_.*|_foreach_.*|_amp_.*|_cslt.*""",
    re.X,
)
"""Operators that alias beyond bounds, hand out pointers, touch files, or skip their own checks."""


def main() -> None:
    """Write or check the lists."""
    options = parser(__doc__)
    options.add_argument("--check", action="store_true", help="build architectures and compare")
    options.add_argument("--classes", action="store_true", help="leave the operators as they are")
    options.add_argument("--every", type=int, default=12, help="with --check: each n-th name")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    if chosen.check:
        for line in unlisted(chosen.every):
            print(line)
        return
    classes = listed_classes()
    operators = _operators_before() if chosen.classes else listed_operators()
    print({kind: len(found) for kind, found in classes.items()})
    print({kind: len(found) for kind, found in operators.items()})
    if chosen.write:
        CLASSES.write_text(_text({kind: _nested(found) for kind, found in classes.items()}))
        OPERATORS.write_text(_text({"names": operators}))
        VALUES.write_text(values_text())


def values_text() -> str:
    """Return the names of what the reader of pickles makes itself, and the methods of a module."""
    return _text({"names": {"values": sorted(own_values()), "methods": sorted(module_methods())}})


def module_methods() -> set[str]:
    """Return the names of the methods of `nn.Module`, without those that other packages add.

    transformers puts a `smart_apply` of its own there as long as it builds a model.
    """
    added = {
        name for name, held in vars(nn.Module).items()
        if not str(getattr(held, "__module__", "torch")).startswith("torch")
    }  # fmt: skip
    return {name for name in dir(nn.Module) if callable(getattr(nn.Module, name))} - added


def _nested(names_: list[str]) -> dict[str, list[str]]:
    """Return full names by module, in order."""
    modules: dict[str, list[str]] = {}
    for full in names_:
        module, _, name = full.rpartition(".")
        modules.setdefault(module, []).append(name)
    return modules


def _text(content: dict[str, dict[str, list[str]]]) -> str:
    """Return JSON with one module a line."""
    parts = []
    for kind, modules in content.items():
        lines = (f'"{module}": {json.dumps(" ".join(found))}' for module, found in modules.items())
        parts.append(f'"{kind}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _flat(content: dict[str, dict[str, str]], kind: str) -> set[str]:
    """Return the full names of what `_text` wrote."""
    return {f"{module}.{name}" for module, found in content[kind].items() for name in found.split()}


# -- classes --------------------------------------------------------------------------------------


def listed_classes() -> dict[str, list[str]]:
    """Return the full names of layers, of configurations and of enums."""
    kinds: dict[str, set[str]] = {"layers": set(), "instances": set(), "enums": set()}
    roots = _MODULES
    before = json.loads(CLASSES.read_text()) if CLASSES.exists() else {kind: {} for kind in kinds}
    for package, places in PLACES.items():
        sources = dict(_sources(package, places))
        if not sources:
            for kind, found in kinds.items():
                found |= {n for n in _flat(before, kind) if n.startswith(f"{package}.")}
            continue
        layers, configs, enums = _classify(sources, roots)
        if package == "torch":
            # Other packages derive layers from these by name: a class of Sequential is a layer.
            roots = _MODULES | {full.rpartition(".")[2] for full in layers}
        kinds["instances" if package == "transformers" else "layers"] |= layers
        kinds["instances"] |= configs
        kinds["enums"] |= enums
    kinds["layers"] -= kinds["enums"]
    return {kind: sorted(found) for kind, found in kinds.items()}


def _sources(package: str, places: tuple[str, ...]) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules of a package as name and syntax tree; nothing of it is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    root = Path(spec.origin).parent.parent
    for place in places:
        path = root / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists():
            module = ".".join(file.relative_to(root).with_suffix("").parts)
            yield module.removesuffix(".__init__"), ast.parse(file.read_text(encoding="utf-8"))


def _classify(
    sources: dict[str, ast.Module], modules: frozenset[str]
) -> tuple[set[str], set[str], set[str]]:
    """Return the layers, the configurations and the enums of a package by full name.

    Args:
        sources: The package's modules.
        modules: Names of classes outside of the package that are known as layers.
    """
    found = [
        (f"{module}.{node.name}", node)
        for module, tree in sources.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    ]
    families = []
    for roots in (modules, _CONFIGS, _ENUMS):
        known = set(roots)
        while True:
            grown = known | {node.name for _, node in found if _bases(node) & known}
            if grown == known:
                break
            known = grown
        families.append(known)
    # What every module inherits runs only when it is called by name, as `Module.compile` is.
    harmful = {
        full for full, node in found
        if node.name not in _MODULES | _CONFIGS and not _harmless(node)
    }  # fmt: skip
    named: dict[str, list[str]] = {}
    for full, node in found:
        named.setdefault(node.name, []).append(full)

    def inherits_harm(full: str, node: ast.ClassDef) -> bool:
        for base in _bases(node):
            beside = f"{full.rpartition('.')[0]}.{base}"
            homes = [beside] if beside in named.get(base, ()) else named.get(base, [])
            if homes and harmful.issuperset(homes):
                return True
        return False

    for _ in range(4):
        harmful |= {full for full, node in found if inherits_harm(full, node)}
    layers, configs, enums = (
        {full for full, node in found if node.name in family and full not in refused}
        # Of an enum only members are looked up: nothing of it is called.
        for family, refused in zip(families, (harmful, harmful, set()), strict=True)
    )
    with_members = {full for full, node in found if _members(node)}
    return layers, configs, enums & with_members


def _bases(node: ast.ClassDef) -> set[str]:
    names = set()
    for base in node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        names.add(inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", ""))
    return names


def _members(node: ast.ClassDef) -> bool:
    return any(isinstance(line, ast.Assign) for line in node.body)


def _harmless(node: ast.ClassDef) -> bool:
    """Say whether no method that opening or running the class calls mentions what is bad."""
    for method in node.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        if method.name not in _RUNS and _NOT_RUN.fullmatch(method.name):
            continue
        for part in ast.walk(method):
            if isinstance(part, ast.Name) and part.id in _BAD_NAMES | _BAD_ATTRIBUTES:
                return False
            if isinstance(part, ast.Attribute) and part.attr in _BAD_ATTRIBUTES:
                return False
    return True


# -- operators ------------------------------------------------------------------------------------


def listed_operators() -> dict[str, list[str]]:
    """Return what a graph may call: ATen's overloads, functions of torch, methods of tensors."""
    seen = set(_exported())
    aten = sorted(
        name
        for name in (
            schema.name + "." + (schema.overload_name or "default") for schema in _schemas()
        )
        if _is_listed(name, seen)
    )
    functions = {
        "torch": (n for n in dir(torch._C._VariableFunctions) if not n.startswith("_")),
        "torch.fft": torch.fft.__all__,
        "torch.linalg": getattr(torch.linalg, "__all__", dir(torch.linalg)),
        "torch.special": torch.special.__all__,
    }
    lists = {
        place: sorted(
            name
            for name in found
            if not name.startswith("_") and not _DENIED.fullmatch(name)
            and callable(getattr(__import__(place, fromlist=["x"]), name, None))
            and not isinstance(getattr(__import__(place, fromlist=["x"]), name), type)
        )
        for place, found in functions.items()
    }  # fmt: skip
    more = {"broadcast_shapes", "is_tensor", "is_storage", "sym_int", "sym_float", "sym_not"}
    more |= {name for name in dir(torch) if name.startswith("sym_")} | set(torch.functional.__all__)
    lists["torch"] = sorted(set(lists["torch"]) | {n for n in more if not _DENIED.fullmatch(n)})
    lists["methods"] = sorted(
        name
        for name in dir(torch.Tensor)
        if not name.startswith("_")
        and callable(getattr(torch.Tensor, name))
        and not _DENIED.fullmatch(name)
        and name not in _NO_METHODS
    )
    return {"operators": aten, **lists}


_NO_METHODS = frozenset(
    {
        *("apply_", "map_", "map2_", "numpy", "tolist", "storage", "untyped_storage"),
        *("module_load", "register_hook", "register_post_accumulate_grad_hook", "reinforce"),
        *("retain_grad", "dim_order", "rename", "rename_", "refine_names", "align_to"),
    }
)


def _operators_before() -> dict[str, list[str]]:
    content = json.loads(OPERATORS.read_text())["names"]
    return {kind: names_.split() for kind, names_ in content.items()}


def _schemas() -> list[Any]:
    return [
        schema
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.partition("::")[0] in ("aten", "torchvision", "prims")
    ]


def _is_listed(name: str, seen: set[str]) -> bool:
    place, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, place), base, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload) or _DENIED.fullmatch(base):
        return False
    if overload == "out" or overload.endswith("_out") or overload.endswith("dimname"):
        return False
    if not torch._C._dispatch_has_kernel(
        f"{place}::{base}" + f".{overload}" * (overload != "default")
    ):
        return False
    if f"{place}.{base}.{overload}" in seen or torch.Tag.core in found.tags:
        return True
    homes = (torch, nn.functional, torch.Tensor, torch._C._nn)
    public = any(hasattr(home, base) for home in homes) or base.startswith("sym_")
    public = public or base.removeprefix("linalg_") in dir(torch.linalg)
    public = public or base.startswith(("fft_", "special_"))
    return place != "prims" and not base.startswith("_") and public


def _exported() -> Iterator[str]:
    """Yield the operators of networks that were exported, before and after decomposition."""
    for model, inputs in _networks():
        try:
            program = torch.export.export(model.eval(), inputs)
            programs = (program, program.run_decompositions())
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            print(f"{type(model).__name__}: {error}"[:120])
            continue
        for each in programs:
            for node in each.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    yield str(node.target)


def _networks() -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    from torchvision import models

    image = (torch.randn(1, 3, 64, 64),)
    for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11"):
        yield models.get_model(name), image
    yield models.get_model("vit_b_32", image_size=64), image
    for name in ("swin_t", "convnext_tiny", "efficientnet_b0", "regnet_y_400mf", "densenet121"):
        yield models.get_model(name), image
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    yield nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),)
    yield nn.Sequential(nn.LSTM(4, 4)), (torch.randn(2, 5, 4),)
    yield nn.Sequential(nn.GRU(4, 4)), (torch.randn(2, 5, 4),)
    yield nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4)), (torch.ones(2, 3).long(),)
    yield nn.Upsample(scale_factor=2, mode="bilinear"), image
    yield nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.PReLU()), image


# -- the check ------------------------------------------------------------------------------------


def unlisted(every: int) -> Iterator[str]:
    """Yield the classes that architectures of the installed packages use and no list has."""
    chosen = [name for package in ("timm", "torchvision") for name in names(package)]
    yield from unlisted_in(chosen[::every])


def unlisted_in(chosen: Iterable[str]) -> Iterator[str]:
    """Yield the classes that these architectures use and no list has."""
    lists = json.loads(CLASSES.read_text())
    allowed = {name for kind in lists for name in _flat(lists, kind)}
    packages = tuple(f"{package}." for package in PLACES)
    missing: dict[str, str] = {}
    for name in chosen:
        try:
            model = construct(name, "meta")
        except UnbuildableError as error:
            print(f"{name}: {type(error).__name__}")
            continue
        for module in model.modules():
            full = f"{type(module).__module__}.{type(module).__qualname__}"
            if full.startswith(packages) and full not in allowed:
                missing.setdefault(full, name)
    yield from (f"{full} of {name}" for full, name in sorted(missing.items()))


if __name__ == "__main__":
    main()
