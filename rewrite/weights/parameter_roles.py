"""What each parameter of a model is: a matrix of a layer, or anything else.

    matrix    y = W x: a parameter that multiplies and sums over inputs; weight decay shrinks it
    other     everything that is added, scales, or is looked up by position: norms, biases, layer
              scales, gains, position and relative-bias tables, class tokens, anchors

    softmax(q kᵀ + q Rᵀ)    R, a table of relative positions (Shaw et al. 2018), is other too
    einsum(R, one-hot)      R, rearranged by buffers, is what its result is used for

The structure says which: the class of a layer, then the calls of the graph that a bare parameter
goes into, then, where no trace went, the products and look-ups that the code of its module writes.
Names say nothing.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.spellings import CONVS, LINEARS, function_name, is_getitem
from rewrite.graph.traits import spelled
from rewrite.runtime.tree import Tree, join
from rewrite.tracing.code.positions import looks_up_positions, read_whole
from rewrite.tracing.code.products import sums_over, writes_product

_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)

_PRODUCTS = spelled(
    "matmul", "mm", "bmm", "einsum", "addmm", "baddbmm", "tensordot", "linear", "bilinear",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "convolution",
)  # fmt: skip

_RESHAPES = {"rearrange"} | spelled(
    "view", "reshape_as", "transpose", "permute", "t", "movedim", "flatten", "unflatten",
    "squeeze", "unsqueeze", "chunk", "split", "unbind", "narrow", "select", "getitem", "expand",
    "expand_as", "repeat", "cat", "stack", "contiguous", "clone", "to", "type_as", "float", "half",
    "double", "bfloat16", "neg", "batch_norm", "mul", "div", "sub", "normalize",
)  # fmt: skip
"""What stands between a parameter and its product: other layouts of it, and, as in weight
standardization and in dynamic convolution, the same matrix rescaled."""

_SCALES = spelled("mul", "div", "batch_norm")

_ONWARDS = _RESHAPES | spelled("pad", "masked_fill", "roll")
"""What attention's logits go through before their softmax."""

_STEPS = 12


class Role(enum.StrEnum):
    """What weight decay does with a parameter."""

    MATRIX = "matrix"
    OTHER = "other"


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter by its first qualified name; nothing is run.

    A parameter that two modules share is a matrix if it is one in either.
    """
    tree = Tree(model)
    found: dict[int, Role] = {}
    names: dict[int, str] = {}
    open_: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name, module in tree.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            names.setdefault(id(parameter), join(name, key))
            role = _by_class(tree, name, module, key)
            if role is None:
                open_.append((module, key, parameter))
            elif found.get(id(parameter)) is not Role.MATRIX:
                found[id(parameter)] = role
    open_ = [item for item in open_ if id(item[2]) not in found]
    if open_:
        captured = capture(model)
        read = _reads(captured)
        for module, key, parameter in open_:
            name = join(tree.name(module), key)
            nodes = read.get(name)
            if isinstance(module, nn.Embedding) and _is_seen_alone(captured, tree, module, nodes):
                matrix = not _looks_up_positions(tree, module)
                if holders := _read_whole(tree, module):
                    kinds = [(type(tree.get(owner)), key) for owner, _, key in holders]
                    matrix = any(writes_product(kind, key, _PRODUCTS) for kind, key in kinds)
            elif nodes:
                matrix = _multiplies(captured, nodes)
            else:
                matrix = writes_product(type(module), key, _PRODUCTS)
            found[id(parameter)] = Role.MATRIX if matrix else Role.OTHER
    return {name: found[identity] for identity, name in names.items()}


# -- by class ---------------------------------------------------------------------------------


def _by_class(tree: Tree, name: str, module: nn.Module, key: str) -> Role | None:
    """Return the role of `key` if the class of its module, or of the layer around it, says it."""
    if ".parametrizations." in f".{name}.":
        return _parametrized(tree, name, module, key)
    if isinstance(module, _NORMS):
        return Role.OTHER
    if isinstance(module, _LAYERS):
        return _in_layer(module, key)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None if isinstance(module, nn.Embedding) else Role.MATRIX
    return None


def _in_layer(layer: nn.Module, key: str) -> Role:
    """Return the role of a tensor of a layer by the layout that its class documents."""
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return Role.MATRIX if key.startswith("weight") else Role.OTHER
    if isinstance(layer, nn.MultiheadAttention):
        return Role.MATRIX if key.endswith("proj_weight") else Role.OTHER
    return Role.MATRIX if key in ("weight", "weight_v", "weight_orig") else Role.OTHER


def _parametrized(tree: Tree, name: str, module: nn.Module, key: str) -> Role | None:
    """Return the role of an original of a parametrized tensor: that of the tensor, gains aside.

    The originals of the tensor's own shape are the matrix; the others scale it.
    """
    stem, _, rest = f".{name}".rpartition(".parametrizations.")
    layer = tree.get(stem.removeprefix("."))
    attribute = rest.split(".")[0]
    if isinstance(layer, _NORMS) or not key.startswith("original"):
        return Role.OTHER
    if not isinstance(layer, _LAYERS) or not is_parametrized(layer, attribute):
        return None
    if _in_layer(layer, attribute) is Role.OTHER:
        return Role.OTHER
    shape = module._parameters[key].shape  # type: ignore[union-attr]  # the key of a parameter that is there
    largest = max(p.numel() for p in module._parameters.values() if p is not None)
    return Role.MATRIX if shape.numel() == largest and len(shape) > 1 else Role.OTHER


# -- by graph ---------------------------------------------------------------------------------


def _reads(captured: Captured) -> dict[str, list[Node]]:
    """Return the nodes that read each bare parameter, and each embedding's calls."""
    read: dict[str, list[Node]] = {}
    for node in captured.nodes():
        if node.op == "get_attr":
            read.setdefault(str(node.target), []).append(node)
        elif node.op == "call_module":
            module = captured.tree.names.get(str(node.target))
            if isinstance(module, nn.Embedding):
                read.setdefault(join(str(node.target), "weight"), []).append(node)
    return read


