"""`Int8Model`: a converted model whose products are computed by INT8 kernels of the CPU, and its file."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import CheckpointError, ConfigError, explain
from deepseek_mp.precision import Decision
from deepseek_mp.programs import Signature, export_onnx, read, write
from deepseek_mp.qat.compiled import CompiledGraph
from deepseek_mp.qat.inputs import Inputs

DECISIONS = "decisions.json"
"""The file in an archive that says what each layer computes in, and what the model takes."""


class Int8Model(nn.Module):
    """Is called as the original is, without gradients; its first calls compile, seconds to a minute (`CompiledGraph`).

    Compiled, linear layers and convolutions multiply integers of 8 bits in oneDNN's kernels. The graph itself, which
    `reference` runs, says the same in FP32 operations on rounded values.

    Args:
        program: the graph, on the CPU.
        decisions: one for each layer with a product: INT8 or not, and why.
        signature: of the inputs, as far as the program does not say it itself, which one from a file does not.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        decisions: tuple[Decision, ...],
        signature: Signature | None = None,
    ) -> None:
        super().__init__()
        self._program = program
        self.graph = program.module(check_guards=False)
        self.decisions = decisions
        self._inputs = Inputs(program, self.graph, signature)
        self._compiled = CompiledGraph(self.graph)

    @property
    def not_converted(self) -> tuple[Decision, ...]:
        """The layers that stay in FP32, with the reason of each."""
        return tuple(decision for decision in self.decisions if decision.new != "int8")

    @property
    def signature(self) -> Signature:
        """Which inputs it takes."""
        return self._inputs.signature

    @signature.setter
    def signature(self, signature: Signature) -> None:
        self._inputs.signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in FP32, computed in INT8; `BatchError` for inputs that the graph was not made for."""
        self._inputs.check(args, kwargs)
        return self._compiled(*args, **kwargs)

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs as the graph says, without a compiler: slow, to compare with; `BatchError` as of a call."""
        args, kwargs = self._inputs.as_exported(args, kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # which compiled code is without too
            return self.graph(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: graphs cannot be pickled, and an archive of them holds no code."""
        passed = "an Int8Model to be pickled (by pickle, torch.save or another process)"
        change = "Call save(path), and Int8Model.load(path) where it is needed"
        raise ConfigError(explain(passed, "a file that save writes", change))

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Model:
        return Int8Model(deepcopy(self._program, memo), self.decisions, self.signature)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: ARG002 - as any module has it
        """Refused where it would move or cast: the graph is of the formats and the device that it was made for."""
        found = fn(torch.empty(0))
        if found.dtype is not torch.float32 or found.device.type != "cpu":
            passed = f"an Int8Model to be in {found.dtype} on {found.device.type}"
            change = "Leave it as it is, or convert the trained model to another form"
            raise ConfigError(explain(passed, "INT8 and FP32 on a CPU", change))
        return self

    def train(self, mode: bool = True) -> Int8Model:
        """Refused: integers have no gradients."""
        if mode:
            passed = "train() of a model in INT8"
            raise ConfigError(explain(passed, "inference", "Train on with the trainer, and convert again"))
        return self

    def save(self, path: str | Path) -> None:
        """Write weights in INT8, graph and decisions to one file, an archive of `torch.export` that holds no code.

        Raises:
            ConfigError: the path cannot be written.
        """
        decisions = [decision.to_json() for decision in self.decisions]
        write(path, self._program, {DECISIONS: {"decisions": decisions, "signature": self.signature.to_json()}})

    def export_onnx(self, path: str | Path) -> None:
        """Write what `reference` computes to an ONNX file: weights in int8, QuantizeLinear and DequantizeLinear.

        Runtimes find in it which products to do in INT8. Inputs have the names that they have in the model's forward.

        Raises:
            ConfigError: onnx or onnxscript is missing, the path cannot be written, or an operation has no form in ONNX.
        """
        export_onnx(path, self._program)

    @classmethod
    def load(cls, path: str | Path) -> Int8Model:
        """The model of a file that `save` wrote; needs no torchao, and runs nothing but the operations of the graph.

        Raises:
            CheckpointError: the file is missing, damaged, holds another program, or asks for code.
            PlanError: its decisions are none.
        """
        program, about = read(path, DECISIONS)
        try:
            signature, decisions = Signature.from_json(about["signature"]), list(about["decisions"])
        except (KeyError, TypeError, ValueError) as error:
            passed = f"{str(path)!r}, whose {DECISIONS} is damaged ({type(error).__name__}: {error})"
            raise CheckpointError(explain(passed, "what Int8Model.save writes", "Save it again")) from error
        return cls(program, tuple(map(Decision.from_json, decisions)), signature)
