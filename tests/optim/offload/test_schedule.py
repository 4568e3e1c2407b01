"""The schedule: chunks, their place, which side rounds, and the predicted time of a step."""

from dataclasses import replace

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload.schedule import (
    BESIDE_BYTES,
    Rates,
    Work,
    cast_on_host,
    chunks,
    host_bytes,
    predict,
    split,
)

RATES = Rates(down=50e9, up=40e9, cpu=100e9)
WORK = Work(forward_backward=1.0, keep=False)


def test_chunks_are_bounded_and_in_the_order_of_arrival():
    parts = chunks([10, 20, 30, 5, 100, 1], limit_bytes=160)
    assert [chunk.members for chunk in parts] == [(5,), (4,), (3, 2), (1, 0)]
    assert [chunk.number for chunk in parts] == [0, 1, 2, 3]
    assert [chunk.values for chunk in parts] == [1, 100, 35, 30]
    assert all(chunk.nbytes <= 160 for chunk in parts if len(chunk.members) > 1)


def test_chunks_hold_every_parameter_once():
    sizes = [(7 * i) % 50 + 1 for i in range(40)]
    for limit in (4, 100, 10_000):
        members = [member for chunk in chunks(sizes, limit_bytes=limit) for member in chunk.members]
        assert members == list(reversed(range(40)))
    assert chunks([]) == ()
    with pytest.raises(ConfigError, match="chunk_bytes=3"):
        chunks([1], limit_bytes=3)


def test_what_arrives_first_is_offloaded_first():
    parts = chunks([10] * 8, limit_bytes=40)
    half = split(parts, free_bytes=40 * 12, bytes_per_value=12)
    assert [chunk.number for chunk in half.host] == [0, 1, 2, 3]
    assert (half.fraction, half.freed_bytes) == (0.5, 480)
    more = split(parts, free_bytes=481, bytes_per_value=12)
    assert len(more.host) == 5
    assert split(parts, free_bytes=None, bytes_per_value=12).fraction == 1.0
    assert split(parts, free_bytes=0, bytes_per_value=12).fraction == 0.0
    for wrong in (-1, 961):
        with pytest.raises(ConfigError, match="0 to 960"):
            split(parts, free_bytes=wrong, bytes_per_value=12)


def test_the_slower_side_does_not_round():
    assert cast_on_host(Rates(down=50e9, up=5e9, cpu=100e9))
    assert not cast_on_host(Rates(down=400e9, up=400e9, cpu=100e9))


