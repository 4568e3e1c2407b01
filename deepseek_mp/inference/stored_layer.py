"""`StoredLayer`: a module whose buffers are weights in fewer bits, which casts and pickles leave as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deepseek_mp.ops.adjacent import Part


class StoredLayer(nn.Module):
    """Buffers move with the model, but are not cast with it: their scales say what their bits mean."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stored = {id(buffer) for buffer in self._buffers.values()}

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            kept = id(tensor) not in stored or found.dtype is tensor.dtype
            return found if kept else tensor.to(found.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """What lies beside other layers' as parts of one memory, which copies and pickles of these hold once."""
        parts = {name: tensor if tensor is None else Part.of(tensor) for name, tensor in self._buffers.items()}
        return {**self.__dict__, "_buffers": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = {name: one.tensor() if isinstance(one, Part) else one for name, one in state["_buffers"].items()}
        super().__setstate__({**state, "_buffers": kept})  # type: ignore[no-untyped-call]
