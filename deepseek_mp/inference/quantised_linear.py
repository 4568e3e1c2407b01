"""Linear layers of other kinds than the format's, in the place of a served copy's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.stored_layer import StoredLayer
from deepseek_mp.nn.places import owners, replaced

SMALLEST = 2**16
"""Weights of a layer that is worth it: with fewer, a call's time is not that of reading them."""


class QuantisedLinear(StoredLayer):
    """`nn.Linear` for inference, its weight in fewer bits.

    Its state is what `LinearKind.keep` gave, wherever it runs; in memory it is as the device's implementation reads it.

    Args:
        kept: what is kept of the weight, by name, as `LinearKind.keep` gives it.
        bias: that of the layer, or None.
        kind: one of `LINEAR_KINDS`.
        dtype: of the activations, bf16 or fp16.
        implementation: None: the device's fastest.
    """

    q: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        kept: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        kind: str,
        dtype: torch.dtype,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.dtype, self._kind = kind, dtype, KINDS[kind]
        self.out_features, self.in_features = self._kind.sizes(kept)
        fastest = partial(self._kind.fastest, kept["q"].device, dtype, self.out_features, self.in_features)
        self.implementation = implementation or fastest() or "reference"
        for name, tensor in self._kind.prepared(kept, self.implementation).items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """[N, K] in the dtype of the activations, made at every look: for code that asks a layer for its weight."""
        return self._kind.widened(self._kind.unprepared(self._prepared(), self.implementation)).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]; `ShapeError` for another last dimension."""
        if x.shape[-1:] != (self.in_features,):
            passed = f"an input of {list(x.shape)} for a linear layer of width {self.in_features}"
            raise ShapeError(explain(passed, f"[..., {self.in_features}]", "Pass what the original layer takes"))
        rows = x.reshape(-1, self.in_features)
        out = self._kind.linear(rows, self._prepared(), self.bias, self.implementation)
        return out.view(*x.shape[:-1], self.out_features)

    def channel_dims(self) -> Mapping[str, int]:
        """By buffer, along which dimension its channels are; empty if it is in an order that cannot be cut by them."""
        return self._kind.channel_dims(self.implementation)

    def portable(self) -> QuantisedLinear:
        """The same by the reference, with what it keeps in the form of all devices; it shares tensors where it can."""
        kept = self._kind.unprepared(self._prepared(), self.implementation)
        kept = {name: tensor.contiguous() for name, tensor in kept.items()}  # it may lie beside another layer's
        return QuantisedLinear(kept, self.bias, self.kind, self.dtype, "reference").eval()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, kind={self.kind}, implementation={self.implementation}"

    def _prepared(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        kept = self._kind.unprepared(self._prepared(), self.implementation)
        # What lies beside another layer's may be cut by columns, which few files can hold.
        destination.update({prefix + name: tensor.contiguous() for name, tensor in kept.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *how: Any) -> None:
        names = list(self._kind.unprepared(self._prepared(), self.implementation))
        if all(prefix + name in state_dict for name in names):
            kept = {name: state_dict[prefix + name].to(self.q.device) for name in names}
            prepared = self._kind.prepared(kept, self.implementation)
            state_dict = {name: part for name, part in state_dict.items() if name.removeprefix(prefix) not in names}
            state_dict.update({prefix + name: part for name, part in prepared.items()})
        super()._load_from_state_dict(state_dict, prefix, *how)


def linear_layers(model: nn.Module, kind: str) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers that can be of the kind, by name, and why the other linear layers stay as they are."""
    shared = owners(model)
    layers, left = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = _why_not(module, shared) or KINDS[kind].why_not(*module.weight.shape)
            if reason:
                left[name] = reason
            else:
                layers[name] = module
    return layers, left


def linear_kinds(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The kinds of which the device multiplies a layer of the model other than by the slow reference.

    FP8 only where the device has it: others would convert it in many steps.
    """
    has = capabilities(device).matmul_formats
    return [
        name
        for name, kind in KINDS.items()
        if (kind.needs is None or kind.needs in has)
        and any(kind.fastest(device, dtype, *sizes) for sizes in _sizes(linear_layers(model, name)[0]))
    ]


def quantised(model: nn.Module, kinds: Mapping[str, str] | str, dtype: torch.dtype) -> nn.Module:
    """The model with activations in `dtype`, changed in place: some of its linear layers are of other kinds.

    Their weights are rounded from the model's own; all that stays is cast.

    Args:
        model: with floating weights.
        kinds: one of `LINEAR_KINDS` for each layer by name, or one for all layers that it can take.
        dtype: bf16 or fp16.

    Returns:
        The model, or what takes its place where it is itself a linear layer.

    Raises:
        ConfigError: a kind for all that takes no layer, a name that is no layer it can take, or weights that are not
            finite.
    """
    chosen = _chosen(model, kinds)
    kept = {name: KINDS[kind].keep(layer.weight, f"weight of {name!r}") for name, (layer, kind) in chosen.items()}
    model = cast(model, dtype)
    made: dict[str, nn.Module] = {
        name: QuantisedLinear(kept[name], layer.bias, kind, dtype).eval() for name, (layer, kind) in chosen.items()
    }
    return replaced(model, made)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with all floating tensors in `dtype`, in place. `nn.Module.to` also makes complex ones real."""
    model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)  # noqa: SLF001
    return model


def _chosen(model: nn.Module, kinds: Mapping[str, str] | str) -> dict[str, tuple[nn.Linear, str]]:
    """The layers to be changed, with their kinds; see `quantised` for errors."""
    asked = {kinds} if isinstance(kinds, str) else set(kinds.values())
    found = {kind: linear_layers(model, kind) for kind in asked}
    named = dict.fromkeys(found[kinds][0], kinds) if isinstance(kinds, str) else kinds
    layers = {name: (found[kind][0][name], kind) for name, kind in named.items() if name in found[kind][0]}
    if layers and len(layers) == len(named):
        return layers
    left = {name: why for _, reasons in found.values() for name, why in reasons.items()}
    if not isinstance(kinds, str):
        left = {name: found[kind][1].get(name, "no linear layer") for name, kind in kinds.items() if name not in layers}
    reasons = "; ".join(f"{name or 'it'}: {why}" for name, why in left.items()) or "it has none"
    which = ", ".join(sorted(asked)) or "no kind"
    passed = f"a {type(model).__name__} without a linear layer for {which} ({reasons})"
    raise ConfigError(explain(passed, f"layers of {SMALLEST} weights or more", "Leave these as the format says"))


def _sizes(layers: Mapping[str, nn.Linear]) -> set[tuple[int, int]]:
    """Channels and widths."""
    return {(layer.out_features, layer.in_features) for layer in layers.values()}


def _why_not(layer: nn.Linear, shared: Counter[int]) -> str:
    """Why the layer's weight stays as it is; empty if it need not."""
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__} may use its weight in a way of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:  # noqa: SLF001
        return "it has hooks, which would be lost"
    if shared[id(layer.weight)] != 1:
        return "its weight is shared"
    if layer.weight.numel() < SMALLEST:
        return f"it has {layer.weight.numel()} weights, fewer than {SMALLEST}"
    return ""