def parts_of(values):
    return split(chunks([values // 10] * 10, limit_bytes=values // 10 * 4), free_bytes=None, bytes_per_value=14)


LAST = 0.1 * (4 / 40 + 2 / 50 + 10 / 100)
"""Up, down and added up: the last chunk's part of the tail."""
LAST_STEPPED = 0.1 * (2 / 50 + 30 / 100)
"""Down and stepped, in 'immediate'."""


def test_each_mode_hides_what_it_can():
    placed = parts_of(1_000_000_000)
    sync = predict(placed, RATES, WORK)
    assert sync.down == pytest.approx(0.04)
    assert sync.host == pytest.approx(0.38)  # 38 bytes a value: 10 arrive, 28 step
    assert sync.total == pytest.approx(1.0 + 0.28 + LAST)
    late = predict(placed, RATES, replace(WORK, mode="delayed"))
    assert late.total == pytest.approx(1.0 + LAST)
    speculative = predict(placed, RATES, replace(WORK, mode="speculative"))
    assert speculative.total == pytest.approx(1.0 + 0.1 * 28 / 100 + LAST)
    assert late.total < speculative.total < sync.total
    assert sync.bound == "device"


def test_the_longest_part_counts():
    placed = parts_of(10_000_000_000)
    late = predict(placed, RATES, replace(WORK, mode="delayed"))
    assert late.bound == "host"
    assert late.total == pytest.approx(3.8 + late.tail)
    speculative = predict(placed, RATES, replace(WORK, mode="speculative"))
    assert speculative.total == pytest.approx(1 / 3 + 3.8 + speculative.tail)  # not before backward
    slow = predict(placed, replace(RATES, down=1e9), replace(WORK, micro_steps=2, wire="fp32"))
    assert slow.bound == "down"
    assert slow.down == pytest.approx(80.0)
    assert slow.total == pytest.approx(40 + 1 / 6 + 40 + 4 + 12 / 100 + slow.tail)


def test_keeping_the_state_costs_its_bytes():
    placed, kept = parts_of(1_000_000_000), replace(WORK, keep=True)
    assert predict(placed, RATES, kept).host == pytest.approx(0.74)
    slowly = replace(RATES, keep=36e9)
    assert predict(placed, slowly, kept).host == pytest.approx(1.38)
    assert predict(placed, slowly, WORK).host == pytest.approx(0.38)


def test_the_state_is_kept_beside_the_device_as_far_as_there_is_time():
    placed, kept = parts_of(1_000_000_000), replace(WORK, keep=True)
    free = predict(placed, RATES, WORK).total
    assert predict(placed, RATES, kept).total == pytest.approx(free)
    slowly = replace(RATES, keep=18e9)
    late = predict(placed, slowly, kept)
    assert late.total == pytest.approx(0.1 + 2.0 + late.tail)  # added up and kept, then the step
    both = predict(placed, slowly, replace(kept, mode="speculative"))
    assert both.total == pytest.approx(0.1 + 2.0 + 0.28 + both.tail)


def test_a_norm_to_clip_by_is_waited_for():
    placed = parts_of(1_000_000_000)
    for mode in ("sync", "speculative", "delayed"):
        plain, clipped = (predict(placed, RATES, replace(WORK, mode=mode, clip=clip)) for clip in (False, True))
        assert clipped.total - plain.total == pytest.approx(0.04)
        assert clipped.host - plain.host == pytest.approx(0.04)
    assert host_bytes(replace(WORK, clip=True)) - host_bytes(WORK) == 4


def test_micro_batches_are_added_beside_the_device_and_else_waited_for():
    placed = parts_of(1_000_000_000)
    one, three = predict(placed, RATES, WORK), predict(placed, RATES, replace(WORK, micro_steps=3))
    assert three.down == pytest.approx(3 * one.down)
    assert three.host - one.host == pytest.approx((14 + 14) / 100)  # FP32 for a moment, and added
    assert three.total - one.total == pytest.approx(0.1 * 4 / 100)  # the last chunk is added, not taken over
    short = predict(placed, RATES, replace(WORK, micro_steps=3, forward_backward=0.03))
    assert short.total == pytest.approx(0.1 + 0.14 + 0.01 / 3 + 0.14 + short.tail)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("wire", ["bf16", "fp32"])
def test_immediate_does_not_write_the_sum_and_read_it_again(micro, wire):
    placed, rates = parts_of(10_000_000_000), replace(RATES, keep=None)
    late = replace(WORK, micro_steps=micro, wire=wire, mode="speculative")
    now = replace(late, mode="immediate")
    assert host_bytes(late) - host_bytes(now) == (12 if wire == "fp32" else 8)
    saved = 12 if wire == "fp32" and micro == 1 else 8  # a sum of earlier ones is read
    theirs, ours = predict(placed, rates, late), predict(placed, rates, now)
    assert theirs.host - ours.host == pytest.approx(10 * saved / 100)


def test_weights_that_the_device_rounds_go_up_in_fp32():
    placed = parts_of(1_000_000_000)
    late = replace(WORK, mode="delayed")
    found, rounded = predict(placed, RATES, late), predict(placed, RATES, replace(late, cast=True))
    assert found.tail - rounded.tail == pytest.approx(0.1 * 2 / 40)
    assert (found.host, rounded.host) == (pytest.approx(0.38), pytest.approx(0.46))


def test_gradients_land_at_a_rate_of_their_own():
    placed, slowly = parts_of(10_000_000_000), replace(RATES, land=20e9)
    for mode, more in (("sync", 4.0), ("speculative", 4.0), ("delayed", 4.0), ("immediate", 0.0)):
        work = replace(WORK, mode=mode)
        assert predict(placed, slowly, work).host - predict(placed, RATES, work).host == pytest.approx(more)


def test_a_host_that_is_late_anyway_ends_with_what_forward_reads_last():
    placed = parts_of(10_000_000_000)
    late = predict(placed, RATES, replace(WORK, mode="immediate"))
    first = 2 / 3 / 10 + 2 / 50  # of ten, on its way down behind its part of backward
    host, hidden = 10 * 30 / 100 + 4 / 40, 8 / 10 / 3  # beside the layers of the next forward but for two of ten
    assert late.total == pytest.approx(1 / 3 + first + host - hidden)
    assert late.after == pytest.approx(hidden)


def test_gradients_that_are_checked_land_at_another_rate():
    placed, slowly = parts_of(10_000_000_000), replace(RATES, land=50e9, check=20e9)
    for change, more in (({}, 4.0), ({"check": False}, 1.0), ({"clip": True}, 1.0), ({"mode": "immediate"}, 0.0)):
        work = replace(WORK, **change)
        assert predict(placed, slowly, work).host - predict(placed, RATES, work).host == pytest.approx(more)


def test_what_forward_reads_first_is_waited_for_where_it_goes_up_last():
    placed = parts_of(1_000_000_000)
    found = predict(placed, replace(RATES, up=4e9), replace(WORK, mode="immediate"))
    behind = 1.0 - BESIDE_BYTES / 2 / 1_000_000_000  # of its way up: the rest went beside backward
    assert (found.total, found.after) == (pytest.approx(1.0 + behind), 0.0)
    few = predict(parts_of(500_000_000), replace(RATES, up=2e9), replace(WORK, mode="immediate"))
    first = 2 / 3 / 10 + 0.05 * (2 / 50 + 30 / 100)  # of ten: down and stepped
    assert few.total == pytest.approx(1 / 3 + first + 1.0 - 8 / 10 / 3)


def test_in_immediate_layers_on_the_device_run_before_the_others_are_needed():
    parts = chunks([100_000_000] * 10, limit_bytes=400_000_000)
    placed = split(parts, free_bytes=7_000_000_000, bytes_per_value=14)
    work = replace(WORK, mode="immediate", device_step=0.2, forward_backward=0.03)
    host = 0.01 + 0.1 * (0.02 + 2 / 50) + 0.5 * 30 / 100  # begins behind forward, when the first of ten has arrived
    found, hidden = predict(placed, RATES, work), 8 / 10 * 0.01  # all but the two that forward reads last
    assert (found.total, found.after) == (pytest.approx(host + 0.01 - hidden), pytest.approx(hidden))
    long = predict(placed, RATES, replace(work, forward_backward=1.0))
    assert (long.total, long.after) == (pytest.approx(1.0 + 0.1), 0.0), "the device steps its own part meanwhile"


def test_weights_go_up_behind_backward_and_beside_the_next_forward():
    placed, work = parts_of(1_000_000_000), replace(WORK, mode="speculative")
    found = predict(placed, replace(RATES, up=10e9), work)
    assert found.after == pytest.approx(1.0 + 0.4 - found.total)
    slow = predict(placed, replace(RATES, up=4e9), work)
    assert slow.total == pytest.approx(1.0 + 1.0 - 1 / 3)
    assert slow.after == pytest.approx(1 / 3)
    assert predict(placed, RATES, replace(WORK, mode="sync")).after == 0.0


def test_what_stays_is_stepped_on_the_device():
    parts = chunks([10] * 10, limit_bytes=40)
    half = split(parts, free_bytes=50 * 14, bytes_per_value=14)
    assert predict(half, RATES, replace(WORK, device_step=0.2)).device == pytest.approx(1.1)
    nothing = split(parts, free_bytes=0, bytes_per_value=14)
    assert predict(nothing, RATES, replace(WORK, device_step=0.2)).total == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rates(down=0.0, up=1.0, cpu=1.0), "down=0.0"),
        (lambda: Rates(down=1.0, up=float("inf"), cpu=1.0), "up=inf"),
        (lambda: Rates(down=1.0, up=1.0, cpu=1.0, keep=-1.0), r"keep=-1\.0"),
        (lambda: Work(forward_backward=1.0, mode="late"), "mode='late'"),
        (lambda: Work(forward_backward=1.0, wire="fp16"), "wire='fp16'"),
        (lambda: Work(forward_backward=1.0, mode="immediate"), "mode='immediate' with keep=True"),
        (lambda: Work(forward_backward=1.0, mode="immediate", keep=False, clip=True), "and clip=True"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
