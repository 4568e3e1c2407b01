"""The share that is offloaded is the largest one whose predicted step is short enough."""

from dataclasses import replace

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import OffloadSettings
from deepseek_mp.optim.offload.schedule import Rates, Work, chunks, predict, split
from deepseek_mp.optim.offload.share import free_within

SIZES = [10_000_000] * 100
RATES = Rates(down=50e9, up=40e9, cpu=100e9)
WORK = Work(forward_backward=1.0, device_step=0.02)


def time_of(free, work=WORK):
    return predict(split(chunks(SIZES), free_bytes=free, bytes_per_value=14), RATES, work).total


@pytest.mark.parametrize("slower", [1.05, 1.2, 1.5])
@pytest.mark.parametrize("mode", ["sync", "speculative", "immediate"])
def test_is_the_largest_that_is_allowed(slower, mode):
    work = replace(WORK, mode=mode, keep=mode != "immediate")
    found, chunk = free_within(SIZES, RATES, work, slower=slower), 10_000_000 * 14
    assert 0 < found <= 100 * chunk
    assert time_of(found, work) <= slower * 1.02
    assert found == 100 * chunk or time_of(found + chunk, work) > slower * 1.02
    assert OffloadSettings(free_bytes=found).free_bytes == found


def test_a_faster_host_is_given_more_and_a_slow_one_nothing():
    some = free_within(SIZES, RATES, WORK)
    assert some < free_within(SIZES, replace(RATES, cpu=200e9), WORK)
    assert free_within(SIZES, replace(RATES, cpu=1e8), WORK) == 0
    assert free_within(SIZES, replace(RATES, cpu=1e13), WORK) == 14 * sum(SIZES)
    assert some < free_within(SIZES, RATES, replace(WORK, mode="speculative"))


def test_refuses():
    with pytest.raises(ConfigError, match=r"slower=0\.9"):
        free_within(SIZES, RATES, WORK, slower=0.9)
    with pytest.raises(ConfigError, match="mode='delayed'"):
        free_within(SIZES, RATES, replace(WORK, mode="delayed"))