def _multiplies(captured: Captured, nodes: list[Node]) -> bool:
    """Return whether a parameter that `nodes` read is a factor of a product that sums."""
    return any(
        _looks_up_input(node) if node.op == "call_module" else _reaches_product(captured, node)
        for node in nodes
    )


def _is_seen_alone(
    captured: Captured, tree: Tree, module: nn.Module, nodes: list[Node] | None
) -> bool:
    """Return whether no trace followed what calls an embedding."""
    name = tree.name(module)
    return not nodes or all(captured.region_of(node).name == name for node in nodes)


def _looks_up_positions(tree: Tree, module: nn.Module) -> bool:
    """Return whether the code of an embedding, or of what holds it, looks it up by position."""
    if looks_up_positions(module, ""):
        return True
    return any(looks_up_positions(tree.get(owner), key) for owner, _, key in _places(tree, module))


def _read_whole(tree: Tree, module: nn.Module) -> list[tuple[str, str, str]]:
    """Return the places of an embedding if the code around each reads its whole weight, or []."""
    places = _places(tree, module)
    return places if all(read_whole(tree.get(owner), key) for owner, _, key in places) else []


def _places(tree: Tree, module: nn.Module) -> list[tuple[str, str, str]]:
    """Return the owner and the key of every name of a module, a dot between them."""
    name = tree.name(module)
    return [alias.rpartition(".") for alias in (name, *tree.aliases(name)) if alias]


def _looks_up_input(call: Node) -> bool:
    """Return whether an embedding is looked up by data, and not by constant positions."""
    pending, seen = list(call.all_input_nodes), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if function_name(node) in (
            "size",
            "getattr",
            "arange",
            "zeros_like",
            "ones_like",
            "cumsum",
        ):
            continue
        if node.op == "placeholder":
            return True
        if function_name(node) == "mul" and any(map(_counts, node.all_input_nodes)):
            continue  # cumsum(mask) * mask: positions of what is not padding
        pending.extend(node.all_input_nodes)
    return False


def _counts(node: Node) -> bool:
    """Return whether a value is made of a running sum."""
    return any(function_name(one) == "cumsum" for one in _made_of(node))


def _reaches_product(captured: Captured, read: Node) -> bool:
    pending = [(read, user, 0) for user in read.users]
    while pending:
        value, user, steps = pending.pop()
        if _is_matrix_of(user, value):
            if _is_rearranged(captured, user, value) and steps < _STEPS:
                pending.extend((user, later, steps + 1) for later in user.users)
            elif not _is_position_term(captured, user):
                return True
            continue
        if not _is_reshape(user) or steps >= _STEPS or _is_look_up(user):
            continue
        if _only_parameters(user) and not _scales_another(captured, user, value):
            pending.extend((user, later, steps + 1) for later in user.users)
    return False


