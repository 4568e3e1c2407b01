"""Weights of linear layers in fewer bits, laid beside each other in memory where layers may read the same input.

Compiled code joins such layers to one product (`nn.graph_linear`), which reads their weights as one. Which layers do
read the same input is seen there; here those are laid together that could: layers of one parent, of one kind and width,
all with a bias or all without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.export import ExportedProgram

from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.nn.graph_products import same_input
from deepseek_mp.ops.adjacent import laid_out, together

_CHANNELS = 16
"""Channels are a multiple of it, so that every part starts at whole 16 bytes, as kernels want it."""


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


def lay_program_beside(program: ExportedProgram) -> None:
    """The same in a program from a file, on its device, whose graph says which layers do read the same input."""
    signature, state = program.graph_signature, program.state_dict
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    done: set[str] = set()
    for group in same_input(program.graph):
        for part, dim in group[0].parts.items():
            stored = [names.get(product.given[part].name, "") for product in group]
            if len(set(stored)) < 2 or not state.keys() >= set(stored) or done & set(stored):
                continue
            done.update(stored)
            tensors = [state[name] for name in stored]
            if together(tensors, dim) is None and not any(tensor.shape[dim] % _CHANNELS for tensor in tensors):
                for tensor, own in zip(tensors, laid_out(tensors, dim), strict=True):
                    tensor.data = own


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
    if biases and together(biases, 0) is None:
        for bias, part in zip(biases, laid_out(biases, 0), strict=True):
            bias.data = part
