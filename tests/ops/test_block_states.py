import pytest
import torch

from deepseek_mp.ops.block_states import BLOCK, SIGNED, UNSIGNED, decode, dither, empty_blocks, encode, part

KINDS = [SIGNED, UNSIGNED]


def moments(kind, count=1000):
    """Over four decades within a block; magnitudes for second moments."""
    x = torch.randn(count) * 10 ** (-4 * torch.rand(count))
    return x if kind is SIGNED else x.abs()


def turned(x, kind, *, start=0, step):
    """Encoded as in a step."""
    return encode(x, kind, dither(start, x.numel(), step, "cpu"))


def by_block(x, scales):
    return scales.repeat_interleave(BLOCK)[: x.numel()]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_values_come_back_within_a_step(kind, count):
    x = moments(kind, count)
    blocks = turned(x, kind, step=3)
    assert blocks.codes.dtype is kind
    assert blocks.codes.shape == (count,)
    assert blocks.scales.shape == (-(-count // BLOCK),)
    tops = by_block(x, blocks.scales)
    size, back = x.abs() / tops, decode(blocks)
    # The derivative of the code at a size: neighbours are as far apart.
    steps = 2 / 127 * size.sqrt() if kind is SIGNED else 4 / 255 * size**0.75
    assert ((back - x).abs() / tops <= steps + 1e-4).all()
    assert torch.equal(back[x.abs() == tops], x[x.abs() == tops])


@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_hold_stays_whatever_the_step(kind):
    blocks = turned(moments(kind), kind, step=1)
    again = encode(decode(blocks), kind)
    assert torch.equal(again.codes, blocks.codes)
    assert torch.equal(again.scales, blocks.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_steps_is_the_number(kind):
    x = moments(kind)
    large = x.abs() > 1e-8 * by_block(x, encode(x, kind).scales)
    mean = sum(decode(turned(x, kind, step=step)).double() for step in range(500)) / 500
    tops = by_block(x, encode(x, kind).scales).double()
    assert ((mean - x).abs() / tops)[large].max() < 1e-4
    nearest = decode(encode(x, kind))
    assert ((nearest - x).abs() / tops).max() > 1e-3


def test_a_second_moment_above_zero_stays_above_zero():
    x = torch.tensor([1.0, 1e-20, 1e-44, 0.0])
    assert ((decode(turned(x, UNSIGNED, step=0)) > 0) == (x > 0)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(kind, bad):
    x = torch.ones(3 * BLOCK)
    x[BLOCK] = bad
    spoiled = decode(encode(x, kind)).isnan().view(3, BLOCK)
    assert spoiled.all(1).tolist() == [False, True, False]
    assert not spoiled[0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [0.0, 1e-42, 1e-30, 1e30])
def test_sizes_at_the_ends_of_fp32(kind, top):
    x = torch.full((BLOCK,), top)
    assert torch.equal(decode(turned(x, kind, step=5)), x)


def test_parts_are_encoded_as_in_the_whole():
    x = moments(SIGNED, 1000)
    whole = turned(x, SIGNED, step=7)
    for start, stop in ((0, 512), (512, 1000)):
        own = turned(x[start:stop], SIGNED, start=start, step=7)
        assert torch.equal(own.codes, part(whole, start, stop).codes)
        assert torch.equal(own.scales, part(whole, start, stop).scales)


def test_the_step_may_be_on_the_device_and_long():
    for step in (0, 1, 1 << 31, 12345678901):
        assert torch.equal(dither(5, 100, step, "cpu"), dither(5, 100, torch.tensor(step), "cpu"))


def test_dither_is_even_over_steps_and_over_places():
    over_steps = torch.stack([dither(77, 1, step, "cpu") for step in range(1000)]).flatten()
    for u in (over_steps, dither(0, 1000, 3, "cpu")):
        assert u.min() > 0
        assert u.max() < 1
        # Every interval of a tenth has its share, but for three: random numbers would miss it by thirty.
        assert (torch.histc(u, 10, 0, 1) - 100).abs().max() <= 3


def test_empty():
    assert decode(empty_blocks(0, SIGNED, torch.device("cpu"))).shape == (0,)
    assert encode(torch.zeros(0), UNSIGNED).scales.shape == (0,)
