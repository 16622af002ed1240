"""Tensors of raw bytes: as many as the file holds, and those that it holds."""

from __future__ import annotations

import zipfile

import pytest
import torch

from rewrite.checkpoint.load import load
from tests.checkpoint.files import LINEAR, Call, in_eval, refused_at_once, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_changed_byte_of_a_tensor_is_seen_and_no_checksum_is_no_error(tmp_path):
    torch.save(in_eval(), tmp_path / "m.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    data[data.index(in_eval()[0].weight.detach().numpy().tobytes()) + 5] ^= 1
    (tmp_path / "bad.pt").write_bytes(data)
    refused_at_once(tmp_path / "bad.pt", "damaged")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(in_eval(), tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load(tmp_path / "m.pt"), in_eval())


def test_sizes_are_known_before_memory_is_taken(tmp_path):
    torch.save(Call(frozenset, range(2 * 10**9)), tmp_path / "range.pt")
    refused_at_once(tmp_path / "range.pt", "no list")
    tensor = torch.ones(1).expand(10**11)
    torch.save({"state_dict": {"w": tensor}}, tmp_path / "wide.pt")
    refused_at_once(tmp_path / "wide.pt", "repeats", factory=LINEAR)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(600 << 20))
    refused_at_once(tmp_path / "bomb.pt", "would expand")
