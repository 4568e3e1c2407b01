import pytest
import torch

from deepseek_mp.ops.stored import joined, random_bits, round_by_bits, split


def drawn(size, *, stream=0, step=0, seed=0):
    return random_bits([size], [stream], [step], seed=seed)[0]


def test_bits_are_uniform_and_of_sixteen():
    bits = drawn(1 << 16)
    assert bits.dtype is torch.int32
    assert bits.min() >= 0
    assert bits.max() < 1 << 16
    share = torch.stack([(bits >> place & 1).float().mean() for place in range(16)])
    assert (share - 0.5).abs().max() < 0.01
    assert (bits.float()[1:] * bits.float()[:-1]).mean().item() == pytest.approx((2**15) ** 2, rel=0.01)


def test_every_count_has_its_own_bits():
    first = drawn(4096)
    assert torch.equal(first, drawn(4096))
    for other in (drawn(4096, step=1), drawn(4096, stream=1), drawn(4096, seed=1), drawn(4096, seed=1 << 32)):
        assert (first == other).float().mean() < 0.01


def test_tensors_drawn_together_get_the_bits_they_get_alone():
    sizes, streams, steps = [5, 16, 33], [7, 0, 2], [torch.tensor(3), 4, 5]
    together = random_bits(sizes, streams, steps, seed=9)
    for size, stream, step, bits in zip(sizes, streams, steps, together, strict=True):
        assert torch.equal(bits, drawn(size, stream=stream, step=int(step), seed=9))


def test_the_mean_of_stochastic_rounding_is_the_number():
    x = torch.tensor([1.001, -1.001, 3e-40, 0.3, 1e30])
    many = torch.stack([round_by_bits(x, drawn(5, step=step)).float() for step in range(4000)])
    low, high = many.amin(0), many.amax(0)
    assert torch.equal((many == low) | (many == high), torch.ones_like(many, dtype=torch.bool))
    assert ((many.mean(0) - x).abs() < 0.05 * (high - low)).all()


def test_what_bf16_holds_is_not_rounded():
    x = torch.randn(4096).bfloat16()
    x[:5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max])
    assert torch.equal(round_by_bits(x.float(), drawn(4096)).view(torch.int16), x.view(torch.int16))


def test_nan_stays_nan():
    raw = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    for bits in (0, 0xFFFF):
        assert round_by_bits(raw.view(torch.float32), torch.full((3,), bits, dtype=torch.int32)).isnan().all()


def test_the_memory_format_does_not_change_the_numbers():
    x = torch.randn(4, 3, 5, 5)
    bits = drawn(x.numel())
    assert torch.equal(round_by_bits(x, bits), round_by_bits(x.to(memory_format=torch.channels_last), bits))


def test_split_keeps_sixteen_bits():
    x = torch.randn(4096)
    value, lacking = split(x)
    assert torch.equal(value, x.bfloat16())
    assert ((joined(value, lacking) - x).abs() <= x.abs() * 2**-17).all()
