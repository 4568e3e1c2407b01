"""One kind of FP8 as the other, over all codes: each value is the same, or the loss that is promised."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.ops.fp8_kinds import KINDS, to_kind

CODES = torch.arange(256, dtype=torch.uint8)
LARGEST = 0x7F  # of fnuz: 240
SCALES = [1.0, 3.7e-4, 2.0**-100, 1e30]


def codes(kind):
    """[256, 1]: each code a row of its own."""
    return CODES.view(KINDS[kind])[:, None]


def value(code, *, bias, nan):
    """What a byte means, by the specification: 1 sign, 4 exponent, 3 mantissa bits."""
    if code in nan:
        return float("nan")
    sign, exponent, mantissa = -1 if code & 0x80 else 1, (code >> 3) & 15, code & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent - bias) if exponent else mantissa / 8 * 2.0 ** (1 - bias)
    return sign * size


def test_the_codes_mean_what_the_specifications_say():
    ocp = [value(code, bias=7, nan=(0x7F, 0xFF)) for code in range(256)]
    fnuz = [value(code, bias=8, nan=(0x80,)) for code in range(256)]
    for kind, expected in (("ocp", ocp), ("fnuz", fnuz)):
        found = codes(kind).flatten().double()
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=0, equal_nan=True)
    assert max(found for found in ocp if found == found) == 448
    assert max(found for found in fnuz if found == found) == 240


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_the_same_in_the_other_kind(kind, scale):
    """In rows of one value, all of either kind are representable in the other: the scale is free."""
    other = next(name for name in KINDS if name != kind)
    before, scales = codes(kind), torch.full((256,), scale)
    q, made = to_kind(before, scales, other)
    assert q.dtype is KINDS[other]
    old = before.double() * scales.double()[:, None]
    new = q.double() * made.double()[:, None]
    torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    assert before.isnan().sum() == q.isnan().sum()


def test_bytes_stay_and_the_scale_makes_up_for_the_bias():
    special = torch.tensor([code in (0x7F, 0x80, 0xFF) for code in range(256)])
    for kind, other, factor in (("ocp", "fnuz", 2.0), ("fnuz", "ocp", 0.5)):
        q, scale = to_kind(codes(kind), torch.ones(256), other)
        assert torch.equal(q.view(torch.uint8).flatten()[~special], CODES[~special])
        assert torch.equal(scale[~special], torch.full((253,), factor))


def test_minus_zero_becomes_zero_and_nan_stays_nan():
    q, _ = to_kind(codes("ocp"), torch.ones(256), "fnuz")
    raw = q.view(torch.uint8).flatten()
    assert (raw[0x80], raw[0x7F], raw[0xFF]) == (0x00, 0x80, 0x80)
    q, _ = to_kind(codes("fnuz"), torch.ones(256), "ocp")
    assert q.view(torch.uint8).flatten()[0x80] == 0x7F


def test_a_row_with_240_keeps_its_scale_and_is_rounded_where_ocp_has_no_such_value():
    """One row of all codes, which has 240 in it."""
    row = CODES.view(KINDS["fnuz"])[None]
    q, scale = to_kind(row, torch.tensor([0.5]), "ocp")
    assert scale.tolist() == [0.5]
    old, new = row.double()[0], q.double()[0]
    steps = old / 2**-10
    lost = (old.abs() < 2**-6) & (steps % 2 == 1)
    torch.testing.assert_close(new[~lost], old[~lost], rtol=0, atol=0, equal_nan=True)
    assert int(lost.sum()) == 16
    assert torch.equal((new - old)[lost].abs(), torch.full((16,), 2.0**-10).double())
    assert torch.equal(new[lost] / 2**-9 % 2, torch.zeros(16).double())  # ties to even


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_value(kind):
    other = next(name for name in KINDS if name != kind)
    q, scale = codes(kind), torch.rand(256) + 0.1
    back, scales = to_kind(*to_kind(q, scale, other), kind)
    old, new = q.double() * scale[:, None], back.double() * scales[:, None]
    torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_rows_are_converted_apart_and_the_tensors_passed_stay():
    raw = torch.tensor([[1, LARGEST, 0x80], [1, 9, 0x80]], dtype=torch.uint8)
    q = raw.clone().view(KINDS["fnuz"])
    made, scale = to_kind(q, torch.tensor([4.0, 4.0]), "ocp")
    assert scale.tolist() == [4.0, 2.0]
    assert torch.equal(q.view(torch.uint8), raw)
    assert torch.equal(made.view(torch.uint8)[1], torch.tensor([1, 9, 0x7F], dtype=torch.uint8))


def test_the_same_kind_is_passed_through():
    q, scale = codes("ocp"), torch.ones(256)
    made, scales = to_kind(q, scale, "ocp")
    assert made is q
    assert scales is scale


def test_what_is_no_fp8_or_has_other_scales_is_refused():
    with pytest.raises(ConfigError, match=r"torch.float8_e5m2 to be of the kind 'ocp'\. Allowed: E4M3"):
        to_kind(torch.ones(2, 2).to(torch.float8_e5m2), torch.ones(2), "ocp")
    with pytest.raises(ConfigError, match="to be of the kind 'amd'"):
        to_kind(codes("ocp"), torch.ones(256), "amd")
    with pytest.raises(ShapeError, match=r"scales \[3\] for FP8 values \[256, 1\]"):
        to_kind(codes("ocp"), torch.ones(3), "fnuz")
