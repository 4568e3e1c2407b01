"""Linear layers with weights in 8 bits, in the place of a served copy's own."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.weight_only import FORMATS, fastest, quantised_weight, weight_only_linear

SMALLEST = 2**16
"""Weights of a layer that is worth it: with fewer, a call's time is not that of reading them."""


class QuantisedLinear(nn.Module):
    """`nn.Linear` for inference, its weight in 8 bits with a scale for each output channel.

    Args:
        q, scale: as `quantised_weight` gives them; buffers.
        bias: that of the layer, or None.
        format: 'int8' or 'fp8'.
        dtype: of the activations, bf16 or fp16.
    """

    q: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, q: Tensor, scale: Tensor, bias: nn.Parameter | None, format: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.format, self.dtype = format, dtype
        self.implementation = fastest(q.device, dtype, format, self.in_features) or "reference"
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
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
        return f"{sizes}, weights={self.format}, implementation={self.implementation}"


def linear_layers(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers whose weights can be kept in 8 bits, by name, and why the other linear layers' stay as they are."""
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


def weight_formats(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The formats in which the device multiplies weights of a layer of the model other than by the slow reference.

    FP8 only where the device has it: others would convert it in many steps.
    """
    widths = {layer.in_features for layer in linear_layers(model)[0].values()}
    has_fp8 = "fp8_e4m3" in capabilities(device).matmul_formats
    formats = [format for format in FORMATS if format != "fp8" or has_fp8]
    return [format for format in formats if any(fastest(device, dtype, format, width) for width in widths)]


def quantised(model: nn.Module, format: str, dtype: torch.dtype) -> nn.Module:
    """The model with activations in `dtype`, changed in place: weights of its large linear layers are in 8 bits.

    They are rounded from the model's own weights; all that stays is cast.

    Returns:
        The model, or what takes its place where it is itself a linear layer.

    Raises:
        ConfigError: there is no such layer, or a weight is not finite.
    """
    layers, left = linear_layers(model)
    if not layers:
        reasons = "; ".join(f"{name or 'it'}: {why}" for name, why in left.items()) or "it has none"
        passed = f"a {type(model).__name__} without a linear layer for weights in {format} ({reasons})"
        raise ConfigError(explain(passed, f"a layer of {SMALLEST} weights or more", "Leave weights=None"))
    kept = {name: quantised_weight(layer.weight, format, f"weight of {name!r}") for name, layer in layers.items()}
    model = model.to(dtype)
    for name, layer in layers.items():
        made = QuantisedLinear(*kept[name], layer.bias, format, dtype).eval()
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
