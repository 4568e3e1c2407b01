"""Max pools of uncompiled steps on a GPU: PyTorch's numbers, fewer bytes, and no waiting."""

from __future__ import annotations

import gc

import pytest
import torch
from no_waiting import no_waiting
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.trainer import eager_pools
from deepseek_mp.trainer.eager_pools import EagerPools

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch.cuda")]
IMAGES, SIZE, WIDTH = 16, 112, 64
OUTPUTS = IMAGES * WIDTH * (SIZE // 4) ** 2


@pytest.fixture(autouse=True)
def _small_pools_too(monkeypatch):
    monkeypatch.setattr(eager_pools, "LEAST_BYTES", 0)


def whole_numbers(*shape):
    return torch.randint(-4, 5, shape, device="cuda").to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [(3, 2, 1), (2, 2, 0), (5, 1, 2)])
def test_numbers_are_pytorch_s_and_a_byte_is_kept_for_each_output(dtype, how):
    pool, saved = nn.MaxPool2d(*how), []
    x = whole_numbers(4, 64, 33, 34).to(dtype).requires_grad_()
    expected = pool(x)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t)
    with EagerPools(pool, False).in_force(), hooks:
        values = pool(x)
    assert torch.equal(values, expected)
    assert saved == [values.numel()]
    g = whole_numbers(*values.shape).to(dtype)  # sums of them are exact in every type and order
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (values, expected)))


def test_second_derivatives_are_pytorch_s():
    pool, x = nn.MaxPool2d(3, 2, 1), torch.randn(2, 8, 17, 17, device="cuda")
    x = x.to(memory_format=torch.channels_last).requires_grad_()

    def penalty():
        (slope,) = torch.autograd.grad(pool(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    expected = penalty()
    with EagerPools(pool, False).in_force():
        torch.testing.assert_close(penalty(), expected)


class Net(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.again = again
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))

    def forward(self, x):
        y = checkpoint(self.stem, x, use_reentrant=False) if self.again else self.stem(x)
        return self.head(y)


def batch():
    generator = torch.Generator("cuda").manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, device="cuda", generator=generator)
    labels = torch.randint(0, 10, (IMAGES,), device="cuda", generator=generator)
    return images.to(memory_format=torch.channels_last), labels


def trained(mode, *, again=False):
    """The trainer, its losses, and what forward left allocated in the last step, when libraries have their memory."""
    held = []

    def loss_fn(output, target):
        held.append(torch.cuda.memory_allocated())
        return F.cross_entropy(output.float(), target)

    torch.manual_seed(0)
    model = Net(again).to(memory_format=torch.channels_last)
    trainer = MixedPrecisionTrainer(
        model, mode, loss_fn=loss_fn, device="cuda", statistics_every=None, monitor_every=1000, progress=False
    )
    data = batch()
    losses = [trainer.step(data).loss for _ in range(3)]
    trainer.settle()
    gc.collect()  # what others have left must not go meanwhile
    before = torch.cuda.memory_allocated()
    losses.append(trainer.step(data).loss)
    trainer.settle()
    return trainer, losses, held[-1] - before


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_step_of_the_trainer_holds_seven_bytes_less_for_each_output(mode, monkeypatch):
    trainer, losses, held = trained(mode)
    assert "deepseek_mp::max_pool2d" in trainer.monitor.log_precision_usage().ops
    data = batch()
    with no_waiting():
        trainer.step(data)
    trainer.settle()
    monkeypatch.setattr("deepseek_mp.trainer.eager_pools.taken_over", lambda *_: None)
    _, expected, before = trained(mode)
    assert losses == pytest.approx(expected, rel=1e-3 if mode == "fp32" else 3e-2)
    assert before - held > 6.9 * OUTPUTS


def test_a_checkpointed_pool_is_computed_again_on_autograd_s_thread():
    plain, again = trained("bf16"), trained("bf16", again=True)
    assert again[1] == pytest.approx(plain[1], rel=1e-2)
    assert again[2] < plain[2]
