"""The file of a served model: saved with its form, numbers and formats, and loaded without the model's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from deepseek_mp.backends import capabilities, default_device, numbered
from deepseek_mp.errors import CheckpointError, ConfigError, explain, first_line
from deepseek_mp.inference.arithmetic import arithmetic
from deepseek_mp.inference.beside import Group, lay_named_beside, lay_program_beside
from deepseek_mp.inference.card import Card
from deepseek_mp.inference.compiling import compiled, compiler_for
from deepseek_mp.inference.form import Form
from deepseek_mp.inference.graphed import kept_state
from deepseek_mp.inference.layer_errors import in_place
from deepseek_mp.inference.no_casts import check_no_cast
from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.inference.stored_card import card_from_json, form_from_json
from deepseek_mp.inference.stored_formats import adapt, check_formats, formats_of
from deepseek_mp.nn.nested import check_nesting
from deepseek_mp.nn.own_code import with_own_code
from deepseek_mp.programs import Exported, Signature, exported, read, widened, write
from deepseek_mp.programs.exporting import EXPORTING
from deepseek_mp.programs.onnx_export import check_operations
from deepseek_mp.programs.signature import inputs, plain
from deepseek_mp.version import __version__

if TYPE_CHECKING:
    from deepseek_mp.inference.serve import Served

ABOUT = "served.json"
"""The file in an archive that says what was served."""
VERSION = 1
"""Of what `ABOUT` holds."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a saved model was made with."""

    model: str
    """The name of its class."""
    package: str
    torch: str
    device: str
    """The type of the device it was served on, like 'cpu'."""


class LoadedModel(nn.Module):
    """A served model from a file: is called as the original is, without gradients and without its code.

    Containers in its outputs are plain tuples, lists and dicts. Made by `load`.
    """

    def __init__(
        self, program: ExportedProgram, signature: Signature, form: Form, device: torch.device, about: dict[str, Any]
    ) -> None:
        super().__init__()
        self.form, self.device, self.signature = form, device, signature
        """`signature` says which inputs it takes."""
        self._beside: tuple[Group, ...] = lay_program_beside(program)
        self.graph = program.module(check_guards=False)
        self.card: Card | None = None if about["card"] is None else card_from_json(about["card"])
        """What was measured before it was saved, with the plan and its reasons; None where nothing was."""
        self.left_alone: dict[str, str] = _reasons(about["left_alone"])
        self.formats: dict[str, dict[str, Any]] = formats_of(program)
        """Of each tensor, by name, as it is on this device."""
        self.origin = Origin(**about["origin"])
        fast = form.format in ("tf32", "hf32") and form.format in capabilities(device).matmul_formats
        self._fp32: Any = form.format if fast else "ieee"
        self._code = self._compiled() if form.compiled else None

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code, which is of this model's weights and not of a copy's."""
        return {name: value for name, value in self.__dict__.items() if name != "_code"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay()  # Python copies parameters each on its own
        self._code = self._compiled() if self.form.compiled else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: graphs cannot be pickled, and the archive that it came from holds no code."""
        passed = "a model from a file to be pickled (by pickle, torch.save or another process)"
        raise ConfigError(explain(passed, "its file", "Pass that on, and call inference.load where it is needed"))

    def __copy__(self) -> LoadedModel:
        made = self.__new__(type(self))
        made.__setstate__(self.__getstate__())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedModel:
        made = memo[id(self)] = self.__new__(type(self))
        made.__setstate__(deepcopy(self.__getstate__(), memo))
        return made

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What moves the weights takes them apart. Casts are refused: the graph says what its operations take."""
        check_no_cast(args[0], self.graph.state_dict().values(), "a model from a file")
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._lay()
        return self

    def _lay(self) -> None:
        lay_named_beside(self.graph.state_dict(keep_vars=True), self._beside)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs; `BatchError` for inputs that the program was not made for."""
        self.signature.check(args, kwargs)
        with torch.no_grad(), arithmetic(self.device, self._fp32):
            call = self.graph if self._code is None else self._code
            return call(*inputs(args, kwargs))

    def train(self, mode: bool = True) -> LoadedModel:
        """Refused: a graph of inference has no training mode."""
        if mode:
            passed = "train() of a model from a file"
            raise ConfigError(explain(passed, "inference", "Train the original model, and save it again"))
        return self

    def _compiled(self) -> Any:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.graph(args, kwargs)

        return compiled(with_own_code(run), compiler_for(self.graph, self.device, self.form))


