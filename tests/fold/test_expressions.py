from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from rewrite.fold.expressions import evaluate, expression, keys


class Computed(nn.Module):
    def __init__(self, form: Callable[[Computed], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(4))
        self.v = nn.Parameter(torch.rand(4) + 0.5)
        self.form = form

    def forward(self) -> Tensor:
        return self.form(self)


FORMS = {
    "plain": lambda m: m.w * 1,
    "one more": lambda m: 1 + m.w,
    "from one": lambda m: 1 - m.w,
    "half": lambda m: m.w / 2,
    "frozen": lambda m: (m.v + 1e-5).rsqrt().reshape(1, -1, 1, 1) * m.w[None, :, None, None],
    "softplus": lambda m: torch.nn.functional.softplus(m.w).exp(),
    "power": lambda m: m.w.pow(2).clamp(min=0.1).unsqueeze(-1),
    "cast": lambda m: m.w.float().to(torch.float64),
    "slice": lambda m: m.w[..., 1:3],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_expression_is_json_and_says_what_the_forward_computes(form) -> None:
    model = Computed(form).double()
    traced = symbolic_trace(model)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    data = json.loads(json.dumps(expression(output.args[0], {})))
    tensors = dict(model.named_parameters())
    assert torch.equal(evaluate(data, tensors.__getitem__), form(model))
    assert keys(data) <= {"w", "v"} and "w" in keys(data)
    other = {name: tensor.detach() + 1 for name, tensor in tensors.items()}
    assert not torch.equal(evaluate(data, other.__getitem__), form(model))


@pytest.mark.parametrize("name", ["__class__", "system", "numpy", "eval"])
def test_only_known_functions_are_called(name: str) -> None:
    with pytest.raises(ValueError, match="is no function of a constant"):
        evaluate({"call": name, "args": [{"literal": [1.0]}]}, lambda key: torch.ones(1))


def test_what_is_no_data_is_no_expression() -> None:
    model = Computed(lambda m: torch.cumsum(m.w, 0))
    (output,) = (n for n in symbolic_trace(model).graph.nodes if n.op == "output")
    assert expression(output.args[0], {}) is None
