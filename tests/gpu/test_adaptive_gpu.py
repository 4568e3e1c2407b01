"""Live precision and probes on a GPU: no waiting, real FP8, compiled models, the same training."""

import pytest
import torch
from no_waiting import no_waiting
from torch import nn

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, MixedPrecisionTrainer, PrecisionProfiler

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
GENEROUS = {"loss_budget": 1.0, "noise_budget": 100.0, "pays": 1e-9}


class Model(nn.Module):
    def __init__(self, width=4096):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, 256, (16, 512), generator=generator) for _ in range(count)]
    return [(x.cuda(), x.roll(-1, 1).cuda()) for x in found]


def trained(adaptive, data, precision="bf16", **values):
    torch.manual_seed(0)
    callbacks = [] if adaptive is None else [adaptive]
    trainer = MixedPrecisionTrainer(
        Model(), precision, seed=1, callbacks=callbacks, device="cuda", progress=False, **values
    )
    trainer.fit(data)
    return trainer


class Watched(AdaptivePrecision):
    """Probes and reads must not wait; the first call times layers, which does, and a change of plan settles."""

    def on_step_start(self, trainer, batch):
        if self.controller is None:
            super().on_step_start(trainer, batch)
            return
        with no_waiting():
            super().on_step_start(trainer, batch)


@hopper
@pytest.mark.parametrize("precision", ["bf16", "block"])
def test_probes_never_wait_and_change_nothing(precision):
    data = batches(12)
    # On random tokens faster training is so wild that guards raise layers, and the run is another one.
    calm = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-6)}
    plain = trained(None, data, precision, **calm)
    adaptive = Watched(AdaptiveSettings(warm_up=10**6, probe_every=2, compare_every=2))
    probed = trained(adaptive, data, precision, **calm)
    assert not adaptive.disabled
    assert adaptive.controller.probes >= 3
    assert adaptive.decisions == [], "a guard that fires changes the run"
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name]), name


@hopper
@pytest.mark.parametrize("compiled", [False, True, "regional"])
def test_layers_go_to_fp8_where_it_was_measured_faster(compiled):
    adaptive = AdaptivePrecision(AdaptiveSettings(warm_up=2, probe_every=1, decide_every=2, **GENEROUS))
    trainer = trained(adaptive, batches(12), compile=compiled)
    lowered = {d.layer for d in adaptive.decisions if d.new in ("tensor", "row", "block")}
    slower = [
        name for name, unit in adaptive.controller.units.items() if not {"tensor", "row", "block"} & set(unit.recipes)
    ]
    assert lowered | set(slower) == set(adaptive.controller.units)
    assert lowered, "no layer of this size is faster in FP8"
    names = {n for n, m in trainer.model.named_modules() if getattr(m, "unit_precision", None) is not None}
    assert lowered <= names


@hopper
def test_the_profile_of_a_gpu_agrees_with_that_of_the_cpu():
    torch.manual_seed(0)
    model = Model(256)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 64), generator=generator)
    batch = x, x.roll(-1, 1)
    on_cpu = PrecisionProfiler(model).analyze([batch], time_layers=False)
    on_gpu = PrecisionProfiler(model.cuda()).analyze([batch], time_layers=True)
    for name in ("blocks.0.1", "head"):
        for key in ("bf16_loss", "fp8_loss"):
            assert on_gpu[name][key] == pytest.approx(on_cpu[name][key], rel=0.2, abs=1e-8)
    assert "block" in on_gpu["blocks.0.1"]["milliseconds"]


@hopper
def test_outliers_between_two_probes_are_taken_back_until_their_layer_is_raised():
    """The device decides on the step at once; the host hears of it a step or two later."""
    adaptive = AdaptivePrecision(AdaptiveSettings(warm_up=2, probe_every=10**6, decide_every=2, **GENEROUS))
    torch.manual_seed(0)
    trainer = MixedPrecisionTrainer(
        Model(), "block", seed=1, callbacks=[adaptive], device="cuda", progress=False,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
    )  # fmt: skip
    down = trainer.model.blocks[1][3]

    def outliers(_module, args):
        x = args[0].clone()
        x[..., 0] *= 1e4
        return (x,)

    data = batches(12)
    for batch in data[:6]:
        trainer.step(batch)
    handle = down.register_forward_pre_hook(outliers, prepend=True)
    results = [trainer.step(batch) for batch in data[6:]]
    trainer.settle()
    handle.remove()
    statuses = [result.status for result in results]
    assert statuses[0] == "skipped"
    assert statuses[-1] == "applied"
    assert 1 <= statuses.count("skipped") <= 3
    raised = [d for d in adaptive.decisions if d.layer == "blocks.1.3"]
    assert raised[0].evidence["guard"] == "input"
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
