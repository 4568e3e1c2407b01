"""The arms of the inference benchmark: PyTorch's own ways to run a model, torchao's, and forms of this package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends import math_mode
from deepseek_mp.inference import Card, Form, Served, optimize_for_inference
from deepseek_mp.inference.form import LINEAR_KINDS
from deepseek_mp.inference.recorder import DeviceRecorder, records
from deepseek_mp.nn.own_code import with_own_code

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run a case's model."""

    format: str = "bf16"
    compiled: str = ""
    """The mode of torch.compile: 'default' or 'max-autotune-no-cudagraphs'; empty: eager."""
    graphed: bool = False
    channels_last: bool = False
    torchao: bool = False
    """Its int8 weights."""
    form: Form | None = None
    """One of this package's; the fields above are not read then."""
    chosen: bool = False
    """What `optimize_for_inference` takes."""

    @property
    def is_ours(self) -> bool:
        return self.chosen or self.form is not None

    @property
    def needs_compiler(self) -> bool:
        return bool(self.compiled) or (self.form is not None and self.form.compiled)

    @property
    def name(self) -> str:
        if self.chosen:
            return "ours chosen"
        if self.form is not None:
            return f"ours {self.form.name}"
        code = {"": "", "default": "compiled"}.get(self.compiled, "max-autotune")
        marks = ("torchao_int8" if self.torchao else "", "channels_last" if self.channels_last else "", code,
                 "graphed" if self.graphed else "")  # fmt: skip
        return "+".join([self.format, *filter(None, marks)])


def peers(*names: str) -> tuple[Arm, ...]:
    """PyTorch's own by name, as 'bf16+compiled+graphed'."""
    codes = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    found = []
    for name in names:
        format, *marks = name.split("+")
        code = next((codes[mark] for mark in marks if mark in codes), "")
        last, int8 = "channels_last" in marks, "torchao_int8" in marks
        found.append(Arm(format=format, compiled=code, graphed="graphed" in marks, channels_last=last, torchao=int8))
    return tuple(found)


def quantised(*, compiled: bool) -> tuple[Arm, ...]:
    """Every kind of linear layers that the package has, recorded."""
    forms = [Form(format="bf16", linear=kind, compiled=compiled, graphed=True) for kind in LINEAR_KINDS]
    return tuple(Arm(form=form) for form in forms)


class Builder:
    """Makes arms ready to be called; those whose weights are kept alike share them."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.model, self.inputs, self.device = model, tuple(inputs), device
        self.card: Card | None = None
        """Of what was chosen."""
        self._models: dict[tuple[str, bool, bool], nn.Module] = {}
        self._codes: dict[Arm, Run] = {}
        self._served: dict[Form, Served] = {}

    def build(self, arm: Arm, **options: Any) -> tuple[Callable[[], Any], nn.Module]:
        """A call on the case's inputs, and the model that it runs. `options` are those of `optimize_for_inference`."""
        if arm.chosen:
            served, _, self.card = optimize_for_inference(self.model, self.inputs, **options)
            return lambda: served(*self.inputs), served
        if arm.form is not None:
            return self._ours(arm.form)
        model = self._model(arm)
        inputs = [self._given(tensor, arm) for tensor in self.inputs]
        code = replace(arm, graphed=False)
        run = self._codes.setdefault(code, self._code(model, arm))
        if arm.graphed and records(self.device):
            return captured(run, inputs, self.device), model
        return lambda: run(*inputs), model

    def _ours(self, form: Form) -> tuple[Callable[[], Any], nn.Module]:
        """On a device without graphs the same without them, to try the script."""
        if form.graphed and not records(self.device):
            form = replace(form, graphed=False)
        kind = replace(form, compiled=False, graphed=False)
        served = Served(self.model, form, self.device, self._served.get(kind))
        self._served.setdefault(kind, served)
        return lambda: served(*self.inputs), served

    def _model(self, arm: Arm) -> nn.Module:
        key = (str(DTYPES[arm.format]), arm.channels_last, arm.torchao)
        if key not in self._models:
            same = {weight.dtype for weight in self.model.parameters()} == {DTYPES[arm.format]}
            model = self.model
            if not same or arm.channels_last or arm.torchao:
                model = copy.deepcopy(self.model).to(DTYPES[arm.format])
            if arm.channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if arm.torchao:
                to_int8(model)
            self._models[key] = model
        return self._models[key]

    def _given(self, tensor: Tensor, arm: Arm) -> Tensor:
        """What a user of that arm would pass."""
        if not tensor.is_floating_point():
            return tensor
        layout = torch.channels_last if arm.channels_last and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(DTYPES[arm.format], memory_format=layout)

    def _code(self, model: nn.Module, arm: Arm) -> Run:
        def run(*inputs: Tensor) -> Any:
            return model(*inputs)

        code: Run = torch.compile(with_own_code(run), mode=arm.compiled) if arm.compiled else run
        fp32: Any = "tf32" if arm.format == "tf32" else "ieee"

        def call(*inputs: Tensor) -> Any:
            with torch.no_grad(), math_mode(self.device, fp32=fp32, search=True):
                return code(*inputs)

        return call


def captured(run: Run, inputs: Sequence[Tensor], device: torch.device) -> Callable[[], Any]:
    """The call recorded as users do by hand: inputs are copied in, outputs are the recording's own."""
    own = [tensor.clone() for tensor in inputs]
    recorder = DeviceRecorder(device)
    recorder.warm(lambda: run(*own))
    replay, outputs = recorder.record(lambda: run(*own))

    def call() -> Any:
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        replay()
        return outputs

    return call


def to_int8(model: nn.Module) -> None:
    """torchao's weights in int8, in place; it may be missing, or too young or old for this PyTorch."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
