"""`SimulatedModel`: a model whose forward is rounded as INT8 will round it, to be trained and then converted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.precision import Decision
from deepseek_mp.qat.modes import change_all, evaluate_norms, evaluate_others, forward_with, quiet_copy
from deepseek_mp.qat.size_conditions import SizeConditions


class SimulatedModel(nn.Module):
    """Calls a graph with fake quantisation as the original model is called.

    `train` and `eval` set BatchNorm, dropout and whether ranges of activations are observed, as in the original.

    Args:
        graph: exported in training mode and prepared.
        decisions: of each layer, whether it is in INT8, and why not.
        example: arguments and keyword arguments that it was exported with.
        dynamic: their dimensions that may change.
        sizes: what sizes, and what other inputs, the graph holds for.
        name: of the original model's class.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        decisions: tuple[Decision, ...],
        example: tuple[tuple[Any, ...], dict[str, Any]],
        dynamic: Any,
        sizes: SizeConditions,
        name: str,
    ) -> None:
        super().__init__()
        self.graph, self.decisions, self.example, self.dynamic = graph, decisions, example, dynamic
        self.sizes, self.name = sizes, name
        self.norms_frozen = False
        """Whether BatchNorms use their running statistics, and keep them, while it trains too."""
        self._frozen = forward_with(graph, evaluate_norms)
        self._evaluated = forward_with(graph, evaluate_norms, evaluate_others)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.sizes.takes("labels"):
            kwargs.pop("labels", None)  # a target that the original did not take
        self.sizes.check(args, kwargs)
        return self.unchecked(*args, **kwargs)

    def unchecked(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, whatever sizes the inputs have."""
        if not self.training:
            return self._evaluated(self.graph, *args, **kwargs)
        if self.norms_frozen:
            return self._frozen(self.graph, *args, **kwargs)
        return self.graph(*args, **kwargs)

    def train(self, mode: bool = True) -> SimulatedModel:
        """Set the mode; exported graphs have no `train` of their own."""
        for module in self.modules():
            module.training = mode
        return self

    def example_copy(self) -> Any:
        """Arguments and keyword arguments to run it with: a forward may write to what it is given."""
        return map_leaves(self.example, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)

    def quantisers(self) -> list[nn.Module]:
        """The modules that fake quantisation is done by."""
        return quantisers_of(self)

    def learn_steps(self) -> None:
        """Let the steps of all ranges be learned, beginning with those observed so far."""
        quantisers: list[Any] = self.quantisers()
        for quantiser in quantisers:
            quantiser.learn_step()

    def observing(self) -> AbstractContextManager[None]:
        """`unrounded`, and ranges are observed inside."""
        return self.unrounded(observed=True)

    @contextmanager
    def unrounded(self, *, observed: bool = False) -> Iterator[None]:
        """Inside, the model runs as in evaluation and unrounded.

        Its mode comes back, and what its forward keeps in buffers of its own, such as a count of calls.
        """
        state = state_of(self.graph)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        quantisers: list[Any] = self.quantisers()
        for quantiser in quantisers:
            quantiser.training = observed
            quantiser.disable_fake_quant()
        try:
            with torch.no_grad():
                yield
        finally:
            put_back_state(self.graph, state)
            for quantiser in quantisers:
                quantiser.enable_fake_quant()
            for module, training in modes:
                module.training = training

    @contextmanager
    def kept_ranges(self) -> Iterator[None]:
        """Inside, ranges of weights and activations may change; they come back."""
        before = [(one, {name: buffer.clone() for name, buffer in one.named_buffers()}) for one in self.quantisers()]
        try:
            yield
        finally:
            for quantiser, values in before:
                for name, buffer in quantiser.named_buffers():
                    buffer.copy_(values[name])

    def evaluated(self) -> fx.GraphModule:
        """A copy of the graph as it runs in evaluation."""
        copy = quiet_copy(self.graph)
        change_all(copy, copy.graph, evaluate_norms, evaluate_others)
        copy.recompile()
        for module in copy.modules():
            module.training = False  # a run of it observes no activations
        return copy


def quantisers_of(module: nn.Module) -> list[nn.Module]:
    """The modules in it that fake quantisation is done by."""
    return [part for part in module.modules() if hasattr(part, "activation_post_process")]


def state_of(graph: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's own buffers by name: a forward may write to them. Ranges are not among them."""
    ranges = {id(buffer) for quantiser in quantisers_of(graph) for buffer in quantiser.buffers()}
    return {name: buffer.clone() for name, buffer in graph.named_buffers() if id(buffer) not in ranges}


@torch.no_grad()
def put_back_state(graph: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the buffers that are still there the values of `state_of`."""
    for name, buffer in graph.named_buffers():
        if name in state:
            buffer.copy_(state[name])
