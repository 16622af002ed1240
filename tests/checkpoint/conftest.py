"""Modules and packages that files of tests name."""

from __future__ import annotations

import sys
import textwrap

import pytest

FACTORIES = """
from torch import nn
def build(channels=4, train=True):
    norm = nn.BatchNorm2d(channels)
    return nn.Sequential(nn.Conv2d(3, channels, 3), norm, nn.ReLU(), nn.Flatten())
def double(module, args, output):
    return 2 * output
def hooked():
    made = build()
    made[2].register_forward_hook(double)
    return made
def breaks():
    raise RuntimeError("no GPU\\nat all")
def returns():
    return [1]
def exits():
    raise SystemExit(3)
class Holder:
    build = staticmethod(build)
model = build()
number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module beside the user that makes models, and one that is at fault in several ways."""
    (tmp_path / "makers.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "makers"
    sys.modules.pop("makers", None)


@pytest.fixture
def trap(tmp_path):
    """A file whose existence shows that something ran."""
    return tmp_path / "ran"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is importable and not trusted, and says when it is imported."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "net.py").write_text(
        textwrap.dedent(
            """
            import enum, pathlib
            from torch import nn
            pathlib.Path(__file__).with_name("imported").touch()
            class Mode(enum.Enum):
                FAST = 1
            class Options:
                width = 3
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = nn.Linear(2, 2)
                    self.mode, self.options = Mode.FAST, Options()
                def forward(self, x):
                    return self.layer(x)
            def harm(*args):
                pathlib.Path(__file__).with_name("harmed").touch()
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import stranger.net as net

    yield net
    for name in ("stranger", "stranger.net"):
        sys.modules.pop(name, None)
