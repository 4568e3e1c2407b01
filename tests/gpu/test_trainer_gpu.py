"""The trainer on an accelerator of the CUDA kind: no waiting, device-side skips, real formats."""

import warnings

import pytest
import torch
from no_waiting import no_waiting
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionMonitor, backends
from deepseek_mp.testing import Fault, FaultInjector

pytestmark = pytest.mark.gpu
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch.cuda")
DEVICE = torch.device("cuda")


def conv_model(width=32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def batches(count, size=16, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 16, 16, generator=generator).to(device),
            torch.randint(0, 10, (size,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def state_of(trainer):
    trainer.settle()
    values = {f"model.{k}": v.detach().clone() for k, v in trainer.model.state_dict().items()}
    for i, entry in enumerate(trainer.optimizer.state.values()):
        values |= {f"optimizer.{i}.{k}": v.clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return values


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


class BroadcastMask(nn.Module):
    """Attention under a mask of one column for all keys, as traced code builds it; fused kernels refuse it."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        count, length, _ = x.shape
        q, k, v = self.qkv(x).view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = (torch.arange(length, device=x.device) >= 0)[:, None].expand(count, 1, length, length)
        assert torch.compiler.is_compiling() or torch._fused_sdp_choice(q, k, v, mask) == 0  # plain products
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


@cuda
@pytest.mark.parametrize("how", [True, "regional"])
def test_compiled_attention_is_fused_under_a_mask_that_pytorch_leaves_unfused(how):
    """Unfused, each block keeps a matrix of scores for backward: here 64 MiB in fp32."""
    torch.manual_seed(0)
    count, length, heads = 4, 1024, 4
    x = torch.randn(count, length, 64, device=DEVICE)
    losses = {}
    for compile in (False, how):
        torch.manual_seed(1)
        model = nn.Sequential(*[nn.Sequential(BroadcastMask(heads=heads), nn.Tanh()) for _ in range(4)])
        trainer = MixedPrecisionTrainer(model, "bf16", device=DEVICE, compile=compile, progress=False)
        losses[compile] = [trainer.step((x, x)).loss for _ in range(4)]
        trainer.settle()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.step((x, x))
    trainer.settle()
    assert torch.cuda.max_memory_allocated() - before < count * heads * length * length * 4
    assert losses[how] == pytest.approx(losses[False], rel=1e-2)


@cuda
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", FUSED)
def test_steps_do_not_wait_for_the_device(mode, optimizer):
    trainer = MixedPrecisionTrainer(
        conv_model(), mode, optimizer=FUSED[optimizer], device=DEVICE, ema_decay=0.99, max_grad_norm=1.0,
        gradient_accumulation_steps=2, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    )  # fmt: skip
    data = batches(20, device=DEVICE)
    for batch in data[:8]:
        trainer.step(batch)
    with no_waiting():
        results = [trainer.step(batch) for batch in data[8:]]
    trainer.settle()
    assert trainer.steps_applied == trainer.steps_attempted == 10
    assert results[-1].status == "applied"


@cuda
@pytest.mark.parametrize("policy", ["dynamic", "predictive", 512.0])
def test_loss_scale_policies_do_not_wait(policy):
    trainer = MixedPrecisionTrainer(conv_model(), "fp16", policy, optimizer=FUSED["adamw"], device=DEVICE)
    data = batches(12, device=DEVICE)
    for batch in data[:6]:
        trainer.step(batch)
    with no_waiting():
        for batch in data[6:]:
            trainer.step(batch)
    trainer.settle()


@cuda
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_a_bad_step_is_skipped_on_the_device_without_a_trace(mode, optimizer, where):
    warnings.simplefilter("ignore")
    trainer = MixedPrecisionTrainer(
        conv_model(), mode, 256.0, optimizer=FUSED[optimizer], device=DEVICE, ema_decay=0.9,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    )  # fmt: skip
    data = batches(6, device=DEVICE)
    for batch in data[:3]:
        trainer.step(batch)
    before, rate = state_of(trainer), trainer.optimizer.param_groups[0]["lr"]
    average = {k: v.clone() for k, v in trainer.ema.values.items()}
    faults = FaultInjector(trainer.model).add(Fault(kind="nan", where=where, module="4", steps={0}))
    with faults:
        result = trainer.step(data[3])
        facts = result.facts
    assert facts.status == "skipped"
    assert facts.first_bad_module is not None
    assert_same(before, state_of(trainer))
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    assert_same(average, trainer.ema.values)
    assert trainer.step(data[4]).status == "applied"
    assert all(torch.isfinite(v).all() for v in state_of(trainer).values())


@cuda
def test_fp16_follows_the_scaler_of_pytorch():
    data = batches(30, device=DEVICE)
    trainer = MixedPrecisionTrainer(conv_model(), "fp16", optimizer=FUSED["sgd"], device=DEVICE)
    trainer.model[3].p = 0.0
    ours = [trainer.step(batch) for batch in data]
    scales = [r.scale for r in ours]

    model = conv_model().to(DEVICE)
    model[3].p = 0.0
    optimizer, scaler, expected = FUSED["sgd"](model.parameters()), torch.amp.GradScaler("cuda"), []
    losses = []
    for x, y in data:
        expected.append(scaler.get_scale())
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scales == expected
    assert [r.loss for r in ours] == pytest.approx(losses, rel=2e-2)


@cuda
def test_fp32_means_fp32_and_tf32_means_tf32():
    if "tf32" not in backends.capabilities(DEVICE).matmul_formats:
        pytest.skip("device without TF32 units")
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(512, 512), torch.randn(64, 512)), (nn.Conv2d(64, 64, 3), torch.randn(4, 64, 32, 32))):
        exact = layer.double()(x.double())
        layer.float()
        errors = {}
        for mode in ("fp32", "tf32"):
            trainer = MixedPrecisionTrainer(nn.Sequential(layer), mode, device=DEVICE, optimizer=FUSED["sgd"])
            errors[mode] = float((trainer.predict(x.to(DEVICE)).cpu().double() - exact).norm() / exact.norm())
        assert errors["fp32"] < 2e-6
        assert 1e-5 < errors["tf32"] < 2e-3


@cuda
def test_bf16_and_fp16_really_run_in_their_format():
    for mode in ("bf16", "fp16"):
        trainer = MixedPrecisionTrainer(conv_model(), mode, device=DEVICE, monitor_every=1)
        trainer.step(batches(1)[0])
        usage = trainer.monitor.log_precision_usage().to_json()
        assert mode in str(usage)


@cuda
def test_monitor_counts_forward_and_backward_of_a_loop_that_is_not_ours():
    model = conv_model().to(DEVICE)
    optimizer = FUSED["sgd"](model.parameters())
    with PrecisionMonitor(model, sample_every=1) as monitor:
        x, y = batches(1, device=DEVICE)[0]
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        text = str(monitor.log_precision_usage())
    assert "convolution_backward" in text
    assert "bf16" in text


@cuda
@pytest.mark.parametrize("how", [True, "regional"])
def test_compiled_training_equals_eager_within_rounding(how):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(*(Block() for _ in range(3))), nn.Linear(64, 10))

    generator = torch.Generator().manual_seed(2)
    data = [(torch.randn(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator))] * 6
    losses = {}
    for compile in (False, how):
        trainer = MixedPrecisionTrainer(make(), "bf16", device=DEVICE, compile=compile)
        losses[compile] = [trainer.step(batch).loss for batch in data]
    assert losses[how] == pytest.approx(losses[False], rel=2e-2)
    assert losses[how][-1] < losses[how][0]


@cuda
def test_auto_restores_the_model_and_beats_fp32(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(2048, 2048), nn.ReLU())], nn.Linear(2048, 10))
    x, y = torch.randn(4096, 2048), torch.randint(0, 10, (4096,))
    trainer = MixedPrecisionTrainer(model, "auto", device=DEVICE)
    assert trainer.step((x, y)).status == "applied"
    assert trainer.plan.base.name in ("bf16", "fp16", "tf32")
    assert trainer.plan.decisions[0].evidence


@cuda
def test_resume_continues_with_the_same_numbers(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        data = batches(12)
        straight = MixedPrecisionTrainer(conv_model(), "bf16", device=DEVICE, seed=3)
        straight.fit(data, epochs=2)
        first = MixedPrecisionTrainer(conv_model(), "bf16", device=DEVICE, seed=3, run_dir=tmp_path)
        first.fit(data, epochs=1)
        second = MixedPrecisionTrainer(conv_model(), "bf16", device=DEVICE, run_dir=tmp_path)
        second.fit(data, epochs=2, resume=tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-2, atol=1e-3, msg=name)
    assert second.steps_applied == straight.steps_applied


@cuda
def test_an_optimizer_without_a_device_side_skip_still_skips():
    trainer = MixedPrecisionTrainer(
        conv_model(), "bf16", device=DEVICE, optimizer=lambda p: torch.optim.RMSprop(p, lr=1e-3)
    )
    data = batches(3)
    trainer.step(data[0])
    before = state_of(trainer)
    bad = (data[1][0] * float("nan"), data[1][1])
    assert trainer.step(bad).status == "skipped"
    assert_same(before, state_of(trainer))


@cuda
def test_the_device_is_described():
    found = backends.capabilities(DEVICE)
    assert found.id != "unknown"
    assert {"bf16", "fp16"} & found.matmul_formats
    assert backends.peak_memory_bytes(DEVICE) is not None
