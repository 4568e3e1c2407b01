"""A fast integer device beside the GPU, simulated: its numbers are the host's and its times are made up."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deepseek_mp.optim.offload.compression import HostPlacement, Packed

HOST = HostPlacement(link=50e9, memory=100e9)


@dataclass
class SimulatedNpu:
    """Its numbers are the host's, its time is made up: a fixed start, then a fast link."""

    calls: list[str] = field(default_factory=list)
    name: str = "npu (simulated)"
    simulated: bool = True

    def seconds(self, values: int) -> float:
        return 1e-3 + values / 1e12

    def compress(self, tensor: Tensor) -> Packed:
        self.calls.append("compress")
        return HOST.compress(tensor)

    def expand(self, packed: Packed) -> Tensor:
        self.calls.append("expand")
        return HOST.expand(packed)
