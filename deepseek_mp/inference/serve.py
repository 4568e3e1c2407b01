"""A model in one of its forms: a copy, whose inputs and outputs are those of the original."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from deepseek_mp.costs.attributes import Attributes
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference import attention
from deepseek_mp.inference.archive import save
from deepseek_mp.inference.arithmetic import arithmetic
from deepseek_mp.inference.beside import lay_beside, lie_beside
from deepseek_mp.inference.card import Card
from deepseek_mp.inference.compiling import Compiler, compiled, compiler_for
from deepseek_mp.inference.form import FORMATS, INT8, Form
from deepseek_mp.inference.graphed import Graphed, kept_state
from deepseek_mp.inference.no_casts import cast_with, check_no_cast
from deepseek_mp.inference.onnx_export import export_onnx
from deepseek_mp.inference.quantised_linear import QuantisedLinear, cast, linear_layers, quantised
from deepseek_mp.inference.recorder import records
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.nn.own_code import with_own_code

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats in which all is kept and multiplied."""
_NARROW = frozenset(NARROW.values())
_FEW_CHANNELS = 4
"""At most those of images."""
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Served(nn.Module):
    """Calls the copy as the original is called, without gradients.

    Tensors of floating type go in as the form has them and come out in FP32, unless the original's are FP64.

    Compiled and graphed forms run attention of few queries by kernels of ours (`inference.attention`).
    In a graphed form each kind of inputs (`Graphed`) is recorded at its first call.

    Args:
        like: a copy of the same model whose form has its weights in the same form: they are shared, and so is code
            that was compiled for the same format.

    Raises:
        ConfigError: an argument of another type, the model cannot be copied, its BatchNorms cannot be folded, it has no
            linear layer of the form's kind, or calls cannot be recorded.
    """

    model: nn.Module
    _plain: Any
    _compiler: Compiler | None = None
    left_alone: dict[str, str]
    """Linear layers that a kind for all leaves as they are, by name, with the reason."""
    card: Card | None = None
    """What was measured of it, where `optimize_for_inference` made it."""
    example_inputs: Any = None
    """Those that it was measured with."""

    def __init__(self, model: nn.Module, form: Form, device: torch.device, like: Served | None = None) -> None:
        super().__init__()
        given = {"model": (model, nn.Module), "form": (form, Form), "device": (device, torch.device)}
        if wrong := [
            f"{name} of type {type(one).__name__}" for name, (one, kind) in given.items() if not isinstance(one, kind)
        ]:
            allowed = "a model, a Form and a torch.device"
            raise ConfigError(explain(", ".join(wrong), allowed, "Call Served(model, Form(...), torch.device(...))"))
        if form.format == INT8:
            change = "Train for it with QuantizationAwareTrainer, or use linear='int8_weights'"
            raise ConfigError(explain("a model to be served in 'int8'", ", ".join(map(repr, FORMATS)), change))
        self.form, self.device = form, device
        self.name = type(model).__name__
        self.model = _formed(copied(model).eval(), form) if like is None else like.model
        self.left_alone = linear_layers(self.model, form.linear)[1] if form.linear else {}
        self._prepare(like)
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._graphed is not None:
            return self._graphed(args, kwargs)
        with torch.no_grad(), self._mathematics():
            if self.form.compiled and records(self.device):
                args, kwargs = map_leaves((args, kwargs), self._brought)
            return map_leaves(self._plain(args, kwargs), self._result)

    def _mathematics(self) -> AbstractContextManager[None]:
        fp32: Any = self.form.format if self.form.format in ("tf32", "hf32") else "ieee"
        return arithmetic(self.device, fp32)

    def _prepare(self, like: Served | None = None) -> None:
        """What calls go through."""
        self._places = self._where()
        if like is not None and replace(like.form, graphed=self.form.graphed) == self.form:
            self._plain, self._compiler = like._plain, like._compiler  # noqa: SLF001 - of its own class
        else:
            self._plain = self._compiled() if self.form.compiled else self._converted
        self._graphed: Graphed | None = None
        if self.form.graphed:
            call = self._plain
            if not self.form.compiled:
                call = attention.recorded(call, self.device, self.form.format)

            def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                with self._mathematics():  # a replay computes as it was recorded, and need not switch
                    return call(args, kwargs)

            self._graphed = Graphed(
                run, self.model, self.device, fixed=self._weights, into=self._brought, out=self._result
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled and recorded code, which is of this model's weights and not of a copy's."""
        code = ("_plain", "_compiler", "_graphed")
        return {name: value for name, value in self.__dict__.items() if name not in code}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        lay_beside(self.model)  # Python copies parameters each on its own
        self._prepare()

    def train(self, mode: bool = True) -> Served:
        """Refused: BatchNorms and dropout are those of evaluation here."""
        if mode:
            passed = f"train() of a model served in {self.form.name}"
            raise ConfigError(explain(passed, "inference", "Train the original model, and serve it again"))
        super().train(False)
        return self

    @property
    def graph_bytes(self) -> int:
        """Memory that belongs to recorded calls; 0 in forms that are not graphed."""
        return 0 if self._graphed is None else self._graphed.bytes

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What moves the weights makes recordings of them void, and code that reads those of layers as one.

        Casts are refused: inputs go on being made what the form says, and so would not fit.
        """
        kept = cast_with(self.model, NARROW.get(self.form.format))
        check_no_cast(args[0], kept, f"a model served in {self.form.name}")
        joined = self.joined
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self._graphed is not None:
            self._graphed.forget()
        if all(lie_beside(self.model, group) for group in joined):
            self._places = self._where()
        else:
            self._prepare()
        return self

    def _where(self) -> list[int]:
        """Where in memory the weights lie."""
        return [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def _replaced(self) -> None:
        """After weights may have been put in the place of others, instead of written into them."""
        if self._where() != self._places:
            lay_beside(self.model)
            self._prepare()

    @property
    def joined(self) -> tuple[tuple[str, ...], ...]:
        """Linear layers that run as one product in code compiled so far, by name; each group as its weights lie."""
        layers = ((name, part) for name, part in self.model.named_modules() if isinstance(part, QuantisedLinear))
        return () if self._compiler is None else self._compiler.joined((name, layer.q) for name, layer in layers)

    @contextmanager
    def kept_state(self) -> Iterator[None]:
        """A region at whose end the model's buffers, and its modules' attributes, are what they were before."""
        attributes = Attributes(self.model.modules())
        with kept_state(self.model, self._weights()):
            try:
                yield
            finally:
                attributes.put_back()

    def _weights(self) -> list[Tensor]:
        """Buffers that no call writes to."""
        layers = (module for module in self.model.modules() if isinstance(module, QuantisedLinear))
        return [buffer for layer in layers for buffer in layer.buffers()]

    def save(self, path: str | Path, example_inputs: Any = None, *, dynamic: Sequence[int] = (0,)) -> None:
        """Write it to a file that `inference.load` reads without the model's code; see `archive.save`."""
        save(self, path, example_inputs, dynamic=dynamic)

    def export_onnx(
        self, path: str | Path, example_inputs: Any = None, *, dynamic: Sequence[int] = (0,), widen: bool = True
    ) -> None:
        """Write it to an ONNX file; see `onnx_export.export_onnx`."""
        export_onnx(self, path, example_inputs, dynamic=dynamic, widen=widen)

    def converted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs as the form's operations give them: not compiled, and in the modes of the caller."""
        return map_leaves(self._converted(args, kwargs), self._result)

    def _compiled(self) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._converted(args, kwargs)

        self._compiler = compiler_for(self.model, self.device, self.form)
        return compiled(with_own_code(run), self._compiler)

    def _converted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = map_leaves((args, kwargs), self._given)
        return self.model(*args, **kwargs)

    def _given(self, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        layout = _LAYOUTS.get(leaf.dim()) if self.form.channels_last else None
        wide = torch.float32 if leaf.dtype in _NARROW else leaf.dtype
        return leaf.to(NARROW.get(self.form.format, wide), memory_format=layout or torch.preserve_format)

    def _brought(self, leaf: Any) -> Any:
        """What is done in front of recorded code, and of code compiled where it may be recorded: it is compiled once.

        A copy to channels innermost reads them one by one from far apart. Of many the code that follows makes a better
        one, since it calls `_given` too.
        """
        turned = self.form.channels_last and isinstance(leaf, Tensor) and leaf.dim() in _LAYOUTS
        return leaf if turned and leaf.shape[1] > _FEW_CHANNELS else self._given(leaf)

    @staticmethod
    def _result(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _NARROW else leaf


def _loaded(served: Any, _keys: Any) -> None:
    """`load_state_dict(assign=True)` makes recordings void, and code that reads weights of layers as one."""
    served._replaced()  # noqa: SLF001 - the hook of its own class, which copies and files name


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model; `ConfigError` where Python cannot make one."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        passed = f"a {type(model).__name__} that cannot be copied ({error})"
        raise ConfigError(explain(passed, "a model that copy.deepcopy copies", "Drop what hangs on it")) from error


def has_images(model: nn.Module) -> bool:
    """Whether layers of the model care where in memory the channels are."""
    return any(isinstance(module, _CONVOLUTIONS) for module in model.modules())


def has_norms(model: nn.Module) -> bool:
    """Whether there are BatchNorms, with the statistics that inference needs."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))  # noqa: SLF001
    return any(norm.running_mean is not None for norm in norms)


def _formed(model: nn.Module, form: Form) -> nn.Module:
    if form.folded:
        model = _folded(model)
    if form.linear is not None or form.layers:
        model = quantised(model, form.linear or dict(form.layers), NARROW[form.format])
        lay_beside(model)
    elif form.format in NARROW:
        model = cast(model, NARROW[form.format])
    else:  # FP32 is more than a checkpoint in 16 bits has, and what it is measured against
        model._apply(lambda tensor: tensor.float() if tensor.dtype in NARROW.values() else tensor)  # noqa: SLF001
    for module in model.modules() if form.channels_last else ():
        if isinstance(module, _CONVOLUTIONS):
            module.weight.data = module.weight.data.contiguous(memory_format=_LAYOUTS[module.weight.dim()])
    return model


def _check_norms(model: nn.Module) -> None:
    """`ValueError` where PyTorch's pass would change more than it should.

    For a convolution before a BatchNorm that is called again it changes both calls, and what else reads its weight. It
    loses hooks. And in its trace no argument `is None`, whatever a call passes, and attributes are what they are then.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):  # noqa: SLF001
        raise ValueError("it has hooks, which would be lost")
    for parameter in signature(model.forward).parameters.values():
        if parameter.default is None:
            raise ValueError(f"its forward may ask whether {parameter.name}=None is given")
    modules = dict(model.named_modules())
    before = [(module, _attributes(module)) for module in modules.values()]
    traced = fx.symbolic_trace(model).graph.nodes
    for module, had in before:
        if changed := [name for name, found in _attributes(module).items() if _differ(found, had.get(name, []))]:
            raise ValueError(f"its forward changes {', '.join(changed)}, which a trace would keep as it was")
    nodes = [node for node in traced if node.op == "call_module"]
    read = {node.target: node.target.rpartition(".")[0] for node in traced if node.op == "get_attr"}
    calls = Counter(node.target for node in nodes)
    for node in nodes:
        first = node.args[0] if node.args else None
        if not isinstance(modules.get(node.target), nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
            continue
        if isinstance(first, fx.Node) and calls[first.target] > 1:
            raise ValueError(f"{first.target} is called more than once")
        if isinstance(first, fx.Node) and (weights := [name for name, owner in read.items() if owner == first.target]):
            raise ValueError(f"{weights[0]} is read by itself")


def _attributes(module: nn.Module) -> dict[str, list[Any]]:
    """By name, each with what it holds: a forward may add to it."""
    return {
        name: [value, *(value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ())]
        for name, value in vars(module).items()
    }


def _differ(found: list[Any], had: list[Any]) -> bool:
    return len(found) != len(had) or any(one is not other for one, other in zip(found, had, strict=True))


def _folded(model: nn.Module) -> nn.Module:
    """BatchNorm folded into convolutions by PyTorch's own pass, which traces the model symbolically."""
    try:
        _check_norms(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Imported when it is needed, since that compiles TorchScript and warns.
            folded: nn.Module = import_module("torch.fx.experimental.optimization").fuse(model, inplace=True)
            return folded
    except (fx.proxy.TraceError, TypeError, AttributeError, NotImplementedError, ValueError) as error:
        passed = f"a {type(model).__name__} that cannot be traced to fold its BatchNorms ({error})"
        raise ConfigError(explain(passed, "a forward without decisions by values", "Leave them unfolded")) from error
