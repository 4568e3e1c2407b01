"""Tensors come back from a file bit by bit, with their dtype, strides and sharing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from deepseek_mp.errors import CheckpointError
from deepseek_mp.records.durable import DurableFile
from deepseek_mp.trainer.tensor_file import CODES, STORED_AS, Layout, check_tensors, read_tensors, write_tensors

CPU = torch.device("cpu")
DTYPES = [*CODES, *STORED_AS]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def save(path: Path, tensors: Mapping[str, Tensor]) -> Layout:
    check_tensors("model", tensors)
    with DurableFile(path) as file:
        layout = write_tensors(file, tensors)
        file.finish()
    assert file.size == path.stat().st_size
    return json.loads(json.dumps(layout))


def there_and_back(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return read_tensors(path, save(path, tensors), CPU)


def bits(tensor: Tensor) -> bytes:
    """The bytes of the elements in logical order."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    plain = plain if plain.dtype != torch.float4_e2m1fn_x2 else plain.view(torch.uint8)
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert bits(found) == bits(expected)


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_bits(dtype, 7, 64)  # NaN with payloads, subnormals and negative zeros among them
    assert_same(there_and_back(tmp_path / "x", {"x": tensor})["x"], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalars_and_empty_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"scalar": random_bits(dtype, 1)[0], "empty": random_bits(dtype, 3, 0, 2), "one": random_bits(dtype, 1)}
    found = there_and_back(tmp_path / "x", tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


@pytest.mark.parametrize("dtype", [dtype for dtype in CODES if dtype != torch.float8_e8m0fnu], ids=str)
def test_the_safetensors_package_reads_the_same_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_bits(dtype, 3, 5)
    save(tmp_path / "x", {"x": tensor, "y": tensor[0, 0]})
    assert_same(safetensors.torch.load_file(tmp_path / "x")["x"], tensor)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    assert there_and_back(tmp_path / "x", {}) == {}


def test_tensors_do_not_depend_on_the_file_once_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    found = there_and_back(path, {"x": torch.arange(5000.0)})["x"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(found, torch.arange(5000.0))


def test_a_view_costs_its_own_bytes_and_no_more(tmp_path: Path) -> None:
    flat = torch.arange(1_000_000.0)
    found = there_and_back(tmp_path / "x", {"part": flat[500:510]})
    assert (tmp_path / "x").stat().st_size < 300
    assert_same(found["part"], flat[500:510])
    assert found["part"].untyped_storage().nbytes() == 40


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(24.0).to(torch.complex128).reshape(4, 6).t(),
        torch.arange(24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(4, 6).t(),
    ],
    ids=["channels_last", "transposed", "complex", "fp4"],
)
def test_strides_of_dense_tensors_come_back(tmp_path: Path, tensor: Tensor) -> None:
    found = there_and_back(tmp_path / "x", {"x": tensor})["x"]
    assert found.stride() == tensor.stride()
    assert_same(found, tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(20.0).reshape(4, 5)[:, :3],
        torch.arange(20.0)[::3],
        torch.ones(1).expand(7),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        nn.Parameter(torch.ones(3)),
    ],
    ids=["columns", "steps", "expanded", "conjugate", "negative", "parameter"],
)
def test_values_of_other_views_come_back(tmp_path: Path, tensor: Tensor) -> None:
    assert_same(there_and_back(tmp_path / "x", {"x": tensor})["x"], tensor)


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    found = there_and_back(tmp_path / "x", {"head": weight, "embedding": weight, "other": torch.ones(2)})
    assert (tmp_path / "x").stat().st_size < 41_000
    assert shares(found["head"], found["embedding"])
    assert not shares(found["head"], found["other"])
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"head": "embedding"}


def test_tied_views_that_do_not_fill_their_buffer_are_tied_again(tmp_path: Path) -> None:
    flat, wide = torch.arange(100.0), torch.arange(100.0).reshape(10, 10)
    tensors = {"a": flat[10:20], "b": flat[10:20], "c": wide[:, :5], "d": wide[:, :5], "e": flat[20:30]}
    found = there_and_back(tmp_path / "x", tensors)
    assert shares(found["a"], found["b"])
    assert shares(found["c"], found["d"])
    assert not shares(found["a"], found["e"])
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


@pytest.mark.parametrize("turned", [False, True])
def test_parts_and_turns_of_a_stored_tensor_are_views_of_it_again(tmp_path: Path, turned: bool) -> None:
    whole = torch.arange(30.0).reshape(5, 6)
    whole = whole.t() if turned else whole
    tensors = {"whole": whole, "row": whole[2], "corner": whole[1:3, 2:4], "turned": whole.t(), "first": whole[:1]}
    found = there_and_back(tmp_path / "x", tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
        assert found[name].stride() == tensor.stride()
    found["whole"].add_(100)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor + 100)


