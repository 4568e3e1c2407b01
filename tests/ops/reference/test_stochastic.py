"""Stochastic rounding: the random numbers against published ones, and what must hold of any unbiased rounding."""

import pytest
import torch

from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.layouts import ALIGNMENT, padded_rows
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.reference.quantise import quantise
from deepseek_mp.ops.reference.stochastic import philox, round_stochastically, uniform
from deepseek_mp.precision import FORMATS

FP8 = ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"]
SIGMAS = 5.0


def cast(x, seed, granularity="tensor", format="fp8_e4m3", *, power_of_two=False):
    drawn = None if seed is None else torch.tensor(seed)
    return quantise(x, Cast(format, granularity, power_of_two, True, True), seed=drawn)


def bits(made):
    return [tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in made]


def same(ours, expected):
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(bits(ours), bits(expected), strict=True)
    )


def values_of(format):
    """All finite numbers of the format, in order, in float64."""
    every = torch.arange(256, dtype=torch.uint8).view(torch_dtype(format)).double()
    return every[every.isfinite()].unique()


def neighbours(x, format):
    """The largest number of the format up to x and the smallest from x on, in float64."""
    known, exact = values_of(format), x.double()
    above = torch.searchsorted(known, exact.contiguous())
    upper = known[above]
    return torch.where(upper == exact, upper, known[(above - 1).clamp_min(0)]), upper


def drawn(format, seed, count=4096):
    """Numbers of either sign in all binades of the format, its subnormal ones included, and below them."""
    found, generator = FORMATS[format], torch.Generator().manual_seed(seed)
    low, high = torch.tensor([found.smallest_subnormal / 16, found.max]).log2()
    x = 2 ** (low + (high - low) * torch.rand(count, generator=generator))
    return (x * torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1)).clamp(-found.max, found.max)


# -- the random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    made = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in made] == expected


@pytest.mark.parametrize("seed", [0, 3, -1, 2**63 - 1, -(2**63)])
def test_each_place_has_the_number_of_its_counter_and_word(seed):
    made = uniform(torch.tensor(seed), 16, 48)
    for i, k in ((0, 0), (3, 47), (4, 0), (15, 11)):
        counter = (torch.tensor(i // 4 * 48 + k), *[torch.tensor(0)] * 3)
        words = philox(counter, (torch.tensor(seed % 2**32), torch.tensor(seed % 2**64 >> 32)))
        assert float(made[i, k]) == (int(words[i % 4]) >> 8) / 2**24


def test_the_numbers_are_uniform_and_those_of_two_seeds_independent():
    one, other = uniform(torch.tensor(1), 512, 512).double(), uniform(torch.tensor(2**32 + 1), 512, 512).double()
    assert ((one >= 0) & (one < 1)).all()
    counts = torch.histc(one, 64, 0, 1)
    expected = one.numel() / 64
    assert ((counts - expected).square() / expected).sum() < 63 + SIGMAS * (2 * 63) ** 0.5
    neighbour = one.roll(1, 0), one.roll(1, 1), one.roll(4, 0), other
    for numbers in neighbour:
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), numbers.flatten()]))[0, 1])) < SIGMAS / 512


# -- the choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("seed", range(3))
def test_results_are_one_of_both_neighbours_and_each_of_them_sometimes(format, seed):
    x = drawn(format, seed)
    lower, upper = neighbours(x, format)
    assert ((lower <= x) & (x <= upper) & (lower < upper)).all()
    made = round_stochastically(x, FORMATS[format], torch.rand(x.shape)).double()
    assert ((made == lower) | (made == upper)).all()
    assert 0.4 < float((made == upper).double().mean()) < 0.6


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_many_draws_is_the_number(format, seed):
    """Each number's mean by its own deviation: their sum for a bias, their squares for the fraction itself."""
    found, draws = FORMATS[format], 1024
    x = drawn(format, seed)
    lower, upper = neighbours(x, format)
    fraction = (x - lower) / (upper - lower)
    x, lower, upper, fraction = (t[(fraction > 0.02) & (fraction < 0.98)] for t in (x, lower, upper, fraction))
    made = torch.stack([round_stochastically(x, found, torch.rand(x.shape)).double() for _ in range(draws)])
    deviation = (upper - lower) * (fraction * (1 - fraction) / draws).sqrt()
    z = (made.mean(0) - x) / deviation
    for part in (x.abs() < found.smallest_normal, x.abs() >= found.smallest_normal, x > 0, x < 0):
        count = int(part.sum())
        assert count > 300
        assert abs(float(z[part].sum())) < SIGMAS * count**0.5
        assert abs(float(z[part].square().mean()) - 1) < SIGMAS * (2 / count) ** 0.5


@pytest.mark.parametrize("format", FP8)
def test_the_end_of_the_random_numbers_decides(format):
    """A number a quarter of the way up rises for what is less than a quarter, and sinks for a quarter itself."""
    found = FORMATS[format]
    for at in (found.smallest_normal * 4, found.smallest_subnormal, 0.0):
        step = max(at * found.epsilon, found.smallest_subnormal)
        x = torch.full((4,), at + step / 4)
        made = round_stochastically(x, found, torch.tensor([0.0, 0.25 - 2**-24, 0.25, 1 - 2**-24]))
        assert made.tolist() == [at + step, at + step, at, at]
        assert torch.equal(round_stochastically(-x, found, torch.tensor([0.0, 0.2, 0.25, 0.9])), -made)


