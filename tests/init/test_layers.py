"""What one module needs to be initialized: gates, projections, padding rows, identities."""

import pytest
import torch
from torch import nn

from tests.passes.test_reinit import reinit


class ZeroCentredNorm(nn.Module):
    """Scales by 1 + weight, as Gemma's RMSNorm does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x):
        return nn.functional.rms_norm(x, (4,)) * (1 + self.weight)


class ResponseNorm(nn.Module):
    """Adds to its input, as the global response norm of ConvNeXt V2 does; channels last."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * (x * size / size.mean(-1, keepdim=True)) + self.bias


class NormAct(nn.BatchNorm2d):
    """A norm and an activation that is not zero at zero."""

    def forward(self, x):
        return super().forward(x).sigmoid()


@pytest.mark.parametrize(
    ("kind", "value"), [(ZeroCentredNorm, 0.0), (ResponseNorm, 0.0), (lambda: NormAct(4), 1.0)]
)
def test_norms_of_other_packages_become_their_identity(kind, value):
    model = nn.Sequential(kind())
    state = torch.get_rng_state()
    out = reinit(model).model[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out.weight, torch.full((4,), value))
    if isinstance(out, ResponseNorm):
        x = torch.randn(2, 3, 3, 4)
        assert torch.equal(out(x), x)


def test_each_gate_by_itself_and_the_forget_bias():
    lstm = nn.LSTM(8, 8, num_layers=2)
    out = reinit(lstm, scheme="orthogonal", forget_bias=1.0).model
    for name, parameter in out.named_parameters():
        if name.startswith("weight"):
            for block in parameter.split(8):
                torch.testing.assert_close(block @ block.T, torch.eye(8))
        else:
            forget = 1.0 if name.startswith("bias_ih") else 0.0
            assert parameter[8:16].tolist() == [forget] * 8
            assert not torch.cat([parameter[:8], parameter[16:]]).any()
    x = torch.randn(3, 1, 8)
    again = nn.LSTM(8, 8, num_layers=2)
    again.load_state_dict(out.state_dict())
    assert torch.equal(again(x)[0], out(x)[0])  # the layer computes with its new weights


def test_attention_by_projection():
    out = reinit(nn.MultiheadAttention(8, 2), scheme="orthogonal").model
    for block in out.in_proj_weight.split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(8))
    assert not out.in_proj_bias.any()


def test_padding_row_stays_zero():
    out = reinit(nn.Embedding(5, 4, padding_idx=2)).model
    assert not out.weight[2].any()
    assert out.weight[[0, 1, 3, 4]].all()
