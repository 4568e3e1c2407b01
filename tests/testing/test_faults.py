"""The injector: each fault in its place, at its steps, and gone afterwards."""

import math

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.testing import Fault, FaultInjector, InjectedError

NUMBERS = {"nan": math.isnan, "inf": math.isinf, "huge": lambda v: v == pytest.approx(1e30),
           "tiny": lambda v: v == pytest.approx(1e-30)}  # fmt: skip


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def bad_elements(tensor, kind):
    """Indices, in flat order, of the elements that the fault made."""
    return [i for i, value in enumerate(tensor.flatten().tolist()) if NUMBERS[kind](value)]


@pytest.mark.parametrize("kind", NUMBERS)
def test_an_activation_has_its_first_element_replaced(model, kind):
    with FaultInjector(model).add(Fault(kind=kind, where="activation", module="2")):
        assert bad_elements(model(torch.randn(5, 3)), kind) == [0]
    assert bad_elements(model(torch.randn(5, 3)), kind) == []


@pytest.mark.parametrize("kind", NUMBERS)
def test_an_input_is_replaced_and_the_batch_is_not(model, kind):
    seen, batch = [], torch.randn(5, 3)
    with FaultInjector(model).add(Fault(kind=kind, where="input", module="0")):
        model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(batch)
    assert bad_elements(seen[0], kind) == [0]
    assert bad_elements(batch, kind) == []


def test_keyword_inputs_and_nested_outputs_are_reached():
    class Named(nn.Module):
        def forward(self, *, x, mask):
            return {"hidden": (x * 2, [x * 3]), "mask": mask}

    model, x, mask = Named(), torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.bool)
    with FaultInjector(model).add(Fault(kind="nan", where="input")):
        assert model(x=x, mask=mask)["hidden"][0].isnan().tolist() == [True, False]
    with FaultInjector(model).add(Fault(kind="inf", where="activation")):
        output = model(x=x, mask=mask)
    assert [t.isinf().tolist() for t in (output["hidden"][0], output["hidden"][1][0])] == [[True, False]] * 2
    assert output["mask"] is mask
    with FaultInjector(model).add(Fault(kind="nan", where="gradient")):
        output = model(x=x, mask=mask)
        output["hidden"][1][0].sum().backward()
    assert x.grad.isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_gradient_is_replaced_on_its_way_into_the_module(model, kind):
    arriving = []
    with FaultInjector(model).add(Fault(kind=kind, where="gradient", module="0")):
        output = model[0](torch.randn(5, 3))
        output.grad_fn.register_prehook(lambda grads: arriving.append(grads[0]))
        output.sum().backward()
    assert bad_elements(arriving[0], kind) == [0]
    assert bad_elements(output.detach(), kind) == []


def test_without_gradients_a_gradient_fault_waits(model):
    with FaultInjector(model).add(Fault(kind="nan", where="gradient", module="0")), torch.no_grad():
        assert model(torch.randn(5, 3)).isfinite().all()


def test_buffers_are_spoiled_after_the_forward_and_integer_ones_are_not(model):
    with FaultInjector(model).add(Fault(kind="nan", where="buffer", module="1")):
        output = model(torch.randn(5, 3))
        output.sum().backward()  # autograd did not notice
    assert output.isfinite().all()
    assert model[1].running_mean.isnan().tolist() == model[1].running_var.isnan().tolist() == [True] + [False] * 3
    assert model[1].num_batches_tracked == 1


def test_a_wrapped_loss_is_spoiled_inside_the_context_only(model):
    faults = FaultInjector(model).add(Fault(kind="inf", where="loss"))
    loss_fn = faults.loss(lambda output, target: output.sum())
    output = model(torch.randn(5, 3))
    assert loss_fn(output, None).isfinite()
    with faults:
        assert loss_fn(output, None).isinf()
        faults.step = 1
        assert loss_fn(output, None).isfinite()
        faults.step = 0
    assert loss_fn(output, None).isfinite()


@pytest.mark.parametrize("where", ["input", "activation", "buffer"])
def test_an_exception_says_where_and_when(model, where):
    faults = FaultInjector(model).add(Fault(kind="raise", where=where, module="1", steps={4}))
    with faults:
        model(torch.randn(5, 3))
        faults.step = 4
        with pytest.raises(InjectedError, match=f"{where} of 1 at step 4"):
            model(torch.randn(5, 3))


def test_exceptions_in_backward_loss_and_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model[2].weight.detach().clone()
    loss_fn = FaultInjector(model).add(Fault(kind="raise", where="loss"))
    with loss_fn, pytest.raises(InjectedError, match="loss of the model at step 0"):
        loss_fn.loss(lambda output, target: output.sum())(model(torch.randn(5, 3)), None)
    with FaultInjector(model).add(Fault(kind="raise", where="gradient", module="2")):
        loss = model(torch.randn(5, 3)).sum()
        with pytest.raises(InjectedError, match="gradient of 2 at step 0"):
            loss.backward()
    with (
        FaultInjector(model, optimizer).add(Fault(kind="raise", where="optimizer")),
        pytest.raises(InjectedError, match="optimizer of the model at step 0"),
    ):
        optimizer.step()
    assert torch.equal(model[2].weight, before)


def test_a_fault_happens_at_its_steps_and_as_often_as_they_are_repeated(model):
    faults = FaultInjector(model).add(Fault(kind="nan", where="activation", steps=range(1, 3)))
    seen = []
    with faults:
        for batch in faults.over(torch.randn(4, 5, 3)):
            seen.append([bool(model(batch).isnan().any()) for _ in range(2)])
    assert seen == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert faults.step == 4


def test_all_hooks_are_gone_also_after_an_exception(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    faults = FaultInjector(model, optimizer)
    for where in ("input", "activation", "gradient", "buffer", "optimizer"):
        faults.add(Fault(kind="raise", where=where, module="" if where == "optimizer" else "1"))
    with pytest.raises(InjectedError, match="input of 1"), faults:
        model(torch.randn(5, 3))
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("where", "module"), [("input", "0"), ("activation", "0"), ("gradient", "0"), ("buffer", "0")])
def test_a_fault_that_finds_nothing_to_spoil_is_an_error(where, module):
    class Integers(nn.Module):
        def forward(self, x):
            return x + 1

    model = nn.Sequential(Integers())
    with (
        FaultInjector(model).add(Fault(kind="nan", where=where, module=module)),
        pytest.raises(InjectedError, match=f"no tensor in the {where} of 0"),
    ):
        model(torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "zero", "where": "input"}, "kind='zero'"),
        ({"kind": "nan", "where": "weights"}, "where='weights'"),
        ({"kind": "nan", "where": "optimizer"}, "Spoil a gradient instead"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Fault(**arguments)


def test_an_unknown_module_is_an_error_when_the_context_is_entered(model):
    faults = FaultInjector(model)
    faults.add(Fault(kind="nan", where="input")).add(Fault(kind="nan", where="input", module="nowhere"))
    with pytest.raises(AttributeError, match="nowhere"), faults:
        model(torch.ones(2, 3))
    assert model(torch.ones(2, 3)).isfinite().all()
