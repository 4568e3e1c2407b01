"""Two processes that see different batches decide the same, since they are fed the mean of what both measured."""

import torch
from torch import distributed, nn
from torch.multiprocessing import Manager, spawn

from deepseek_mp.controller import AdaptiveController, AdaptiveSettings, AdaptiveUnit
from deepseek_mp.nn.call import parse_batch, run
from deepseek_mp.precision import RECIPES
from deepseek_mp.sensitivity import Probe

NAMES = ("0", "1")
LOSS_BUDGET = 1e-3


def decided(rank, processes, file, results):
    if processes > 1:
        distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    units = {name: AdaptiveUnit(macs=1.0, seconds={}, recipes=("row",)) for name in NAMES}
    settings = AdaptiveSettings(warm_up=0, decide_every=1, loss_budget=LOSS_BUDGET, noise_budget=10.0)
    controller = AdaptiveController(units, RECIPES["bf16"], settings)
    torch.manual_seed(rank)
    for step in range(2):
        probe = Probe({name: model.get_submodule(name) for name in NAMES}, [RECIPES["row"]])
        call = parse_batch((torch.randn(64, 32) * (1 + 3 * rank), torch.randint(0, 32, (64,))))
        with probe.watching(call):
            found = run(model, call, None)
            probe.loss_is(found, None)
            probe.backward(found.loss)
        controller.learn(probe.send().read(), step)
    decisions = [decision.to_json() for decision in controller.decide(2)]
    spent = sum(reading.effects["row"].second for reading in controller.readings.values()) / controller.loss
    results[rank] = decisions, controller.state_dict(), spent
    if processes > 1:
        distributed.destroy_process_group()


def test_ranks_decide_the_same(tmp_path):
    with Manager() as manager:
        results = manager.dict()
        spawn(decided, args=(2, str(tmp_path / "store"), results), nprocs=2)
        (first, state, spent), (second, other, _) = results[0], results[1]
    assert first == second
    assert state == other
    alone = {}
    for rank in range(2):
        decided(rank, 1, "", alone)
    assert alone[0][2] < spent < alone[1][2]
    assert alone[0][1] != alone[1][1]
