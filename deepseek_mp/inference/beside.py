"""Weights of linear layers in fewer bits, laid beside each other in memory where layers may read the same input.

Compiled code joins such layers to one product (`nn.graph_linear`), which reads their weights as one. Which layers do
read the same input is seen there; here those are laid together that could: layers of one parent, of one kind and width,
all with a bias or all without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.export import ExportedProgram

from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.nn.graph_products import same_input
from deepseek_mp.ops.adjacent import laid_out, together

_CHANNELS = 16
"""Channels are a multiple of it, so that every part starts at whole 16 bytes, as kernels want it."""


@dataclass(frozen=True)
class Group:
    """Tensors of a state that belong beside each other, by name, and along which dimension."""

    names: tuple[str, ...]
    dim: int


def lay_beside(model: nn.Module) -> None:
    """Move the weights in place: values, shapes and names stay, and so do the parameters as objects.

    Only what does not lie so yet is moved. What holds pointers to it, as recorded calls do, has to be made after this.
    """
    done: set[int] = set()
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):  # where each reads what the one before gave
            continue
        found: dict[object, list[QuantisedLinear]] = {}
        for layer in _layers(parent):
            if id(layer) not in done and layer.out_features % _CHANNELS == 0:
                done.add(id(layer))
                found.setdefault(_what(layer), []).append(layer)
        for group in found.values():
            if len(group) > 1 and group[0].channel_dims():
                _lay(group)


def lie_beside(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether the weights of the named layers of fewer bits lie beside each other, in this order."""
    layers = [model.get_submodule(name) for name in names]
    assert isinstance(layers[0], QuantisedLinear)
    dims = {**layers[0].channel_dims(), **({} if layers[0].bias is None else {"bias": 0})}
    return all(together([getattr(layer, name) for layer in layers], dim) is not None for name, dim in dims.items())


def lay_program_beside(program: ExportedProgram) -> tuple[Group, ...]:
    """The same in a program from a file, on its device, whose graph says which layers do read the same input.

    Returns:
        What belongs beside each other in its state, for `lay_named_beside` when it was moved.
    """
    groups = tuple(_groups(program))
    lay_named_beside(program.state_dict, groups)
    return groups


def lay_named_beside(state: Mapping[str, Tensor], groups: Iterable[Group]) -> None:
    """Move tensors of a state that belong beside each other and do not lie so; the objects stay."""
    for group in groups:
        tensors = [state[name] for name in group.names]
        if together(tensors, group.dim) is None:
            for tensor, own in zip(tensors, laid_out(tensors, group.dim), strict=True):
                tensor.data = own


def _groups(program: ExportedProgram) -> Iterator[Group]:
    signature, state = program.graph_signature, program.state_dict
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    done: set[str] = set()
    for products in same_input(program.graph):
        for part, dim in products[0].parts.items():
            # A layer that is called twice is there once.
            stored = tuple(dict.fromkeys(names.get(product.given[part].name, "") for product in products))
            if len(stored) < 2 or not state.keys() >= set(stored) or done & set(stored):
                continue
            done.update(stored)
            if not any(state[name].shape[dim] % _CHANNELS for name in stored):
                yield Group(stored, dim)


def _layers(parent: nn.Module) -> Iterator[QuantisedLinear]:
    return (child for child in parent.children() if isinstance(child, QuantisedLinear))


def _what(layer: QuantisedLinear) -> object:
    """What layers have to have in common."""
    bias = None if layer.bias is None else layer.bias.dtype
    return layer.kind, layer.implementation, layer.in_features, layer.dtype, layer.q.device, bias


def _lay(group: list[QuantisedLinear]) -> None:
    for name, dim in group[0].channel_dims().items():
        parts = [getattr(layer, name) for layer in group]
        if together(parts, dim) is None:
            for layer, part in zip(group, laid_out(parts, dim), strict=True):
                setattr(layer, name, part)
    biases = [layer.bias for layer in group if layer.bias is not None]
    shared = len({id(bias) for bias in biases}) < len(biases)  # it cannot lie in two places
    if biases and not shared and together(biases, 0) is None:
        for bias, part in zip(biases, laid_out(biases, 0), strict=True):
            bias.data = part
