"""What is inside a model: norms, what feeds them and what reads them."""

from __future__ import annotations

from tests.observe.blocks import Decoder, randomized, tokens


def test_inspect_shows_what_reads_each_norm() -> None:
    from rewrite.inspection import inspect_model

    rows = {row.name: row for row in inspect_model(randomized(Decoder()), (tokens(),)).norms}
    read = rows["layers.0.norm1"].read_by.split(", ")
    assert read == [f"layers.0.attention.{name}" for name in "qkv"]
    assert rows["norm"].read_by == "head" and rows["norm"].kind == "RMSNorm"
    assert rows["layers.0.norm1"].fed_by == "embed"