@pytest.mark.parametrize("format", FP8)
def test_numbers_of_the_format_stay(format):
    known = values_of(format).float()
    for number in (0.0, 2.0**-24, 1 - 2.0**-24):
        assert torch.equal(round_stochastically(known, FORMATS[format], torch.full_like(known, number)), known)


# -- the cast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("format", FP8)
def test_the_cast_is_unbiased_between_the_neighbours_of_scaled_values(granularity, format):
    """Scales that are powers of two make the scaled values known exactly."""
    x, draws = torch.randn(128, 128) * 10.0 ** torch.linspace(-3, 0, 128)[:, None], 64
    _, s, _, st = cast(x, None, granularity, format, power_of_two=True)
    for layout, seen, scale in ((0, x, s), (2, x.t(), st)):
        whole = dequantise(torch.ones(seen.shape), scale, granularity)
        lower, upper = neighbours(seen / whole, format)
        sums = torch.zeros(seen.shape, dtype=torch.float64)
        for seed in range(draws):
            made = cast(x, seed, granularity, format, power_of_two=True)[layout].double()
            assert ((made == lower) | (made == upper)).all()
            sums += made
        gap = upper - lower
        fraction = torch.where(gap > 0, ((seen / whole) - lower) / gap.clamp_min(1e-30), 0)
        variance = (gap.square() * fraction * (1 - fraction)).sum() / draws
        assert abs(float((sums / draws - seen / whole).sum())) < SIGMAS * float(variance.sqrt())


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_scales_are_those_of_rounding_to_the_nearest(granularity):
    x = torch.randn(100, 256)
    nearest, by_chance = cast(x, None, granularity), cast(x, 1, granularity)
    assert torch.equal(by_chance[1], nearest[1])
    assert torch.equal(by_chance[3], nearest[3])
    assert not torch.equal(bits(by_chance)[0], bits(nearest)[0])


@pytest.mark.parametrize("format", FP8)
def test_values_that_fp8_holds_are_cast_to_themselves(format):
    known = values_of(format).float()
    x = torch.cat([known, torch.zeros(256 - known.numel())]).view(16, 16)
    made = cast(x, 5, format=format)
    assert float(made[1]) == 1
    assert torch.equal(made[0].float(), x)
    assert torch.equal(made[2].float(), x.t())


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_the_seed_alone_decides(granularity):
    x = torch.randn(100, 256)
    first = cast(x, 3, granularity)
    torch.manual_seed(99)
    assert same(first, cast(x, 3, granularity))
    assert not torch.equal(bits(first)[0], bits(cast(x, 4, granularity))[0])
    assert not torch.equal(bits(first)[2], bits(cast(x, 3 + 2**32, granularity))[2])


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_one_layout_is_that_of_both(granularity):
    x, seed = torch.randn(100, 256), torch.tensor(3)
    both = bits(cast(x, 3, granularity))
    rows = bits(quantise(x, Cast("fp8_e4m3", granularity, False, True, False), seed=seed))
    columns = bits(quantise(x, Cast("fp8_e4m3", granularity, False, False, True), seed=seed))
    assert torch.equal(rows[0], both[0])
    assert torch.equal(columns[2], both[2])


@pytest.mark.parametrize("granularity", ["tensor", "128x128"])
def test_layouts_of_one_scale_are_rounded_to_equal_values(granularity):
    q, _, qt, _ = bits(cast(torch.randn(256, 128), 3, granularity))
    assert torch.equal(q, qt.t())


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_becomes_nan_where_it_does_so_to_the_nearest(granularity, format, bad):
    x = torch.randn(128, 256)
    x[5, 7] = bad
    made, nearest = cast(x, 1, granularity, format), cast(x, None, granularity, format)
    assert made[0].float()[5, 7].isnan()
    for ours, expected in zip(made, nearest, strict=True):
        assert torch.equal(ours.float().isnan(), expected.float().isnan())


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("count", [0, 5])
def test_zeros_and_added_rows_stay_zeros(granularity, format, count):
    x = torch.randn(count, 256)
    x[1:3] = 0
    q, _, qt, _ = cast(x, 1, granularity, format)
    assert q.shape == (padded_rows(count, granularity), 256)
    rows = torch.ones(q.shape[0], dtype=torch.bool)
    rows[:count] = (x != 0).any(1)
    rows[count:] = False
    assert not q.float()[~rows].any()
    assert not qt.float()[:, ~rows].any()


@pytest.mark.parametrize("format", FP8)
def test_maxima_become_the_largest_value_and_nothing_lies_beyond(format):
    x = torch.rand(4096, 16) * 10.0 ** (torch.rand(4096, 1) * 60 - 30)
    made = cast(x, 1, "row", format)[0].float()
    largest = FORMATS[format].max
    # Of a maximum that the scale puts a hair below the largest value a few in a million become the one before it.
    assert (made.amax(1) == largest).float().mean() > 0.999
    assert made.isfinite().all()


@pytest.mark.parametrize("format", FP8)
def test_numbers_that_vanish_become_no_nan(format):
    """Minus zero, a number in OCP's formats, is the byte of NaN in the fnuz ones."""
    x = torch.full((128, 128), -1e-20)
    x[0], x[3, 5] = 1.0, -0.0
    q, _, qt, _ = cast(x, 1, format=format)
    assert (q.float()[1:] == 0).all()
    assert (qt.float()[:, 1:] == 0).all()
