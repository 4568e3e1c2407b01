"""From a module to an exported program and its signature, with sizes left free where the module bears it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from deepseek_mp.backends.exporting_flags import fp32_flags_left_alone
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.programs.conditions import named
from deepseek_mp.programs.exporter_error import reason
from deepseek_mp.programs.quiet import quiet
from deepseek_mp.programs.samples import with_samples
from deepseek_mp.programs.signature import Leaf, Signature, dtype_name, inputs, leaves_of, path_shown

Region = Callable[[], AbstractContextManager[Any]]
"""Makes a block of code of its own."""
JSON_VALUES = (str, int, float, bool, type(None))
"""Inputs other than tensors; they become part of the graph."""
EXPORTING = threading.RLock()
"""Held while PyTorch exports, writes or reads programs, replacing parts of itself, and while calls are compared."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A program, called with a tuple of positional and a dict of named arguments, and what these have to be."""

    program: ExportedProgram
    signature: Signature


def exported(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic: Sequence[int] = (0,),
    kept: Region = nullcontext,
) -> Exported:
    """The program of a module whose `forward` takes a tuple and a dict of arguments, traced with these.

    Its outputs for them are compared with the module's, bit for bit.

    Args:
        dynamic: dimensions, of all tensors whose size there is that of the first tensor, that may change later. Where
            the module does not bear it, all sizes are fixed, and the signature says why.
        kept: gives a region at whose end the module's state is as before; the module is called in several of them.

    Raises:
        ConfigError: the module cannot be exported, or computes something else as a graph; or dimensions that no tensor
            has.
    """
    given = inputs(args, kwargs)
    _check_values(*given)
    _check_dynamic(dynamic, given)
    with EXPORTING:
        return _compared(module, given, [dim for dim in dynamic if _size(given, dim) is not None], kept)


def _compared(module: nn.Module, given: tuple[Any, Any], free: list[int], kept: Region) -> Exported:
    """The program, once it gave what the module gives."""
    with kept():
        made = _free(module, given, free, kept) if free else _traced(module, given, ())
    _check_outputs(made.program)
    if not _same(module, made, given, kept):
        passed = f"a {module._get_name()} whose exported graph gives other outputs than itself"  # noqa: SLF001
        allowed = "a forward that does the same at every call, and when it is exported"
        change = (
            "Leave out what is random, and write to state in place instead of replacing it; of nn.TransformerEncoder "
            "turn off the fused path, which graphs do not have, "
            "before the model is served: torch.backends.mha.set_fastpath_enabled(False)"
        )
        raise ConfigError(explain(passed, allowed, change))
    return made


def _check_outputs(program: ExportedProgram) -> None:
    """`ConfigError` for none at all, which PyTorch cannot write, and for text, which it does not read again.

    So do PyTorch 2.11 and 2.13.
    """
    specs = [spec.arg for spec in program.graph_signature.output_specs]
    if not specs:
        passed, change = "a forward without outputs", "Let it return a tensor"
        raise ConfigError(explain(passed, "tensors, numbers and None", change))
    values = [spec.value for spec in specs if isinstance(spec, ConstantArgument)]
    if text := next((value for value in values if isinstance(value, str)), None):
        change = "Let the forward leave it out, and add it to what the program gives"
        raise ConfigError(explain(f"outputs with the text {text!r}", "tensors, numbers and None", change))


def _same(module: nn.Module, made: Exported, given: tuple[Any, Any], kept: Region) -> bool:
    """Whether the graph gives what the module gives, both from the state of now, and once more from what that left."""
    outputs = []
    for call in (module, made.program.module(check_guards=False)):
        with torch.no_grad(), kept():
            own = _copies(given)  # a forward may write to them
            outputs.append([_copies(call(*own)) for _ in range(2)])  # they may be state
    return bits_equal(*outputs)


def _copies(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, tree)


def bits_equal(found: Any, expected: Any) -> bool:
    """Whether all tensors have the same values, NaNs in the same places, and all else is equal."""
    try:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    except (AssertionError, TypeError):
        return False
    return True


def _free(module: nn.Module, given: tuple[Any, Any], free: list[int], kept: Region) -> Exported:
    """With free sizes, or fixed ones where that fails."""
    larger = _resized(given, free, 2, only=1)  # the exporter takes a size of 1 for one that never changes
    try:
        made = _traced(module, larger, free)
        if not made.signature.is_free:
            raise ConfigError("the model's code needs the size that it was exported with")
        made = replace(made, signature=_from_one(module, made, given, free, kept))
        made.signature.check(*given)
    except ConfigError as error:
        fixed = _traced(module, given, ())
        because = f"Its sizes are fixed: {error}"
        return replace(fixed, signature=replace(fixed.signature, fixed_because=because[:400]))
    return made


def _from_one(
    module: nn.Module,
    made: Exported,
    given: tuple[Any, Any],
    free: list[int],
    kept: Region,
) -> Signature:
    """The signature with sizes from 1, if the graph gives what the module gives there."""
    one, signature = _resized(given, free, 1), made.signature.with_least(1)
    try:
        signature.check(*one)
        same = _same(module, made, one, kept)
    except (RuntimeError, ValueError, IndexError):  # a refusal, or operations that do not take a size of 1
        same = False
    return signature if same else made.signature


