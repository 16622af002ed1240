import pytest
import torch

from rewrite.checkpoint import mapped
from rewrite.checkpoint.mapped import MappedFile


@pytest.fixture
def path(tmp_path):
    values = {"a": torch.randn(3000), "b": torch.arange(70000), "c": torch.randn(7).half()}
    torch.save(values, tmp_path / "tensors.pt")
    return tmp_path / "tensors.pt"


def loaded(path):
    return torch.load(path, mmap=True)


def test_reads_the_very_bytes_into_memory_that_can_be_shared(path):
    for tensor in loaded(path).values():
        storage = tensor.untyped_storage()
        own = MappedFile(path).read(storage)
        assert own.resizable()
        assert not storage.resizable()
        assert own.tolist() == storage.tolist()
        assert own.data_ptr() != storage.data_ptr()


def test_reads_the_file_and_not_the_mapping(path):
    """The bytes come from the file: the pages of the mapping stay untouched."""
    tensors = loaded(path)
    file = MappedFile(path)
    storage = tensors["b"].untyped_storage()
    places = [mapping.place(storage) for mapping in file._mappings]
    assert len(places) == 1
    with path.open("rb") as stream:
        stream.seek(places[0])
        assert list(stream.read(storage.nbytes())) == storage.tolist()


def test_a_mapping_that_was_written_to_is_not_the_file_any_more(path):
    tensors = loaded(path)
    tensors["a"][5] = 99.0
    own = MappedFile(path).read(tensors["a"].untyped_storage())
    copy = torch.empty(0).set_(own, 0, (3000,))
    assert copy[5] == 99.0
    assert torch.equal(copy, tensors["a"])


def test_memory_of_another_origin_is_copied(path):
    tensors = loaded(path)
    other = torch.randn(10).numpy()
    own = MappedFile(path).read(torch.from_numpy(other).untyped_storage())
    assert torch.equal(torch.empty(0).set_(own, 0, (10,)), torch.from_numpy(other))
    assert tensors["a"].shape == (3000,)


def test_without_a_list_of_mappings_everything_is_copied(path, monkeypatch, tmp_path):
    monkeypatch.setattr(mapped, "_SMAPS", tmp_path / "nothing")
    storage = loaded(path)["b"].untyped_storage()
    assert MappedFile(path).read(storage).tolist() == storage.tolist()


def test_another_file_of_the_same_size_is_not_read(path, tmp_path):
    twin = tmp_path / "twin.pt"
    twin.write_bytes(bytes(path.stat().st_size))
    storage = loaded(path)["b"].untyped_storage()
    assert MappedFile(twin).read(storage).tolist() == storage.tolist()
