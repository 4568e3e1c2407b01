"""Tensors on their way to the host, alone and as the mean of two processes."""

import torch
from torch import distributed
from torch.multiprocessing import spawn

from deepseek_mp.sensitivity.transfer import Transfer


def test_tensors_come_back_in_their_shapes():
    tensors = [torch.tensor(1.5), torch.arange(6).view(2, 3), torch.zeros(0)]
    transfer = Transfer(tensors)
    assert transfer.ready
    back = transfer.read()
    assert [t.shape for t in back] == [t.shape for t in tensors]
    assert back[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Transfer([]).read() == []


def test_what_changes_after_is_not_part_of_it():
    tensor = torch.zeros(3)
    transfer = Transfer([tensor])
    tensor += 1
    assert not transfer.read()[0].any()


def process(rank, file, results):
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    back = Transfer([torch.full((2,), float(rank)), torch.tensor(10.0)]).read()
    results[rank] = [t.tolist() for t in back]
    distributed.destroy_process_group()


def test_two_processes_get_the_mean(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        spawn(process, args=(str(tmp_path / "store"), results), nprocs=2)
        assert dict(results) == {0: [[0.5, 0.5], 10.0], 1: [[0.5, 0.5], 10.0]}
