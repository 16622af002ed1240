"""A tensor times a vector: the bits of float64, whatever arithmetic was enough for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rewrite.weights.scaling import BLOCK, Scaling, blocks

LOW = (torch.bfloat16, torch.float16)


def every(dtype: torch.dtype) -> Tensor:
    """Return each of the 65536 numbers of a type of 16 bits: not finite and subnormal ones, too."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bits, but for which NaN a NaN is."""
    assert a.dtype == b.dtype and a.shape == b.shape
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


def in_float64(tensor: Tensor, vector: Tensor) -> Tensor:
    return (tensor.double() * vector).to(tensor.dtype)


EDGES = [
    0.0, -0.0, 1.0, -1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-133, 2.0**-126, 2.0**-133, 2.0**-149,
    1.5 * 2.0**-140, 2.0**127, 1.9921875 * 2.0**127, 2.0**-24, 2.0**-14, 65504.0, 1e-5, 1e4,
    math.inf,
]  # fmt: skip


def vectors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return vectors of float64 whose numbers need as many bits as a name says."""
    drawn = torch.randn(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spread = drawn * 10.0 ** torch.arange(-24, 24, 2)
    held = torch.cat([torch.tensor(EDGES, dtype=torch.float64), drawn, spread])
    own = held.to(dtype).double()
    return {
        "own": own[own.isfinite()],
        "one plus own": 1.0 + drawn.to(dtype).double(),
        "float32": held.float().double(),
        "float64": held,
    }


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["own", "one plus own", "float32", "float64"])
def test_every_number_of_a_type_is_multiplied_as_in_float64(dtype: torch.dtype, kind: str) -> None:
    numbers, vector = every(dtype), vectors(dtype)[kind]
    tensor = numbers[:, None].expand(-1, len(vector)).contiguous()
    assert same_bits(Scaling(vector, 1)(tensor, dtype), in_float64(tensor, vector))
    turned = tensor.T.contiguous()
    assert same_bits(Scaling(vector, 0)(turned, dtype), in_float64(turned, vector[:, None]))


def test_float32_is_multiplied_as_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (4096, 64), generator=generator)
    tensor = bits.to(torch.int32).view(torch.float32)
    vector = torch.randint(-(1 << 31), 1 << 31, (64,), generator=generator).to(torch.int32)
    scale = vector.view(torch.float32).nan_to_num(1.5, 2.0, -2.0).double()
    assert Scaling(scale, 1).between(tensor.dtype, tensor.dtype).vector.dtype is torch.float32
    assert same_bits(Scaling(scale, 1)(tensor, torch.float32), in_float64(tensor, scale))


@pytest.mark.parametrize("dtype", LOW)
def test_the_arithmetic_is_the_narrowest_that_is_enough(dtype: torch.dtype) -> None:
    held = vectors(dtype)
    found = {
        kind: Scaling(vector, 0).between(dtype, dtype).vector.dtype for kind, vector in held.items()
    }
    assert found == {
        "own": dtype, "one plus own": torch.float32, "float32": torch.float32,
        "float64": torch.float64,
    }  # fmt: skip
    wide = Scaling(held["own"], 0)
    assert wide.between(torch.float64, dtype).vector.dtype is torch.float64
    assert wide.between(dtype, torch.float64).vector.dtype is torch.float64


def test_less_arithmetic_than_that_is_wrong() -> None:
    """A vector that `between` does not narrow gives other bits where it is narrowed."""
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(2000, 64, generator=generator)
    vector = torch.randn(64, generator=generator, dtype=torch.float64)
    new = torch.empty_like(tensor)
    Scaling(vector.float(), 1).fill(new, tensor, [(0, 2000), (0, 64)])
    assert not same_bits(new, in_float64(tensor, vector))
    rounded = tensor.to(torch.bfloat16)
    low = torch.empty_like(rounded)
    Scaling(vector.to(torch.bfloat16), 1).fill(low, rounded, [(0, 2000), (0, 64)])
    assert not same_bits(low, in_float64(rounded, vector.float().double()))


@pytest.mark.parametrize("dtype", LOW)
def test_products_of_two_numbers_of_a_type_are_exact_in_float32_where_normal(
    dtype: torch.dtype,
) -> None:
    numbers, vector = every(dtype).double(), vectors(dtype)["own"]
    product = numbers[:, None] * vector
    normal = (product.abs() >= 2.0**-126) & (product.abs() < 2.0**128)
    assert torch.equal(product.float().double()[normal], product[normal])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "parts", [(), ((0, 1, 2),), ((1, 100, 57), (2, 3, 90)), ((0, 2, 1), (1, 0, 9))]
)
def test_a_part_is_multiplied_and_the_rest_is_what_it_was(
    axis: int, parts: tuple[tuple[int, int, int], ...]
) -> None:
    parts = tuple(part for part in parts if part[0] != axis)
    tensor = torch.randn(3, 211, 97, generator=torch.Generator().manual_seed(0)).bfloat16()
    vector = torch.randn(tensor.shape[axis], dtype=torch.float64)
    expected = tensor.double()
    inside = expected
    for part in parts:
        inside = inside.narrow(*part)
    inside *= vector.reshape([-1 if a == axis else 1 for a in range(3)])
    got = Scaling(vector, axis, parts)(tensor, torch.float64)
    assert got.dtype is torch.float64 and torch.equal(got, expected)
    assert torch.equal(Scaling(vector, axis, parts)(tensor, tensor.dtype), expected.bfloat16())


def test_a_transposed_tensor_keeps_its_strides() -> None:
    tensor = torch.randn(300, 200).T
    got = Scaling(torch.rand(300).double(), 1)(tensor, torch.float32)
    assert got.stride() == tensor.stride() and got.shape == tensor.shape


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (5, 0), (7,), (BLOCK + 3,), (4, BLOCK + 1), (3, 5, 7), (2, 300, 300), (70000, 2)],
)
def test_blocks_cover_a_tensor_once_each_in_one_piece(shape: tuple[int, ...]) -> None:
    places = torch.arange(math.prod(shape)).reshape(shape)
    seen: list[int] = []
    for at in blocks(shape, BLOCK):
        part = places[tuple(slice(begin, begin + length) for begin, length in at)].reshape(-1)
        assert len(part) <= BLOCK
        seen += part.tolist()
    assert seen == list(range(math.prod(shape)))