def save(served: Served, path: str | Path, example_inputs: Any = None, *, dynamic: Sequence[int] = (0,)) -> None:
    """Write a served model to one file, from which `load` makes it again on a machine without the model's code.

    The file is an archive of `torch.export`: a graph of operations, tensors, and JSON about both. On the device it was
    saved on, the loaded model's outputs are the same bit for bit, in eager mode.

    Threads may save and load at once, but not call models while one of them saves: PyTorch cannot trace then.

    Args:
        served: on any device.
        path: of the file, by custom with the ending .pt2; an older one there is replaced.
        example_inputs: as `optimize_for_inference` takes them; None: those that it was given.
        dynamic: dimensions of the inputs that may change later, as far as the model bears it.

    Raises:
        ConfigError: there are no example inputs, the model cannot be exported, or the path cannot be written.
    """
    made = as_program(served, example_inputs, dynamic)
    program = made.program
    if served.device.type != "cpu":
        program = move_to_device_pass(program, "cpu")
    about = {
        "version": VERSION,
        "origin": {
            "model": served.name,
            "package": __version__,
            "torch": torch.__version__,
            "device": served.device.type,
        },
        "form": served.form.to_json(),
        "card": None if served.card is None else served.card.to_json(),
        "left_alone": served.left_alone,
        "tensors": formats_of(program),
        "signature": made.signature.to_json(),
    }
    write(path, program, {ABOUT: about})


def load(path: str | Path, device: str | torch.device | None = None) -> LoadedModel:
    """The model of a file that `save` wrote, on a device; nothing but the operations of its graph is ever run.

    What was in TF32 or HF32 is in FP32 where the device has no such products. FP8 weights of the kind that the device
    does not have, OCP's or AMD's fnuz, are converted (`ops/fp8_kinds.py`), and linear layers of other kinds get the
    implementation that is the device's fastest, with weights in its order.

    Args:
        path: of the file.
        device: where it is to run; None: the accelerator that PyTorch finds, or the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of another version or origin, or asks for code.
        ConfigError: there is no such device, or the path is none.
    """
    place = numbered(default_device() if device is None else device)  # as tensors there say themselves
    capabilities(place)  # says so where there is none
    with EXPORTING:
        return _loaded(path, place)


def _loaded(path: str | Path, place: torch.device) -> LoadedModel:
    program, about = read(path, ABOUT)
    _check_version(path, about)
    try:
        form, signature = form_from_json(about["form"]), Signature.from_json(about["signature"])
        check_formats(program, about["tensors"])
        if place.type != "cpu":
            program = move_to_device_pass(program, place)
        adapt(program, place)
        return LoadedModel(program, signature, form, place, about)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = first_line(error)
        allowed = f"what version {__version__} writes"
        raise CheckpointError(
            explain(f"{str(path)!r}, whose {ABOUT} is damaged ({why})", allowed, "Save it again")
        ) from error


def as_program(served: Served, example_inputs: Any, dynamic: Sequence[int], *, widen: bool = False) -> Exported:
    """What a served model computes, from its inputs to its outputs, as one program on its device; see `save`.

    Layers of other kinds are in it by their reference: `stored_formats.adapt` chooses what a device has.

    Args:
        widen: BF16 in it becomes FP32.
    """
    given = served.example_inputs if example_inputs is None else example_inputs
    if given is None:
        passed, allowed = "a model to be saved without example inputs", "inputs of the sizes that will be served"
        raise ConfigError(explain(passed, allowed, "Pass example_inputs"))
    check_nesting(given, "example inputs")
    args, kwargs = ((), given) if isinstance(given, Mapping) else (given if isinstance(given, tuple) else (given,), {})
    with EXPORTING, arithmetic(served.device), in_place(served, _portable(served)):
        made = exported(_Whole(served), args, kwargs, dynamic=dynamic, kept=served.kept_state)
        if not widen:
            return made
        check_operations(made.program)
        wide = widened(made.program)
        return exported(wide, args, kwargs, dynamic=dynamic, kept=lambda: kept_state(wide))


def _portable(served: Served) -> dict[str, nn.Module]:
    """The layers of other kinds by their reference; not while another thread has such in their place."""
    layers = {name: layer for name, layer in served.named_modules() if isinstance(layer, QuantisedLinear)}
    return {name: layer.portable() for name, layer in layers.items()}


class _Whole(nn.Module):
    """The served model with the conversions around it, called with a tuple and a dict."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.model = served.model
        self._convert = served.converted
        self._name = served.name

    def _get_name(self) -> str:
        """That of the user's model, for errors."""
        return self._name

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = plain(self._convert(args, kwargs))
        if other := [type(leaf).__name__ for leaf in pytree.tree_leaves(outputs) if is_dataclass(leaf)]:
            passed, allowed = f"outputs in a {other[0]}", "tensors, numbers and None in tuples, lists and dicts"
            raise ConfigError(explain(passed, allowed, "Let the forward return a dict"))
        return outputs


def _reasons(data: Any) -> dict[str, str]:
    """`TypeError` for what is no text by name."""
    if not isinstance(data, dict) or not all(isinstance(why, str) for why in data.values()):
        raise TypeError("left_alone without reasons by name")
    return data


def _check_version(path: str | Path, about: Any) -> None:
    found = about.get("version") if isinstance(about, dict) else None
    if found != VERSION:
        origin = about.get("origin") if isinstance(about, dict) else None
        by = f" by deepseek_mp {origin['package']}" if isinstance(origin, dict) and "package" in origin else ""
        passed = f"{str(path)!r}, saved{by} in version {found!r} of the format"
        change = "Save the model again with this version, or load it with that one"
        raise CheckpointError(explain(passed, f"version {VERSION}", change))
