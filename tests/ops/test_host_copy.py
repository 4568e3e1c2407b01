"""Tensors on their way to the host, alone and as the mean of two processes."""

import torch
from torch import distributed
from torch.multiprocessing import start_processes

from deepseek_mp.ops.host_copy import HostCopy


def test_tensors_come_back_in_their_shapes():
    tensors = [torch.tensor(1.5), torch.arange(6).view(2, 3), torch.zeros(0)]
    copy = HostCopy(tensors)
    assert copy.ready
    back = copy.tensors()
    assert [t.shape for t in back] == [t.shape for t in tensors]
    assert back[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy.numbers() == [1.5, 0, 1, 2, 3, 4, 5]
    assert HostCopy([]).tensors() == HostCopy([]).numbers() == []


def test_what_changes_after_is_not_part_of_it():
    tensor = torch.zeros(3)
    copy = HostCopy([tensor])
    tensor += 1
    assert not copy.tensors()[0].any()


def test_a_copy_is_of_the_moment_it_was_made():
    value, other = torch.tensor(1.5), torch.tensor(True)
    copy = HostCopy([value, other, torch.tensor(2**-14, dtype=torch.float64)])
    value.fill_(7.0)
    other.fill_(False)
    assert copy.numbers() == copy.numbers() == [1.5, 1.0, 2**-14]


def test_a_copy_keeps_non_finite_values_and_no_graph():
    loss = torch.tensor(float("nan"), requires_grad=True)
    copy = HostCopy([loss, torch.tensor(float("inf"))])
    read = copy.numbers()
    assert read[0] != read[0]
    assert read[1] == float("inf")
    assert not copy.tensors()[0].requires_grad


def process(rank, file, results):
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    tensors = [torch.full((2,), float(rank)), torch.tensor(10.0)]
    results[rank] = [HostCopy(tensors, mean=True).numbers(), HostCopy(tensors).numbers()]
    distributed.destroy_process_group()


def test_two_processes_get_the_mean_where_it_is_asked_for(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        # Copies of this process, which need not import PyTorch again.
        start_processes(process, args=(str(tmp_path / "store"), results), nprocs=2, start_method="fork")
        mean = [0.5, 0.5, 10.0]
        assert dict(results) == {0: [mean, [0.0, 0.0, 10.0]], 1: [mean, [1.0, 1.0, 10.0]]}
