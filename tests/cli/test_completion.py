"""The command `rewrite completion`, and what a shell completes by it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_is_printed(capsys, shell: str) -> None:
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0 and "_ARGCOMPLETE" in out and "rewrite" in out


def test_commands_are_completed() -> None:
    line = "rewrite conv"
    code = (
        "import os, sys\n"
        "line, out = sys.argv[1:]\n"
        "os.environ.update(_ARGCOMPLETE='1', COMP_LINE=line, COMP_POINT=str(len(line)))\n"
        "os.environ['_ARGCOMPLETE_STDOUT_FILENAME'] = out\n"
        "from rewrite.cli.main import main\nmain([])\n"
    )
    out = Path("completed.txt")
    try:
        subprocess.run([sys.executable, "-c", code, line, str(out)], check=False, timeout=60)
        assert out.read_text().strip() == "convert"
    finally:
        out.unlink(missing_ok=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_flags(tmp_path: Path) -> None:
    script = tmp_path / "complete.sh"
    script.write_text(
        f"rewrite() {{ '{sys.executable}' -m rewrite \"$@\"; }}; export -f rewrite\n"
        "source <(rewrite completion bash)\n"
        "try() { COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_LINE=$1\n"
        'COMP_POINT=${#1}; COMPREPLY=(); _python_argcomplete rewrite; echo "${COMPREPLY[@]}"; }\n'
        "try 'rewrite com'\ntry 'rewrite convert --bn-to-g'\n"
    )
    ran = subprocess.run(["bash", script], capture_output=True, text=True, check=False, timeout=120)
    assert [line.split() for line in ran.stdout.splitlines()] == [
        ["compare", "completion"], ["--bn-to-gn"],
    ], ran.stderr  # fmt: skip


def _on_path(folder: Path) -> dict[str, str]:
    """Return an environment in which `rewrite` is the command of this interpreter."""
    command = folder / "bin" / "rewrite"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m rewrite \"$@\"\n")
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(folder)}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands_and_flags(tmp_path: Path) -> None:
    script = (
        "rewrite completion fish | source; complete -C 'rewrite conv'; "
        "complete -C 'rewrite convert --bn-to-g'"
    )
    ran = subprocess.run(
        ["fish", "-c", script], capture_output=True, text=True, check=False, timeout=120,
        env=_on_path(tmp_path),
    )  # fmt: skip
    assert [line.split()[0] for line in ran.stdout.split("\n") if line.strip()] == [
        "convert", "--bn-to-gn",
    ], ran.stderr  # fmt: skip


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize("before", ["", "autoload -Uz compinit && compinit -i; "])
def test_zsh_knows_the_command_with_its_completions_loaded_or_not(
    tmp_path: Path, before: str
) -> None:
    script = f'{before}eval "$(rewrite completion zsh)" && print $_comps[rewrite]'
    ran = subprocess.run(
        ["zsh", "-f", "-c", script], capture_output=True, text=True, check=False, timeout=120,
        env=_on_path(tmp_path),
    )  # fmt: skip
    assert (ran.stdout.strip(), ran.stderr) == ("_python_argcomplete", "")
