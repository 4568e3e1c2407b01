"""A served model as an ONNX file, for runtimes other than PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_mp import programs
from deepseek_mp.inference.archive import as_program
from deepseek_mp.programs.onnx_export import require_onnx
from deepseek_mp.programs.signature import Signature
from deepseek_mp.programs.writing import checked

if TYPE_CHECKING:
    from deepseek_mp.inference.serve import Served


def export_onnx(
    served: Served, path: str | Path, example_inputs: Any = None, *, dynamic: Sequence[int] = (0,), widen: bool = True
) -> None:
    """Write a served model to an ONNX file of opset 20.

    Weights in int8 and FP8 stay in the file as they are, each behind a DequantizeLinear; products and sums of those
    layers are in FP32. Named inputs keep their names, others have those of the parameters of the model's `forward`.

    Args:
        served: on any device, in any form; the form's compiler and memory layout have no part in it.
        path: of the file; an older one there is replaced. Tensors of more than 2 GiB lie beside it.
        example_inputs: as `optimize_for_inference` takes them; None: those that it was given.
        dynamic: dimensions of the inputs that may change later, as far as the model bears it.
        widen: BF16 becomes FP32, since few runtimes multiply in BF16 (ONNX Runtime on CPUs does not).

    Raises:
        ConfigError: onnx or onnxscript is missing, there are no example inputs, the path cannot be written, or the
            model cannot be exported.
    """
    require_onnx()
    checked(path)
    made = as_program(served, example_inputs, dynamic, widen=widen)
    programs.export_onnx(path, made.program, inputs=_names(served, made.signature))


def _names(served: Served, signature: Signature) -> list[str]:
    """Of the tensors, in order: "['kwargs']['mask']" is 'mask', "['args'][0]" the first parameter of `forward`.

    Other values are a part of the graph, and no inputs of the file.
    """
    parameters = list(inspect.signature(served.model.forward).parameters)
    names = []
    for leaf in (leaf for leaf in signature.leaves if leaf.dtype is not None):
        kind, first, *rest = [part.strip("'") for part in leaf.where[1:-1].split("][")]
        known = kind == "args" and int(first) < len(parameters)
        names.append("_".join([parameters[int(first)] if known else first, *rest]))
    return names