def _traced(module: nn.Module, given: tuple[Any, Any], free: Sequence[int]) -> Exported:
    shapes = pytree.tree_map(lambda leaf: _dims(leaf, given, free), given)
    try:
        with torch.no_grad(), fp32_flags_left_alone(), quiet("torch.fx"):  # the exporter, about itself
            program = torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
        return Exported(program=program, signature=signature_of(program, list(leaves_of(*given))))
    except ConfigError:
        raise
    except Exception as error:  # the exporter raises whatever the model's code makes it raise
        passed = f"a {module._get_name()} that torch.export cannot export ({reason(error)})"  # noqa: SLF001
        change = "Rewrite what it names, or save the part of the model that can be exported"
        raise ConfigError(explain(passed, "a forward without decisions by values", change)) from error


def signature_of(program: ExportedProgram, paths: Sequence[str], *, strict: bool = True) -> Signature:
    """Of a program's own inputs, with what the exporter assumed of their sizes.

    Args:
        program: as it was exported: a file does not hold what was assumed.
        paths: where each of the inputs is, in order, as the exporter names it.
        strict: False: what was assumed of anything but sizes is left out.

    Raises:
        ValueError: where `strict`, it was assumed of something else.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    specs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    leaves = []
    for where, spec in zip(paths, specs, strict=True):
        if isinstance(spec, ConstantArgument):
            leaves.append(Leaf(where=where, value=spec.value))
        else:
            value = nodes[spec.name].meta["val"]
            shape = tuple(_size_of(size) for size in value.shape)
            leaves.append(Leaf(where=where, dtype=dtype_name(value.dtype), shape=shape))
    names = {size for leaf in leaves for size in leaf.shape if isinstance(size, str)}
    guards = program._guards_code if names else []  # noqa: SLF001 - nothing public says what was assumed
    return Signature(
        leaves=tuple(leaves),
        ranges={
            str(symbol): _ends(found) for symbol, found in program.range_constraints.items() if str(symbol) in names
        },
        conditions=tuple(dict.fromkeys(_conditions(guards, paths, strict))),
    )


def _size_of(size: Any) -> int | str:
    """A number, also of a size that was to be free and that the model's code needs; or the name of a free one."""
    return str(size) if isinstance(size, torch.SymInt) and not size.node.expr.is_number else int(size)


def _conditions(guards: Sequence[str], paths: Sequence[str], strict: bool) -> Iterator[str]:
    places = {path: index for index, path in enumerate(paths)}
    for guard in guards:
        try:
            yield named(guard, places)
        except ValueError:
            if strict:
                raise


def _ends(found: Any) -> tuple[int, int | None]:
    return int(found.lower), int(found.upper) if found.upper.is_Integer else None


def _dims(leaf: Any, given: tuple[Any, Any], free: Sequence[int]) -> Any:
    if not isinstance(leaf, Tensor):
        return None
    return {dim: Dim.AUTO for dim in free if leaf.dim() > dim and leaf.shape[dim] == _size(given, dim)} or None


def _size(given: tuple[Any, Any], dim: int) -> int | None:
    """That of the first tensor which has the dimension."""
    return next((leaf.shape[dim] for leaf in _tensors(given) if leaf.dim() > dim), None)


def _resized(given: tuple[Any, Any], free: list[int], size: int, *, only: int | None = None) -> tuple[Any, Any]:
    """The inputs with so many samples in the free dimensions (see `with_samples`); `only` those with so many."""
    for dim in free:
        now = _size(given, dim)
        if now and (only is None or now == only):
            given = pytree.tree_map(lambda leaf, dim=dim, now=now: _taken(leaf, dim, now, size), given)
    return given


def _taken(leaf: Any, dim: int, now: int, size: int) -> Any:
    if not (isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == now):
        return leaf
    return with_samples(leaf, dim, size)


def _tensors(given: tuple[Any, Any]) -> Iterator[Tensor]:
    yield from (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))


def _check_dynamic(dynamic: Any, given: tuple[Any, Any]) -> None:
    """`ConfigError` for what names no dimension: sizes would be fixed, and nothing would say so."""
    passed, change = f"dynamic={dynamic!r}", "Pass (0,) for the first one alone, or () for none"
    if not isinstance(dynamic, Sequence) or not all(type(dim) is int and dim >= 0 for dim in dynamic):
        raise ConfigError(explain(passed, "a tuple of dimensions, whole numbers from 0", change))
    most = max((tensor.dim() for tensor in _tensors(given)), default=0)
    if max(dynamic, default=0) > max(0, most - 1):  # the first may be named for inputs that have none
        passed += f" for inputs of up to {most} dimensions"
        raise ConfigError(explain(passed, f"dimensions from 0 to {max(0, most - 1)}", change))


def _check_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not leaves_of(args, kwargs):  # which PyTorch does not export
        passed, change = "a call without inputs", "Let the forward take a tensor"
        raise ConfigError(explain(passed, "one input or more", change))
    for where, leaf in leaves_of(args, kwargs).items():
        if not isinstance(leaf, Tensor) and type(leaf) not in JSON_VALUES:
            passed = f"an input {path_shown(where)} of type {type(leaf).__name__}"
            raise ConfigError(explain(passed, "tensors, numbers, text and None", "Pass it as one of these"))