def test_views_that_overlap_in_part_are_stored_separately(tmp_path: Path) -> None:
    flat = torch.arange(30.0)
    tensors = {"a": flat[:20], "b": flat[10:]}
    found = there_and_back(tmp_path / "x", tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


def test_a_tensor_with_gaps_does_not_cover_what_lies_in_them(tmp_path: Path) -> None:
    wide = torch.arange(100.0).reshape(10, 10)
    tensors = {"columns": wide[:, :5], "between": wide[2, 5:8]}
    found = there_and_back(tmp_path / "x", tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


def test_a_tensor_and_its_conjugate_are_stored_separately(tmp_path: Path) -> None:
    tensor = torch.randn(4, dtype=torch.complex64)
    tensors = {"a": tensor, "b": tensor.conj(), "c": tensor.conj().imag, "d": tensor.imag}
    found = there_and_back(tmp_path / "x", tensors)
    for name, expected in tensors.items():
        assert_same(found[name], expected)


def test_the_same_memory_in_two_dtypes_is_stored_twice(tmp_path: Path) -> None:
    tensor = torch.randn(8)
    found = there_and_back(tmp_path / "x", {"float": tensor, "int": tensor.view(torch.int32)})
    assert_same(found["int"], tensor.view(torch.int32))


class Tied(nn.Module):
    """Embedding and head share a weight; one buffer is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("table", torch.randn(6, 2))
        self.register_buffer("table_head", self.table[:2])


def test_load_model_of_safetensors_reads_it_into_the_plain_model(tmp_path: Path) -> None:
    trained, fresh = Tied(), Tied()
    save(tmp_path / "model.safetensors", trained.state_dict())
    safetensors.torch.load_model(fresh, tmp_path / "model.safetensors")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_the_file_has_the_names_and_aliases_that_save_model_gives_it(tmp_path: Path) -> None:
    model = Tied()
    save(tmp_path / "ours", model.state_dict())
    safetensors.torch.save_model(model, str(tmp_path / "theirs"))
    with safe_open(tmp_path / "ours", "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        assert ours.metadata() == theirs.metadata()


def test_ties_of_thousands_of_views_are_found_in_one_sweep(tmp_path: Path) -> None:
    flat = torch.arange(20_000.0)
    tensors = {str(i): flat[i : i + 1] for i in range(20_000)}
    found = there_and_back(tmp_path / "x", tensors | {"all": flat})
    assert (tmp_path / "x").stat().st_size < 800_000 + 80_000
    assert all(shares(found["all"], tensor) for tensor in found.values())


@settings(max_examples=40)
@given(names=st.sets(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_names_of_any_characters(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    names -= {"__metadata__"}
    tensors = {name: torch.tensor(float(index)) for index, name in enumerate(sorted(names))}
    tied = tensors | {name + "'": tensor for name, tensor in tensors.items()}
    found = there_and_back(tmp_path_factory.mktemp("names") / "x", tied)
    assert {name: tensor.item() for name, tensor in found.items()} == {n: t.item() for n, t in tied.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2), "w": torch.eye(3).to_sparse()}, r"model\['w'\] is torch.sparse_coo, not dense"),
        ({"w": torch.empty(2, device="meta")}, r"model\['w'\] has a shape at most, but no data"),
        ({"w": nn.LazyLinear(2).weight}, r"model\['w'\] has a shape at most, but no data"),
        ({"w": torch.zeros(4, dtype=torch.uint8).view(torch.bits8)}, r"model\['w'\] has dtype torch.bits8"),
        ({"w": 3.0}, r"model\['w'\] is a float, not a tensor"),
        ({"__metadata__": torch.ones(1)}, "name that the file format keeps for itself"),
        ({"\ud800": torch.ones(1)}, "name that is not valid Unicode"),
    ],
)
def test_what_cannot_be_stored_is_named(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_tensors("model", tensors)


class Wrapper(Tensor):
    """What torch's own wrappers (DTensor, NestedTensor) have in common."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


def test_a_tensor_made_of_other_tensors_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\['w'\] is a Wrapper, which is made of other tensors"):
        check_tensors("model", {"w": torch.ones(2).as_subclass(Wrapper)})


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        ({"x": {"stride": [1 << 40, 1]}}, ValueError),
        ({"x": {"stride": [0, 0]}}, ValueError),
        ({"x": {"dtype": "bfloat16"}}, ValueError),
        ({"x": {"dtype": "save"}}, ValueError),
        ({"x": {"stride": [1]}}, RuntimeError),
        ({"y": {"shape": [1 << 40], "stride": [1], "offset": 0}}, ValueError),
        ({"y": {"shape": [2], "stride": [1], "offset": 5}}, ValueError),
        ({"y": {"shape": [2], "stride": [-1], "offset": 5}}, ValueError),
        ({"y": {"shape": [2], "stride": [1, 1], "offset": 0}}, ValueError),
        ({"y": {"shape": "ab", "stride": [1, 1], "offset": 0}}, TypeError),
        ({"y": {"shape": [4]}}, KeyError),
    ],
)
def test_a_hostile_layout_allocates_nothing(tmp_path: Path, layout: Layout, error: type[Exception]) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    save(tmp_path / "x", {"x": tensor, "y": tensor})
    with pytest.raises(error, match=r".+"):
        read_tensors(tmp_path / "x", layout, CPU)
