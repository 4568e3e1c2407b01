"""Whether what is launched on a device now is recorded into a graph, to be replayed without Python."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """What a graph reads must outlive it, and no kernel can be loaded meanwhile: that breaks off the recording."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    asked = getattr(module, "is_current_stream_capturing", None)
    return asked is not None and bool(asked())
