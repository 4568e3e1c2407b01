"""Linear layers of other kinds than the format's, in the place of a served copy's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.form import LINEAR_KINDS
from deepseek_mp.ops.weight_only import fastest, quantised_weight, weight_only_linear

SMALLEST = 2**16
"""Weights of a layer that is worth it: with fewer, a call's time is not that of reading them."""
_FORMATS: Mapping[str, str] = MappingProxyType({"int8_weights": "int8", "fp8_weights": "fp8"})
"""By kind: how a weight is kept, one of `ops.weight_only.FORMATS`."""


class QuantisedLinear(nn.Module):
    """`nn.Linear` for inference, its weight in fewer bits with a scale for each output channel.

    Args:
        kept: what is kept of the weight, by name, as `kept_weight` gives it; buffers.
        bias: that of the layer, or None.
        kind: one of `LINEAR_KINDS`.
        dtype: of the activations, bf16 or fp16.
    """

    q: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, kept: Mapping[str, Tensor], bias: nn.Parameter | None, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in kept.items():
            self.register_buffer(name, tensor)
        self.out_features, self.in_features = self.q.shape
        self.kind, self.dtype = kind, dtype
        self.implementation = fastest(self.q.device, dtype, _FORMATS[kind], self.in_features) or "reference"
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """[N, K] in the dtype of the activations, made at every look: for code that asks a layer for its weight."""
        return (self.q.float() * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        rows = x.reshape(-1, self.in_features)
        out = weight_only_linear(rows, self.q, self.scale, self.bias, implementation=self.implementation)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, kind={self.kind}, implementation={self.implementation}"


def kept_weight(weight: Tensor, kind: str, name: str = "a weight") -> dict[str, Tensor]:
    """What a `QuantisedLinear` of the kind keeps of a weight [N, K], by the name of its buffer.

    Raises:
        ConfigError: values that are not finite.
    """
    q, scale = quantised_weight(weight, _FORMATS[kind], name)
    return {"q": q, "scale": scale}


def linear_layers(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers that can be of another kind, by name, and why the other linear layers' stay as they are."""
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    layers, left = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = _why_not(module, owners)
            if reason:
                left[name] = reason
            else:
                layers[name] = module
    return layers, left


def linear_kinds(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The kinds of which the device multiplies a layer of the model other than by the slow reference.

    FP8 only where the device has it: others would convert it in many steps.
    """
    widths = {layer.in_features for layer in linear_layers(model)[0].values()}
    has_fp8 = "fp8_e4m3" in capabilities(device).matmul_formats
    formats = {kind: _FORMATS[kind] for kind in LINEAR_KINDS if has_fp8 or not kind.startswith("fp8")}
    return [kind for kind, kept in formats.items() if any(fastest(device, dtype, kept, width) for width in widths)]


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
    layers, left = linear_layers(model)
    chosen = dict.fromkeys(layers, kinds) if isinstance(kinds, str) else dict(kinds)
    missing = {name: left.get(name, "no linear layer") for name in chosen if name not in layers}
    if not chosen or missing:
        reasons = "; ".join(f"{name or 'it'}: {why}" for name, why in (missing or left).items()) or "it has none"
        which = kinds if isinstance(kinds, str) else ", ".join(sorted(set(kinds.values()))) or "no kind"
        passed = f"a {type(model).__name__} without a linear layer for {which} ({reasons})"
        raise ConfigError(explain(passed, f"layers of {SMALLEST} weights or more", "Leave these as the format says"))
    kept = {name: kept_weight(layers[name].weight, kind, f"weight of {name!r}") for name, kind in chosen.items()}
    model = model.to(dtype)
    for name, kind in chosen.items():
        made = QuantisedLinear(kept[name], layers[name].bias, kind, dtype).eval()
        if not name:
            return made
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    return model


def _why_not(layer: nn.Linear, owners: Counter[int]) -> str:
    """Why the layer's weight stays as it is; empty if it need not."""
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__} may use its weight in a way of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:  # noqa: SLF001
        return "it has hooks, which would be lost"
    if owners[id(layer.weight)] != 1:
        return "its weight is shared"
    if layer.weight.numel() < SMALLEST:
        return f"it has {layer.weight.numel()} weights, fewer than {SMALLEST}"
    return ""
