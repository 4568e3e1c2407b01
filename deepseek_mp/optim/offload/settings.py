"""The settings of an offloaded optimizer, and what it says of a step."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload.schedule import CHUNK_BYTES, MODES, WIRES, Rates, check_member


@dataclass(frozen=True, kw_only=True)
class OffloadSettings:
    """How an optimizer is offloaded. `ConfigError` for a value that is not possible."""

    mode: str = "sync"
    """'sync' and 'speculative' give the numbers of AdamW; 'delayed' applies each gradient one step late. 'immediate'
    gives the numbers of AdamW without clipping, and takes no step back: it needs undo=False and check_finite=False."""
    begin: str = "step"
    """When 'immediate' steps a chunk whose gradients have arrived. In 'step': in `step`, and those before at once. In
    'backward': already in the backward before, the last of `accumulation`; `step` then ends what cannot be skipped or
    forgotten any more, and what the optimizer has is not to be read or changed between the two."""
    wire: str | None = None
    """Gradients are sent in 'bf16' or 'fp32'. None: BF16 parameters' in BF16, others' in FP32."""
    accumulation: int = 1
    """Backward passes of a window. What all but the last send is added up beside the next one, and 'speculative' steps
    on what the last one sends. A window may be shorter; `land` before gradients are looked at then. With
    begin='backward' it must not be longer."""
    delay_from: int = 1000
    """'delayed' begins after this many applied steps: early steps change the weights most."""
    chunk_bytes: int = CHUNK_BYTES
    """Bound of a chunk's FP32 weights."""
    free_bytes: int | None = None
    """Device memory to free. None offloads everything."""
    max_grad_norm: float | None = None
    """Clip the L2 norm of all gradients to this, as `torch.nn.utils.clip_grad_norm_` does."""
    check_finite: bool = True
    """Skip a step whose gradients' norm is not finite, unless a loss scaler has looked at them."""
    undo: bool = True
    """Keep the state before a step, 12 bytes of host memory per value, so that a step that fails is taken back."""
    cast: str = "auto"
    """BF16 and FP16 weights are rounded on the 'host', which sends half the bytes, or on the 'device', which leaves the
    host more of its memory's bandwidth for AdamW. The bits are the same. 'auto' is the side that `rates` speak for."""
    rates: Rates | None = None
    """Measured by `calibrate`. Without them 'auto' rounds on the device: a link of 16 lanes sends FP32 weights several
    times as fast as the host steps them."""

    def __post_init__(self) -> None:
        check_member("mode", self.mode, MODES)
        if self.wire is not None:
            check_member("wire", self.wire, tuple(WIRES))
        check_member("begin", self.begin, ("step", "backward"))
        if self.begin == "backward" and self.mode != "immediate":
            passed = f"begin='backward' with mode={self.mode!r}"
            raise ConfigError(
                explain(passed, "mode='immediate' with it", "Take 'speculative', which can be taken back")
            )
        check_member("cast", self.cast, ("auto", "host", "device"))
        for name in ("accumulation", "delay_from", "chunk_bytes", "free_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name == "free_bytes"):
                passed = f"{name}={value!r}"
                raise ConfigError(explain(passed, "whole numbers", "Write for example 64 << 20 for 64 MiB"))
        if self.mode == "immediate":
            self._check_immediate()
        elif self.mode != "sync" and not self.undo:
            passed = f"mode={self.mode!r} with undo=False"
            change = "Keep undo=True: these modes put chunks back as a matter of course"
            raise ConfigError(explain(passed, "undo=True, or mode='sync'", change))
        if self.mode == "delayed" and self.free_bytes is not None:
            passed = f"mode='delayed' with free_bytes={self.free_bytes}"
            change = "Offload everything: what stays on the device could not be taken back with the rest"
            raise ConfigError(explain(passed, "free_bytes=None, or another mode", change))
        if self.accumulation < 1 or self.delay_from < 0:
            passed = f"accumulation={self.accumulation} and delay_from={self.delay_from}"
            raise ConfigError(explain(passed, "at least 1, and at least 0", "Count whole passes and steps"))
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            passed = f"max_grad_norm={self.max_grad_norm!r}"
            raise ConfigError(explain(passed, "a number above 0, or None", "Leave it out to clip nothing"))

    def _check_immediate(self) -> None:
        if self.undo or self.check_finite or self.max_grad_norm is not None:
            passed = (
                f"mode='immediate' with undo={self.undo}, check_finite={self.check_finite} and "
                f"max_grad_norm={self.max_grad_norm}"
            )
            change = "A chunk is stepped before the other gradients are seen: pass these, or take 'speculative'"
            raise ConfigError(explain(passed, "undo=False, check_finite=False, max_grad_norm=None", change))


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the last step did."""

    applied: bool
    reason: str | None = None
    """Why it was skipped: 'no_grads', 'nonfinite', or 'scaler' when a loss scaler said so."""
    grad_norm: float | None = None
    """L2 norm of the unscaled gradients before clipping, where it was computed."""
    factor: float = 1.0
    """The gradients were multiplied by this: unscaled and clipped."""
    redone: int = 0
    """How often 'speculative' stepped a chunk on a wrong guess or too early, and then again."""
