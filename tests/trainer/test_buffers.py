"""The guard of buffers: whatever a forward does to them, and both ways of putting them back."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import PerChannelMinMaxObserver

from deepseek_mp.trainer.buffers import BufferGuard

BAD, GOOD = torch.tensor(1.0), torch.tensor(0.0)


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model.register_buffer("level", torch.arange(4.0).half())
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("complex", torch.tensor([1j, 2.0]))
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("transposed", torch.arange(6.0).view(2, 3).t())
    return model


def host(guard):
    guard.restore()


def device(guard):
    guard.restore_where(BAD)


WAYS = pytest.mark.parametrize("put_back", [host, device])


def values(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_are(model, expected):
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype


@WAYS
def test_values_changed_in_place_are_put_back_in_place(model, put_back):
    guard, before, objects = BufferGuard(model), values(model), dict(model.named_buffers())
    guard.snapshot()
    model(torch.randn(5, 3))
    for buffer in model.buffers():
        buffer.zero_()
    put_back(guard)
    assert_are(model, before)
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.tensor(True), torch.tensor(3)])
def test_a_verdict_may_have_any_dtype(model, bad):
    guard, before = BufferGuard(model), values(model)
    guard.snapshot()
    model(torch.full((5, 3), float("nan")))
    guard.restore_where(bad)
    assert_are(model, before)
    guard.restore_where(bad.logical_not())
    assert_are(model, before)


def test_after_a_good_step_everything_stays(model):
    guard = BufferGuard(model)
    guard.snapshot()
    model(torch.randn(5, 3))
    model.level = model.level + 1
    model.register_buffer("late", torch.ones(2))
    after, objects = values(model), dict(model.named_buffers())
    guard.restore_where(GOOD)
    assert_are(model, after)
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())


@WAYS
def test_a_buffer_replaced_by_assignment_has_its_old_value(model, put_back):
    guard, before = BufferGuard(model), values(model)
    guard.snapshot()
    model.level = model.level * float("nan")
    model.transposed = torch.zeros(3, 2)
    put_back(guard)
    assert_are(model, before)


def test_on_the_device_a_replaced_buffer_keeps_its_new_object(model):
    """What refers to it, a view or an optimizer, goes on doing so: an object cannot depend on the verdict."""
    guard = BufferGuard(model)
    guard.snapshot()
    model.level = replaced = model.level * float("nan")
    guard.restore_where(BAD)
    assert model.level is replaced
    assert model.level.tolist() == [0.0, 1.0, 2.0, 3.0]


@WAYS
@pytest.mark.parametrize("change", ["shape", "dtype", "none", "deleted", "made", "registered", "expanded"])
def test_changes_that_no_select_can_undo_are_undone(model, put_back, change):
    model.register_buffer("later", None)
    guard, before = BufferGuard(model), values(model)
    guard.snapshot()
    if change == "shape":
        model.level = torch.ones(9).half()
    elif change == "dtype":
        model.level = model.level.float()
    elif change == "none":
        model.level = None
    elif change == "deleted":
        del model.level
    elif change == "made":
        model.later = torch.tensor(float("nan"))
    elif change == "registered":
        model[0].register_buffer("new", torch.ones(2), persistent=False)
    else:
        model.level = torch.ones(1).half().expand(4)
    put_back(guard)
    assert_are(model, before)
    assert model.later is None
    assert "new" not in model[0]._non_persistent_buffers_set


@WAYS
def test_a_buffer_resized_in_place_is_put_back(put_back):
    """Observers of channels do that at their first batch."""
    model = nn.Sequential(PerChannelMinMaxObserver(ch_axis=1))
    guard = BufferGuard(model)
    guard.snapshot()
    model(torch.full((2, 3), float("nan")))
    assert model[0].min_val.shape == (3,)
    put_back(guard)
    assert model[0].min_val.shape == model[0].max_val.shape == (0,)
    model(torch.ones(2, 3))
    guard.snapshot()
    model(torch.full((2, 3), float("nan")))
    put_back(guard)
    assert model[0].min_val.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@WAYS
@pytest.mark.parametrize("layout", ["coo", "csr", "expanded"])
def test_buffers_without_values_of_their_own_are_left_alone_and_put_back_as_objects(put_back, layout):
    model = nn.Sequential(nn.BatchNorm1d(2))
    graph = torch.eye(3)
    buffer = {"coo": graph.to_sparse(), "csr": graph.to_sparse_csr(), "expanded": torch.ones(1).expand(5)}[layout]
    model.register_buffer("graph", buffer)
    guard = BufferGuard(model)
    guard.snapshot()
    put_back(guard)
    assert model.graph is buffer
    model.graph = torch.zeros(3, 3)
    model(torch.full((4, 2), float("nan")))
    put_back(guard)
    assert model.graph is buffer
    assert model[0].running_mean.tolist() == [0.0, 0.0]
    guard.snapshot()
    put_back(guard)
    assert list(guard.saved()) == [str(i) for i, (name, _) in enumerate(model.named_buffers()) if name != "graph"]


def test_each_snapshot_is_of_its_own_moment(model):
    guard = BufferGuard(model)
    for _ in range(3):
        model(torch.randn(5, 3))
        guard.snapshot()
        before = values(model)
        model(torch.randn(5, 3))
        guard.restore()
        assert_are(model, before)


def test_a_snapshot_after_a_replacement_takes_the_new_object(model):
    guard = BufferGuard(model)
    guard.snapshot()
    model.level = model.level + 1
    guard.snapshot()
    model.level.zero_()
    guard.restore()
    assert model.level.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_lazy_buffer_is_guarded_once_it_has_a_value():
    model = nn.Sequential(nn.LazyBatchNorm1d(affine=False))
    guard = BufferGuard(model)
    guard.snapshot()
    model(torch.randn(5, 3))
    guard.snapshot()
    before = values(model)
    model(torch.full((5, 3), float("nan")))
    guard.restore()
    assert_are(model, before)


def test_a_model_without_buffers():
    guard = BufferGuard(nn.Linear(2, 2))
    guard.snapshot()
    guard.restore()
    guard.restore_where(BAD)
    assert guard.saved() == {}


def test_saved_values_are_taken_over_in_place_of_those_of_now(model):
    """A run resumed inside a window: the buffers are those of now, the saved ones those of its start."""
    first, second = BufferGuard(model), BufferGuard(model)
    model.register_buffer("empty", None)
    first.snapshot()
    before = values(model)
    model(torch.randn(5, 3))
    second.load_saved({name: value.clone() for name, value in first.saved().items()})
    second.restore()
    assert_are(model, before)


@WAYS
def test_a_loss_that_is_a_module_has_buffers_too(model, put_back):
    loss = nn.BatchNorm1d(4)
    guard, before = BufferGuard(model, loss), values(loss)
    guard.snapshot()
    loss(model(torch.randn(5, 3)))
    put_back(guard)
    assert_are(loss, before)


def test_a_loss_that_is_a_function_has_none(model):
    guard = BufferGuard(model, torch.nn.functional.mse_loss)
    guard.snapshot()
    guard.restore()
