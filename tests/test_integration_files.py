"""What other projects use, run as written: the composite action and the pre-commit hook."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import rewrite
from models.randomize import randomize_norms_

ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github" / "actions" / "verify" / "action.yml"


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    randomize_norms_(model).eval()
    rewrite.save(model, tmp_path / "model.pt")
    rewrite.export(model, tmp_path / "right.onnx", example_inputs=torch.randn(2, 3, 9, 9))
    with torch.no_grad():
        model[0].weight[1] += 0.2
    rewrite.export(model, tmp_path / "wrong.onnx", example_inputs=torch.randn(2, 3, 9, 9))
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **more}


@pytest.mark.parametrize(("graph", "code"), [("right.onnx", 0), ("wrong.onnx", 1)])
def test_the_actions_step_judges_and_keeps_the_page(exported: Path, graph: str, code: int) -> None:
    step = next(s for s in loaded(ACTION)["runs"]["steps"] if s["name"] == "Verify")
    given = {"GRAPH": graph, "MODEL": "model.pt", "ARGUMENTS": "--quick", "REPORT": "page.html"}
    assert set(step["env"]) == set(given)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step["run"]],
        cwd=exported, env=environment(**given), capture_output=True, check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr
    assert (exported / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_graph_alone_needs_no_model(exported: Path) -> None:
    step = next(s for s in loaded(ACTION)["runs"]["steps"] if s["name"] == "Verify")
    given = {"GRAPH": "right.onnx", "MODEL": "", "ARGUMENTS": "", "REPORT": "page.html"}
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step["run"]],
        cwd=exported, env=environment(**given), check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.parametrize(("graph", "code"), [("right.onnx", 0), ("wrong.onnx", 1)])
def test_the_pre_commit_hook_judges(exported: Path, graph: str, code: int) -> None:
    (hook,) = loaded(ROOT / ".pre-commit-hooks.yaml")
    command = [*hook["entry"].split(), graph, "model.pt", "--quick"]
    command[0] = shutil.which(command[0], path=environment()["PATH"]) or command[0]
    ran = subprocess.run(command, cwd=exported, capture_output=True, check=False)
    assert ran.returncode == code, ran.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name
)
def test_every_workflow_and_template_is_yaml(path: Path) -> None:
    assert isinstance(loaded(path), dict)


def test_a_release_knows_its_addresses(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    links = set(re.findall(r"\]\(([^)\s]+)\)", (tmp_path / "README.md").read_text("utf-8")))
    build = loaded(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["build"]
    (step,) = (s["run"] for s in build["steps"] if ".github/scripts/" in s.get("run", ""))
    script = step.split()[1]
    subprocess.run(
        [sys.executable, str(ROOT / script)], cwd=tmp_path, check=True,
        env=environment(
            GITHUB_SERVER_URL="https://github.com", GITHUB_REPOSITORY="us/rewrite",
            GITHUB_REF_NAME="v9.8.7",
        ),
    )  # fmt: skip
    text = (tmp_path / "README.md").read_text("utf-8")
    written = set(re.findall(r"\]\(([^)\s]+)\)", text))
    place = "https://github.com/us/rewrite"
    assert written and all(link.startswith("https://") for link in written)
    for link in links:
        kind = "raw" if link.endswith(".svg") else "blob"
        assert link in written or f"{place}/{kind}/v9.8.7/{link}" in written
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"]["Repository"] == place
    assert project["urls"]["Changelog"] == f"{place}/blob/v9.8.7/CHANGELOG.md"
    assert project["scripts"] and project["dependencies"]
