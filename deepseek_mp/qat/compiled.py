"""`CompiledGraph`: an exported graph, compiled by Inductor with its weights as constants, and called without guards.

`torch.compile` looks at every weight again in every call, to see whether its code still holds. An exported graph cannot
change, so that here only the inputs are looked at: of small models this is a good part of the time.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import compile as inductor_compile
from torch._inductor import config as inductor

from deepseek_mp.qat.free_sizes import FreeSizes, Opened
from deepseek_mp.qat.modes import quiet_copy
from deepseek_mp.qat.rows_as_images import rows_as_images
from deepseek_mp.qat.sums import double, double_copies, spare_operands

log = logging.getLogger("deepseek_mp")

Program = Callable[..., Any]
_COMPILING = Lock()
"""Held by the thread that compiles: the compiler's state is one for the process, and fails for two of them."""


class CompiledGraph:
    """Is called as the graph is, without gradients; compiles at the first call for sizes, in seconds to a minute.

    The first sizes have code of their own. At the second ones, code is compiled for all that the graph leaves free.

    Args:
        graph: as `ExportedProgram.module(check_guards=False)` gives it. Its weights must not change any more.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._body, self._call = _body(graph), _shell(graph, self._run)
        self._sizes = FreeSizes(self._body.graph)
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._open: dict[tuple[Any, ...], list[tuple[Opened, Program]]] = {}
        """For free sizes, by what is not free."""
        self._closed: set[tuple[Any, ...]] = set()
        """What code for free sizes failed for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Operations that are called as they are, such as an LSTM's, would be cast. To turn it off costs microseconds.
        casts = torch.is_autocast_enabled("cpu")
        with torch.no_grad(), torch.autocast("cpu", enabled=False) if casts else nullcontext():
            return self._call(*args, **kwargs)

    def _run(self, *inputs: Tensor) -> Any:
        # Compiled code reads memory, where views such as `z.conj().imag` have other values than they stand for.
        inputs = tuple(t.resolve_conj().resolve_neg() for t in inputs)
        key = (torch.get_num_threads(), *((t.device, t.dtype, t.shape, t.stride()) for t in inputs))
        program = self._programs.get(key)
        if program is None:
            with _COMPILING:
                program = self._programs.get(key)  # another thread may have made it meanwhile
                if program is None:
                    return self._first(key, inputs)
        return program(*inputs)

    def _first(self, key: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> Any:
        """The outputs for sizes that were not there before; the code for them is kept.

        Code for free sizes may fail: for images of one channel PyTorch's compiler takes the results of INT8 kernels to
        lie in memory as they do not (2.11, 2.13), which its own assertions find.
        """
        alike, failed = (key[0], *self._sizes.alike(inputs)), None
        try:
            program = self._for_free_sizes(alike, inputs)
            if program is not None:
                outputs = program(*inputs)
                self._programs[key] = program
                return outputs
        except Exception as error:  # noqa: BLE001 - whatever it is, code for these sizes alone may do
            failed = error
        program = self._programs[key] = self._compiled(inputs, inputs)
        outputs = program(*inputs)
        if failed is not None:  # and not for the values of these inputs
            self._closed.add(alike)
            log.info("compiled for each size of inputs: %s: %s", type(failed).__name__, failed)
        return outputs

    def _for_free_sizes(self, alike: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> Program | None:
        """Code for these sizes among others, made where it is missing; None: they are the first, or cannot be free."""
        if alike not in self._open:
            self._open[alike] = []
            return None
        if alike in self._closed or not self._sizes.may_be_free(inputs):
            return None
        for opened, program in self._open[alike]:
            if opened.fits(inputs):
                return program
        opened = self._sizes.opened(inputs)
        program = self._compiled(inputs, opened.fakes)
        self._open[alike].append((opened, program))
        return program

    def _compiled(self, inputs: tuple[Tensor, ...], described: Sequence[Tensor]) -> Program:
        """Code for inputs as they are described."""
        copy = fx.GraphModule(self._body, quiet_copy(self._body.graph))  # the compiler changes it; weights are shared
        autocast = torch.autocast(inputs[0].device.type if inputs else "cpu", enabled=False)
        # oneDNN packs only weights that cannot change.
        options = inductor.patch(freezing=True, size_asserts=True, joint_custom_post_pass=double_copies)
        with options, autocast, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the compiler about how it copies zero points
            program: Program = inductor_compile(copy, list(described))
        return program


def _body(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph as a function of its tensors, one by one, to a tuple of tensors."""
    body = quiet_copy(graph.graph)
    body.set_codegen(fx.graph.CodeGen())
    for node in body.find_nodes(op="placeholder"):
        if not _is_tensor(node):
            body.erase_node(node)
    output = body.output_node()
    output.args = (tuple(_results(output)),)
    module = fx.GraphModule(graph, body)
    double(module, inference=True)
    spare_operands(module)
    rows_as_images(module)
    return module


def _shell(graph: fx.GraphModule, run: Program) -> fx.GraphModule:
    """Takes and gives what the graph does, in the same containers; what is between is one call."""
    shell = fx.Graph()
    shell.set_codegen(quiet_copy(graph.graph._codegen))  # noqa: SLF001 - it holds the containers
    places: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        places[node] = shell.node_copy(node)
    called = shell.call_function(run, tuple(place for node, place in places.items() if _is_tensor(node)))
    output = graph.graph.output_node()
    results = _results(output)
    found = {node: shell.call_function(operator.getitem, (called, index)) for index, node in enumerate(results)}
    shell.output(fx.map_arg(output.args[0], lambda node: found[node]))
    return fx.GraphModule({}, shell)


def _results(output: fx.Node) -> list[fx.Node]:
    """The tensors that the graph gives, each once."""
    return list(output.all_input_nodes)


def _is_tensor(node: fx.Node) -> bool:
    """Others are constants in the graph, and nothing reads them."""
    return isinstance(node.meta.get("val"), Tensor)
