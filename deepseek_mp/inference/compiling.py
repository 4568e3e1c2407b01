"""The compiler of served models: Inductor, on graphs in which attention and linear layers have been rewritten before.

Attention of few queries becomes ours and masks are made such that PyTorch's kernels take them (`inference.attention`);
linear layers of fewer bits that read the same input become one product (`nn.graph_linear`), or share its cast. Products
in FP8 of a file's graph are opened to the compiler before, as those of a model's own code are. Where the device can,
kernels are made to be launched early (`inference.early_code`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch._dynamo  # so that its backends can be looked up before anything was compiled
from torch import Tensor, fx, nn

from deepseek_mp.inference import attention
from deepseek_mp.inference.early_code import early_kernels
from deepseek_mp.inference.form import Form
from deepseek_mp.nn.graph_alias import described_apart
from deepseek_mp.nn.graph_linear import join_products
from deepseek_mp.nn.graph_plain_products import open_products
from deepseek_mp.nn.graph_row_casts import share_row_casts
from deepseek_mp.ops.native.fp8_linear import plain

torch._dynamo.allow_in_graph(plain)  # noqa: SLF001 - one node until it has been joined; the compiler sees through it


class Compiler:
    """A backend for `torch.compile`, of one served model.

    Args:
        model: what is compiled. Not held: PyTorch may keep compilers for good.
        device: that it is on.
        own_attention: whether attention and masks are rewritten.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, own_attention: bool) -> None:
        self._model, self._device, self.own_attention = weakref.ref(model), device, own_attention
        self._joined: dict[tuple[int, ...], None] = {}
        """Groups of joined layers, each by where its weights lie."""

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.own_attention:
            attention.rewrite(graph)
        compiler: Callable[..., Callable[..., Any]] = torch._dynamo.lookup_backend("inductor")  # noqa: SLF001
        open_products(graph)
        made = join_products(graph, inputs)
        share_row_casts(graph if made is None else made.graph)
        model = self._model()
        weights = set() if model is None else {one.data_ptr() for one in (*model.parameters(), *model.buffers())}
        with early_kernels(self._device):
            if made is None:
                return compiler(graph, described_apart(graph, inputs, weights))
            self._joined.update(dict.fromkeys(tuple(q.data_ptr() for q in group) for group in made.groups))
            return made.taking_former(compiler(made.graph, described_apart(made.graph, made.inputs, weights)))

    def joined(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
        """The layers of each group that was joined in code compiled so far, by their names beside their weights."""
        names = {q.data_ptr(): name for name, q in weights}
        return tuple(tuple(names[at] for at in group) for group in self._joined if names.keys() >= set(group))


def compiler_for(model: nn.Module, device: torch.device, form: Form) -> Compiler | None:
    """That of a model, in a form on a device. None: nothing would be rewritten, and PyTorch's own is as good."""
    own_attention = attention.is_rewritten(device, form.format)
    return Compiler(model, device, own_attention=own_attention) if own_attention or form.linear or form.layers else None


def compiled(call: attention.Call, compiler: Compiler | None) -> Any:
    """The call compiled."""
    return torch.compile(call) if compiler is None else torch.compile(call, backend=compiler)
