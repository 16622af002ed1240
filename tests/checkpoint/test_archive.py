"""Archives: members of a zip file, each under one name."""

from __future__ import annotations

import zipfile

import pytest
import torch

from rewrite.checkpoint.load import load
from tests.checkpoint.files import in_eval, refused_at_once, rewritten, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_zipped_again_opens_with_its_weights(tmp_path, kind):
    torch.save(in_eval(), tmp_path / "m.pt")
    assert same(
        load(rewritten(tmp_path / "m.pt", tmp_path / "again.pt", compression=kind)), in_eval()
    )


def test_a_folder_zipped_again_opens(tmp_path):
    torch.save(in_eval(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "n.pt", "w") as new:
        new.writestr("folder/", "")
        for name in old.namelist():
            new.writestr("folder/" + name.partition("/")[2], old.read(name))
    assert same(load(tmp_path / "n.pt"), in_eval())


@pytest.mark.parametrize("spelling", ["archive/data.pkl", "archive/DATA.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path, spelling):
    torch.save(in_eval(), tmp_path / "m.pt")
    root = zipfile.ZipFile(tmp_path / "m.pt").namelist()[0].partition("/")[0]
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr(spelling.replace("archive", root), b"x")
    refused_at_once(tmp_path / "m.pt", "two members")