def _is_rearranged(captured: Captured, product: Node, value: Node) -> bool:
    """Return whether a product's other factors are buffers: one-hot rows that rearrange a table."""
    others = [node for node in product.all_input_nodes if node is not value]
    return bool(others) and not any(
        node.op in _FROM_OUTSIDE or _is_parameter(captured, node) for node in _made_of(*others)
    )


def _is_parameter(captured: Captured, node: Node) -> bool:
    ref = captured.ref(node)
    return ref is not None and isinstance(captured.tensor(ref), nn.Parameter)


def _is_position_term(captured: Captured, product: Node) -> bool:
    """Return whether a product is added to one of two activations, and the sum goes into a softmax.

    That is how attention adds what it makes of relative positions to what it makes of its keys
    (https://arxiv.org/abs/1803.02155); a layer's output is not added to attention's logits.
    """
    pending, seen = [(product, False)], set[tuple[Node, bool]]()
    while pending:
        value, added = pending.pop()
        if (value, added) in seen:
            continue
        seen.add((value, added))
        for user in value.users:
            if added and _is_softmax(captured, user):
                return True
            if function_name(user) == "add":
                others = [other for other in user.all_input_nodes if other is not value]
                pending.append((user, added or any(map(_is_product_of_values, others))))
            elif function_name(user) in _ONWARDS:
                pending.append((user, added))
    return False


def _is_softmax(captured: Captured, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(captured.module(str(node.target)), nn.Softmax)
    return function_name(node) in ("softmax", "_softmax")


def _is_product_of_values(node: Node) -> bool:
    """Return whether a value is a product of two that both depend on the input, or that scaled."""
    while function_name(node) in _ONWARDS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if function_name(node) not in ("matmul", "bmm", "einsum", "baddbmm"):
        return False
    return sum(not _only_parameters(factor) for factor in node.all_input_nodes) > 1


def _is_reshape(node: Node) -> bool:
    """Return whether `node` is another layout of its input, or a rescaling of it."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "H", "mH")
    return function_name(node) in _RESHAPES


def _scales_another(captured: Captured, node: Node, value: Node) -> bool:
    """Return whether `node` takes `value` for a gain: a larger parameter is multiplied by it."""
    if function_name(node) not in _SCALES:
        return False
    own = _largest_parameter(captured, value)
    others = [other for other in node.all_input_nodes if other is not value]
    return any(_largest_parameter(captured, other) > own for other in others)


def _largest_parameter(captured: Captured, node: Node) -> int:
    """Return how many values the largest parameter has that a value is made of."""
    refs = (captured.ref(one) for one in _made_of(node))
    return max((captured.tensor(ref).numel() for ref in refs if ref is not None), default=0)


def _is_look_up(node: Node) -> bool:
    """Return whether `node` takes rows of a table by a tensor of positions."""
    return is_getitem(node) and any(n is not node.args[0] for n in node.all_input_nodes)


def _only_parameters(node: Node) -> bool:
    """Return whether a value depends on no input of the model."""
    return not any(one.op in _FROM_OUTSIDE for one in _made_of(node))


_FROM_OUTSIDE = ("placeholder", "call_module")
"""Operations whose value may depend on an input of the model."""


def _made_of(*values: Node) -> Iterator[Node]:
    """Yield each value, and everything that they are computed from, once."""
    pending, seen = list(values), set[Node]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
            yield node


def _is_matrix_of(user: Node, value: Node) -> bool:
    """Return whether `user` is a product with `value` for its matrix: not its input, no bias."""
    if user.op not in ("call_function", "call_method"):
        return False
    if user.target in CONVS or user.target in LINEARS or user.target is F.bilinear:
        place = 2 if user.target is F.bilinear else 1
        given = user.args[place] if len(user.args) > place else user.kwargs.get("weight")
        return given is value
    if user.target is operator.matmul:
        return True
    name = function_name(user)
    if name in ("addmm", "baddbmm"):
        return value in user.args[1:]
    if name == "einsum" and isinstance(equation := user.args[0], str):
        operands = user.args[1] if isinstance(user.args[1], tuple | list) else user.args[1:]
        return any(one is value and sums_over(equation, n) for n, one in enumerate(operands))
    return name in _PRODUCTS
