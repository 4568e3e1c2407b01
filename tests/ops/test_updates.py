import pytest
import torch

from deepseek_mp.ops.updates import FATE_FIELDS, effective_quality, kept_by_nearest, lost_share, update_fate


def fate(weight, update, **options):
    return dict(zip(FATE_FIELDS, update_fate(weight, update, **options).tolist(), strict=True))


def test_half_a_step_is_where_nearest_rounding_begins_to_keep():
    weight = torch.full((4,), 1.0)
    update = torch.tensor([0.0, 2**-9, 2**-8, 2**-8 + 2**-16])  # the step above 1 is 2**-7; a tie goes to even
    kept = kept_by_nearest(weight, update)
    assert kept.tolist() == [0.0, 0.0, 0.0, 2**-7]
    assert lost_share(kept, update).item() == pytest.approx(2 / 3)


def test_quality_is_one_if_nothing_is_lost_and_zero_if_all_is():
    weight = torch.ones(100)
    assert fate(weight, torch.full((100,), 0.25))["edq"] == 1
    small = fate(weight, torch.full((100,), 1e-4))
    assert (small["lost"], small["edq"]) == (1, 0)
    assert effective_quality(torch.tensor([1e-25, 0.0]), torch.tensor([1e-25, 1e-25])).item() == pytest.approx(0.5)


def test_other_ways_to_write_keep_what_nearest_loses():
    torch.manual_seed(0)
    weight, direction = torch.randn(100_000), torch.randn(100_000)
    small = fate(weight, 1e-4 * direction)
    assert small["edq"] < 0.9
    assert small["edq_sr"] == pytest.approx(1, abs=0.05)
    assert small["edq_kahan"] == pytest.approx(1, abs=1e-3)
    assert fate(weight, 1e-8 * direction)["edq_kahan"] < 0.9


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_psi_is_the_variance_that_rounding_by_chance_adds(size):
    """Against the variance of many such roundings, one for each element."""
    torch.manual_seed(0)
    weight = torch.full((200_000,), 1.3).bfloat16().float()
    update = torch.full_like(weight, size)
    found = fate(weight, update)
    step = 2**-7
    part = size / step % 1
    assert found["psi"] == pytest.approx(part * (1 - part) * step**2 / size**2, rel=1e-3)
    from deepseek_mp.ops.stored import random_bits, round_by_bits

    rounded = round_by_bits(weight + update, random_bits([weight.numel()], [0], [1], seed=0)[0]).float()
    assert found["psi"] == pytest.approx((rounded.var() / size**2).item(), rel=0.1)


def test_psi_grows_as_updates_shrink_and_as_less_of_them_is_noise():
    torch.manual_seed(0)
    weight, direction = torch.randn(10_000), torch.randn(10_000)
    psi = [fate(weight, size * direction)["psi"] for size in (1e-3, 1e-4, 1e-5)]
    assert psi[1] == pytest.approx(10 * psi[0], rel=0.3)
    assert psi[2] == pytest.approx(10 * psi[1], rel=0.1)
    assert fate(weight, 1e-3 * direction, noise_fraction=0.5)["psi"] == pytest.approx(2 * psi[0])


def test_ratio_and_sizes_beyond_the_squares_of_fp32():
    weight = torch.full((10,), 1e-20)
    found = fate(weight, 1e-22 * torch.arange(1, 11))
    assert all(torch.isfinite(torch.tensor(found[name])) for name in FATE_FIELDS)
    assert found["ratio"] == pytest.approx(1e-2 * (385 / 10) ** 0.5, rel=1e-3)


def test_nothing_is_known_without_an_update():
    for count in (0, 5):
        found = update_fate(torch.ones(count), torch.zeros(count))
        assert found[:5].isnan().all()
