"""The graph of an exported program is rebuilt from its JSON; its code is never run."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

from rewrite.checkpoint.load import load
from rewrite.errors import CheckpointError
from tests.checkpoint.exported.programs import altered


def replaced(old, new):
    def change(name, content):
        if not name.endswith("model.json"):
            return None
        assert old.encode() in content, "the test would prove nothing"
        return content.replace(old.encode(), new.encode())

    return change


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.ops.aten.relu.default", "torch.hub.load"),
        ("torch.ops.aten.relu.default", "torch.ops.load_library"),
        ("torch.ops.aten.relu.default", "torch.os.system"),
        ("Symbol('s77', positive=True, integer=True)", "__import__('os').system('true')"),
        ("Symbol('s77', positive=True, integer=True)", "exec('x')"),
        ("Symbol('s77', positive=True, integer=True)", "s77.__class__"),
        ('"name": "x"', '"name": "x=print(1)"'),
        ("builtins.dict", "collections.defaultdict"),
        ('\\\\\\"scale\\\\\\"', '\\\\\\"scale\':print(1)\\\\\\"'),
    ],
)
def test_a_program_with_foreign_text_is_refused(program, tmp_path, old, new):
    content = zipfile.ZipFile(program[0]).read("m/models/model.json").decode()
    if old.startswith("Symbol"):
        old = json.dumps(next(s for s in _sizes(content) if "Symbol" in s))[1:-1]
    with pytest.raises(CheckpointError) as caught:
        load(altered(program, tmp_path, replaced(old, new)))
    assert "\n" not in str(caught.value)


def _sizes(text):
    def walk(value):
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "expr_str")
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from walk(item)

    return list(walk(json.loads(text)))


def test_guards_of_the_file_are_never_run(program, tmp_path):
    trap = tmp_path / "ran"
    code = f"__import__('os').system('touch {trap}') is None"

    def change(name, content):
        if not name.endswith("model.json"):
            return None
        tree = json.loads(content)
        tree["guards_code"] = [code]
        return json.dumps(tree).encode()

    load(altered(program, tmp_path, change))(torch.randn(2, 3, 8, 8), scale=2.0)
    assert not trap.exists()
