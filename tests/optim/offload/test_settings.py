"""The settings refuse what is not possible, with what to change."""

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import OffloadSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "async"}, "mode='async'. Allowed: 'sync', 'speculative', 'delayed'"),
        ({"wire": "fp8"}, "wire='fp8'"),
        ({"cast": "gpu"}, "cast='gpu'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"delay_from": -1}, "delay_from=-1"),
        ({"free_bytes": "1GB"}, "free_bytes='1GB'. Allowed: whole numbers. Write for example 64 << 20"),
        ({"chunk_bytes": 64e6}, "chunk_bytes=64000000.0"),
        ({"accumulation": None}, "accumulation=None"),
        ({"mode": "delayed", "undo": False}, "mode='delayed' with undo=False"),
        ({"mode": "delayed", "free_bytes": 1}, "mode='delayed' with free_bytes=1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        OffloadSettings(**options)


def test_the_default_is_exact():
    settings = OffloadSettings()
    assert (settings.mode, settings.undo, settings.check_finite, settings.free_bytes) == ("sync", True, True, None)
