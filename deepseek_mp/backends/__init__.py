"""What this machine can do: devices, their number formats, and the regions that set them. No math."""

from deepseek_mp.backends.base import Backend
from deepseek_mp.backends.capabilities import Capabilities, Combination, Identity
from deepseek_mp.backends.contexts import Fp32Mode, autocast, fp32_mode, math_mode
from deepseek_mp.backends.detect import backend_for, capabilities, default_device, numbered
from deepseek_mp.backends.low_precision import formats_of, fp8_recipe, nearest_recipe
from deepseek_mp.backends.measure import (
    available_memory_bytes,
    clear_overflow,
    energy_joules,
    out_of_memory_count,
    overflow_seen,
    peak_memory_bytes,
    peak_reserved_bytes,
    reset_peak_memory,
    synchronize,
)

__all__ = [
    "Backend",
    "Capabilities",
    "Combination",
    "Fp32Mode",
    "Identity",
    "autocast",
    "available_memory_bytes",
    "backend_for",
    "capabilities",
    "clear_overflow",
    "default_device",
    "energy_joules",
    "formats_of",
    "fp8_recipe",
    "fp32_mode",
    "math_mode",
    "nearest_recipe",
    "numbered",
    "out_of_memory_count",
    "overflow_seen",
    "peak_memory_bytes",
    "peak_reserved_bytes",
    "reset_peak_memory",
    "synchronize",
]
