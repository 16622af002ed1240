import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewrite
from benchmarks import _optional, _process, _table, conversions, house

PAGE = "# Page\n\n<!-- begin a -->\nold\n<!-- end a -->\n\n<!-- begin b -->\nkeep\n<!-- end b -->\n"


def test_a_section_replaces_its_own_text_and_no_other():
    page = _table.replace_section(PAGE, "a", "## A\n\nnew \\1 text\n")
    assert page == PAGE.replace("old", "## A\n\nnew \\1 text")
    assert _table.replace_section(page, "a", "## A\n\nnew \\1 text\n") == page


def test_a_new_section_goes_to_the_end():
    page = _table.replace_section(PAGE, "c", "third")
    assert page == PAGE + "\n<!-- begin c -->\nthird\n<!-- end c -->\n"


def test_a_table_has_a_rule_as_wide_as_its_header():
    assert _table.table(["row", "x"], [["a", 1], ["b", 2.5]]) == (
        "| row | x |\n| --- | ---: |\n| a | 1 |\n| b | 2.5 |"
    )


def test_a_run_measures_time_and_memory_of_that_process_alone(tmp_path):
    # A process of its own, because the peak of a child begins at the size of its parent.
    code = """
import sys
from pathlib import Path
from benchmarks._process import run
large = run([sys.executable, "-c", "x = bytearray(200_000_000)"], Path(sys.argv[1]))
small = run([sys.executable, "-c", "import time; time.sleep(0.3)"], Path(sys.argv[1]))
assert large.peak > 200, large
assert small.peak < 100, small
assert small.wall > 0.3, small
assert "torch" not in sys.modules
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, check=True)


def test_a_failed_command_is_an_error_with_its_output(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        _process.run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path)
    assert "no such thing" in caught.value.output


def test_ratios_are_taken_to_the_first_row():
    runs = {"floor": [_process.Run(2.0, 4.0, 100.0)], "ours": [_process.Run(3.0, 4.4, 150.0)]}
    assert _process.rows(runs)[1] == ["ours", "3.00", "1.50", "4.40", "1.10", "150", "1.50"]


NEEDING = ["transformer_folds", "transformer_peers", "folder_families", "real_transformers",
           "observe_time"]  # fmt: skip


@pytest.mark.parametrize("name", NEEDING)
def test_a_benchmark_without_its_package_ends_with_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in [held for held in sys.modules if held.startswith("benchmarks.transformer")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert str(caught.value).endswith("needs transformers: pip install transformers")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        _optional.required("broken_package")


def test_one_structure_whatever_the_values_and_what_is_another():
    from benchmarks import federated
    from models.digits_resnet import load_digits_resnet

    model = load_digits_resnet().eval()
    x = torch.rand(4, 1, 8, 8)
    other = federated.drawn_anew(model)
    assert not torch.equal(other.conv1.weight, model.conv1.weight)
    server, client, frozen = (
        rewrite.convert(m, [spec], example_inputs=(given,), verify=False)
        for m, given, spec in (
            (model, x, "bn-to-gn"), (other, federated.moved(x), "bn-to-gn"),
            (other, x, "freeze-bn"),
        )
    )  # fmt: skip
    found = [federated.structure(result.model) for result in (server, client, frozen)]
    assert federated.difference(found[0], found[1]) == ""
    assert federated.difference(found[0], found[2]) != ""
    report = json.loads(server.report.to_json())
    state = dict(client.model.state_dict())
    assert float(federated.mapped(report, other, state)) == 0
    assert float(federated.mapped(report, model, state)) > 1e-3
    assert federated.apart(server.model, client.model, (x,)) > 1e-3
    client.model.load_state_dict(server.model.state_dict())
    assert federated.apart(server.model, client.model, (x,)) == 0


def test_floors_and_circles_of_imports() -> None:
    chain = {"a": {"b"}, "b": {"c"}, "c": set[str](), "d": set[str]()}
    assert (house.floors(chain), house.circles(chain)) == (3, [])
    round_ = {"a": {"b"}, "b": {"c", "a"}, "c": set[str]()}
    assert house.circles(round_) == [{"a", "b"}] and house.floors(round_) == 2


def test_the_house_counts_what_runs_and_not_what_types_see(tmp_path) -> None:
    for name, text in {
        "rewrite/__init__.py": "",
        "rewrite/one.py": "if TYPE_CHECKING:\n    import rewrite.two\n",
        "rewrite/two.py": "class A:\n    x = 1\n\n\ndef late():\n    from rewrite import one\n",
        "passes/__init__.py": "from rewrite.two import late\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    numbers = house.measured(tmp_path)
    assert numbers["floors of imports, by file"] == 3  # one, two, passes
    assert numbers["import circles between files"] == 0
    assert (numbers["files"], numbers["files in the largest folder"]) == (4, 2)


@pytest.mark.parametrize(
    ("row", "again"),
    [
        ({"status": "run", "fold": {"exit": 0}, "swap": {"exit": 3}}, False),
        ({"status": "run", "fold": {"exit": 0}, "swap": {"exit": 1, "error": "it"}}, True),
        ({"status": "timeout", "error": "more than 300 s"}, True),
        ({"status": "large", "parameters": 300}, True),
        ({"status": "large", "parameters": 301}, False),
        ({"status": "unbuildable", "error": "it"}, False),
    ],
)
def test_which_conversions_are_run_again(row: dict[str, object], again: bool) -> None:
    assert conversions.unanswered({"name": "timm:net", **row}, largest=300) == again
