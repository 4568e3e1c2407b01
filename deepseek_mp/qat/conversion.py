"""From a model with fake quantisation to one in INT8: a copy, converted by torchao."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import fx

from deepseek_mp.backends.exporting_flags import fp32_flags_left_alone
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.qat.constants import fold_constants
from deepseek_mp.qat.int8 import Int8Model
from deepseek_mp.qat.letting_go import models_let_go
from deepseek_mp.qat.modes import on_its_own
from deepseek_mp.qat.norms import fold_norms, without_statistics_hidden
from deepseek_mp.qat.simulated import SimulatedModel, put_back_state, state_of


@on_its_own()
def convert(simulated: SimulatedModel) -> Int8Model:
    """The model in INT8, with the weights and ranges of now; the one passed may be trained on.

    Raises:
        ConfigError: PyTorch was built without oneDNN, whose kernels compute in INT8.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    if not torch.backends.mkldnn.is_available():
        passed = "conversion to INT8 where PyTorch has no oneDNN"
        raise ConfigError(explain(passed, "a CPU build of PyTorch with oneDNN", "Convert on an x86-64 machine"))
    args, kwargs = simulated.example
    given, named = simulated.example_copy()
    graph = simulated.evaluated()
    state = state_of(graph)
    with torch.no_grad(), fp32_flags_left_alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao and the exporter about themselves
        graph(*given, **named)  # the ranges of the weights as the last step left them
        fold_norms(graph)
        with models_let_go(), without_statistics_hidden(graph.graph):  # torchao would trace its patterns for some 20 s
            converted = convert_pt2e(graph)
        put_back_state(converted, state)  # it was run here, and by torchao to find constants
        fold_constants(converted)
        _store_by_rows(converted)
        sizes, sizes_by_name = simulated.dynamic
        program = torch.export.export(converted, args, kwargs, dynamic_shapes=(*sizes, *sizes_by_name.values()))
    made = Int8Model(program, simulated.decisions)
    made.signature = replace(made.signature, conditions=simulated.sizes.of(program, kwargs, made.signature.conditions))
    return made


def _store_by_rows(converted: fx.GraphModule) -> None:
    """Let weights of linear layers lie in memory row by row: oneDNN's kernels read them so, whatever strides say."""
    for buffer in converted.buffers():
        if buffer.dtype is torch.int8 and buffer.dim() == 2:
            buffer.data = buffer.data.contiguous()
