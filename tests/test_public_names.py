"""The public face: which names there are, where they come from, and what importing them costs."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import rewrite
import rewrite.graph

PUBLIC = {
    "CaptureError",
    "Captured",
    "Change",
    "CheckpointError",
    "ContractError",
    "Contract",
    "ExportError",
    "Level",
    "OnnxVerification",
    "OptionError",
    "Pass",
    "PassError",
    "Recentering",
    "Recovered",
    "Report",
    "Result",
    "RewriteError",
    "Signal",
    "Site",
    "Skip",
    "Verification",
    "VerificationError",
    "capture",
    "convert",
    "convert_checkpoint",
    "export",
    "graph",
    "inspect_model",
    "load",
    "open_calibration",
    "parameter_groups",
    "path_norm",
    "recover",
    "save",
    "signal",
    "training",
    "verify",
    "verify_onnx",
}

FOR_PASS_AUTHORS = {
    "Activation",
    "Captured",
    "Conv",
    "Editable",
    "Editor",
    "Linear",
    "Norm",
    "Opaque",
    "Readers",
    "Region",
    "TensorRef",
    "activation_of",
    "conv_of",
    "linear_of",
    "norm_of",
}


def test_the_public_names_are_these() -> None:
    assert set(dir(rewrite)) == set(rewrite.__all__) == PUBLIC


def test_the_names_for_pass_authors_are_these() -> None:
    assert set(dir(rewrite.graph)) == set(rewrite.graph.__all__) == FOR_PASS_AUTHORS


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(rewrite, name) is not None


@pytest.mark.parametrize("name", sorted(FOR_PASS_AUTHORS))
def test_every_name_for_pass_authors_can_be_had(name: str) -> None:
    assert getattr(rewrite.graph, name) is not None


def test_no_module_shares_a_name_with_a_public_function() -> None:
    for name in PUBLIC:
        if not isinstance(getattr(rewrite, name), ModuleType):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"rewrite.{name}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = rewrite.nothing  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert rewrite.__version__ == version("rewrite")


def test_importing_rewrite_imports_no_torch() -> None:
    code = (
        "import sys, rewrite; assert 'torch' not in sys.modules; assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
