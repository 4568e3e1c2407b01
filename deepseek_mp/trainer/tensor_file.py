"""Named tensors in a safetensors file, written tensor by tensor and read back with layout and ties.

The file is 8 bytes of header length, a JSON header, and the bytes of the tensors. It is written here
rather than by the safetensors package because that package first copies every tensor of an
accelerator to the host; here one is copied at a time, and hashed on its way to the disk. Reading is
left to the package, which refuses a hostile header without allocating for it.

**Views.** Only the elements of a tensor are written, never the rest of a buffer it is a view of.

**Shared storage.** Of tensors that share memory, one that covers the others is stored, the first by
name if several do; the others are recorded in the header's metadata as `other name -> stored name`.
This is the convention of `safetensors.torch.save_model`, so `load_model` reads such a file into the
plain model. Views that overlap without one covering the other are stored separately.

**Layout.** What the format has no field for is returned by `write_tensors`, a dictionary per name:

    stride   the tensor was dense in another order (channels_last): its strides, in elements
    shape, stride, offset   an alias that is not the whole stored tensor: how it views it
    dtype    the format lacks this dtype: complex128 and complex32 are stored as pairs of real
             numbers in a last dimension of 2, float4_e2m1fn_x2 as bytes
"""

from __future__ import annotations

import ctypes
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_mp.errors import CheckpointError, explain
from deepseek_mp.records.durable import DurableFile

Layout = dict[str, dict[str, Any]]

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

STORED_AS: dict[torch.dtype, torch.dtype] = {
    torch.complex128: torch.float64,
    torch.complex32: torch.float16,
    torch.float4_e2m1fn_x2: torch.uint8,
}


def check_tensors(stem: str, tensors: Mapping[str, Tensor]) -> None:
    """`CheckpointError` naming the first tensor that cannot be stored; touches no disk."""
    for name, tensor in tensors.items():
        reason = _why_not(name, tensor)
        if reason:
            raise CheckpointError(
                explain(
                    f"{stem}[{name!r}] {reason}",
                    "dense tensors with data, with names that are UTF-8 text",
                    "Store a plain dense tensor under another name, or leave it out",
                )
            )


