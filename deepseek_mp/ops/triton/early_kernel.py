"""The place in a kernel that was launched early where it begins to need what kernels in front of it have written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_those_before(EARLY: tl.constexpr):
    """Loads before it are of what nothing in the calls writes (`ops.early_launch.unwritten`); stores come after it.

    Only after it is the next kernel told that it may begin: that one then knows all before this one to have ended.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