def write_tensors(file: DurableFile, tensors: Mapping[str, Tensor]) -> Layout:
    """Write all tensors to a new file, and return what is needed to read them back as they were.

    Any device, strides and sharing; one tensor at a time is copied to the host, and only if it has to
    be. Tensors must have passed `check_tensors`.
    """
    aliases, layout = _find_aliases(tensors)
    # Largest elements first keeps every tensor aligned to its element size, as readers that map it expect.
    stored = sorted(tensors.keys() - aliases.keys(), key=lambda name: (-_stored_dtype(tensors[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": aliases} if aliases else {}
    offset = 0
    for name in stored:
        header[name], offset = _header_entry(tensors[name], offset)
        layout[name] = _own_layout(tensors[name])
    head = json.dumps(header, ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for name in stored:
        _write_bytes(file, tensors[name])
    return {name: entry for name, entry in layout.items() if entry}


def read_tensors(path: Path, layout: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote, on `device`, in memory of their own.

    Raises whatever the safetensors package raises on a file that is not valid, and `ValueError`,
    `KeyError` or `TypeError` on a layout that does not fit the file.
    """
    with safe_open(path, framework="pt") as file:
        aliases = file.metadata() or {}
        names = file.keys()
        tensors = {name: _restore(file.get_tensor(name), layout.get(name, {}), device) for name in names}
    views = {alias: _view(tensors[stored], layout.get(alias)) for alias, stored in aliases.items()}
    return tensors | views


def _view(whole: Tensor, layout: Mapping[str, Any] | None) -> Tensor:
    """The stored tensor itself, or the part of its memory that the layout describes."""
    if layout is None:
        return whole
    shape, stride, offset = list(layout["shape"]), list(layout["stride"]), int(layout["offset"])
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if min([offset, *shape, *stride]) < 0 or offset + reach >= whole.numel():
        raise ValueError(f"view of shape {shape}, strides {stride} at {offset} leaves its {whole.numel()} elements")
    return whole.as_strided(shape, stride, offset)


def _why_not(name: str, tensor: Tensor) -> str | None:
    if not isinstance(name, str) or name == "__metadata__":
        return "has a name that the file format keeps for itself"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "has a name that is not valid Unicode"
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"is a {type(tensor).__name__}, which is made of other tensors"
    if tensor.layout != torch.strided:
        return f"is {tensor.layout}, not dense"
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        return "has a shape at most, but no data"
    if tensor.dtype not in CODES and tensor.dtype not in STORED_AS:
        return f"has dtype {tensor.dtype}, which no file format here can hold"
    return None


def _find_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], Layout]:
    """For each tensor that need not be stored: the name that covers it, and how it views that tensor."""
    groups: dict[tuple[torch.device, int, torch.dtype], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_conj() and not tensor.is_neg():
            groups[tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype].append(name)
    aliases: dict[str, str] = {}
    layout: Layout = {}
    for names in groups.values():
        if len(names) > 1:
            _find_aliases_of_one_storage({name: tensors[name] for name in names}, aliases, layout)
    return aliases, layout


def _find_aliases_of_one_storage(tensors: Mapping[str, Tensor], aliases: dict[str, str], layout: Layout) -> None:
    """One sweep from the start of the storage; the stored tensor that reaches furthest can cover what follows."""

    def order(name: str) -> tuple[int, int, bool, str]:
        start, end = _extent(tensors[name])
        return start, -end, not _is_dense(tensors[name]), name

    same: dict[tuple[Any, ...], str] = {}
    cover, cover_end = "", -1
    for name in sorted(tensors, key=order):
        tensor = tensors[name]
        start, end = _extent(tensor)
        geometry = (start, tensor.shape, tensor.stride())
        if geometry in same:
            aliases[name] = same[geometry]
        elif end <= cover_end:
            aliases[name] = cover
            offset = start - tensors[cover].storage_offset()
            layout[name] = {"shape": list(tensor.shape), "stride": list(tensor.stride()), "offset": offset}
        else:
            same[geometry] = name
            if _is_dense(tensor):
                cover, cover_end = name, end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First element and one past the last, counted in elements of the storage."""
    start = int(tensor.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + reach + 1


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their extent without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _own_layout(tensor: Tensor) -> dict[str, Any]:
    layout: dict[str, Any] = {}
    if not tensor.is_contiguous() and _is_dense(tensor):
        layout["stride"] = list(tensor.stride())
    if tensor.dtype in STORED_AS:
        layout["dtype"] = str(tensor.dtype).removeprefix("torch.")
    return layout


def _stored_dtype(tensor: Tensor) -> torch.dtype:
    return STORED_AS.get(tensor.dtype, tensor.dtype)


def _header_entry(tensor: Tensor, offset: int) -> tuple[dict[str, Any], int]:
    """The header's description of a tensor whose bytes start at `offset`, and where they end."""
    end = offset + tensor.numel() * tensor.element_size()
    shape = [*tensor.shape, 2] if tensor.dtype in STORED_AS and tensor.is_complex() else list(tensor.shape)
    code = CODES[_stored_dtype(tensor)]
    return {"dtype": code, "shape": shape, "data_offsets": [offset, end]}, end


def _write_bytes(file: DurableFile, tensor: Tensor) -> None:
    count = tensor.numel() * tensor.element_size()
    if count:
        plain = tensor.detach().resolve_conj().resolve_neg()
        host = (plain if plain.is_complex() else plain.view(_stored_dtype(plain))).cpu().contiguous()
        # The bytes in place: torch hands out memory only through numpy, which may not be installed.
        file.write(memoryview((ctypes.c_ubyte * count).from_address(host.data_ptr())))


def _restore(stored: Tensor, layout: Mapping[str, Any], device: torch.device) -> Tensor:
    """A tensor as it was, from the one in the file; the copy also ends its hold on the mapped file."""
    dtype = getattr(torch, layout["dtype"]) if "dtype" in layout else stored.dtype
    if dtype != stored.dtype and STORED_AS.get(dtype) != stored.dtype:
        raise ValueError(f"layout says that {dtype} is stored as {stored.dtype}")
    if dtype.is_complex and dtype != stored.dtype:
        stored = torch.view_as_complex(stored)
    strides = [int(stride) for stride in layout.get("stride", stored.stride())]
    if "stride" in layout and not _is_dense(torch.empty_strided(stored.shape, strides, device="meta")):
        raise ValueError(f"strides {strides} do not fit the shape {list(stored.shape)}")
    return torch.empty_strided(stored.shape, strides, dtype=stored.dtype, device=device).copy_(stored).view(dtype)
