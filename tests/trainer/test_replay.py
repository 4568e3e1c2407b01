"""Which module is named, and that looking for it leaves no trace."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.trainer.replay import BATCH, LOSS, find_first_bad_module
from deepseek_mp.trainer.rng import get_rng, set_rng
from deepseek_mp.trainer.window import MicroBatch

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


class Times(nn.Module):
    """Multiplies the activation and, on the way back, the gradient; its own parameter changes nothing."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.backward_factor = backward
            return x * forward

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.backward_factor, None, None

    def __init__(self, forward=1.0, backward=1.0):
        super().__init__()
        self.factors = forward, backward

    def forward(self, x):
        return self.Function.apply(x, *self.factors)


def find(model, *batches, loss_fn=lambda output: output.sum(), others=()):
    def compute(entry):
        loss = loss_fn(model(entry.batch))
        loss.backward()
        return loss

    entries = [MicroBatch(index=i, batch=batch, rng=get_rng(CPU)) for i, batch in enumerate(batches)]
    return find_first_bad_module(model, entries, compute, CPU, others=others)


def chain(*middle):
    return nn.Sequential(nn.Linear(3, 3), *middle, nn.Linear(3, 2))


X = torch.ones(4, 3)


def test_the_producer_is_named_and_not_those_that_pass_it_on():
    assert find(chain(nn.Tanh(), Times(INF), nn.ReLU(), nn.LayerNorm(3)), X) == "2"


def test_the_innermost_of_nested_modules_is_named():
    assert find(chain(nn.Sequential(nn.Tanh(), nn.Sequential(Times(NAN)))), X) == "1.1.0"


def test_a_forward_of_its_own_names_the_module_around_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x) * INF

    assert find(nn.Sequential(Outer()), X) == "0"
    assert find(Outer(), X) == "Outer"


def test_a_gradient_is_named_where_it_goes_bad_and_not_below():
    assert find(chain(nn.Tanh(), Times(1.0, INF), nn.ReLU(), nn.LayerNorm(3)), X) == "2"


class BadAround(nn.Module):
    """A module whose own code, not its child's, makes the gradient bad."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(3, 3)

    def forward(self, x):
        return Times.Function.apply(self.child(x), 1.0, INF)


def test_a_gradient_that_goes_bad_in_a_parents_own_code_names_the_parent():
    assert find(chain(nn.Tanh(), BadAround(), nn.Tanh()), X) == "2"


def test_where_nothing_tells_the_first_bad_gradient_does():
    """The model's input needs no gradient, so that its own code cannot be told from its child's."""
    assert find(BadAround(), X) == "child"


def test_a_gradient_of_a_parameter_alone_names_its_module():
    """Input and output gradients are finite, their product is not."""
    model = chain()
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.fill_(1e-30)
    assert find(model, X * 1e32, loss_fn=lambda output: output.sum() * 1e37) == "0"


def test_a_parameter_of_a_parent_names_the_parent():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child, self.shift = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.child(x + self.shift)

    model = nn.Sequential(Parent())
    assert find(model, X) is None
    model[0].shift.data[1] = NAN
    assert find(model, X) == "0"  # the child only passed it on


def test_a_parameter_that_is_bad_already_is_named_whatever_its_input():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    model[1].bias.data[0] = INF
    assert find(model, X) == "1"
    batch = X.clone()
    batch[0, 0] = INF
    assert find(model, batch) == "1"
    model[1].bias.data[0] = 0.0
    assert find(model, batch) == "0"  # the first that had a part in it


def test_infinities_that_are_meant_are_not_blamed_for_what_happens_elsewhere():
    class Scores(nn.Module):
        """Masks, as attention does, with infinities that the next module takes out again."""

        def forward(self, x):
            return x.masked_fill(torch.eye(4, 3, dtype=torch.bool), -INF)

    def with_scores(*modules):
        return nn.Sequential(nn.Linear(3, 3), Scores(), nn.Softmax(-1), *modules)

    assert find(with_scores(), X) is None
    assert find(with_scores(nn.Tanh(), Times(1.0, INF), nn.ReLU()), X) == "4"
    assert find(with_scores(), X, loss_fn=lambda output: (output - output).abs().sqrt().sum()) == LOSS
    assert find(nn.Sequential(nn.Linear(3, 3), Scores()), X, loss_fn=lambda out: out.exp().log().sum()) == "1"


def test_of_several_batches_the_bad_one_is_found():
    model = chain(Times(1.0))
    batches = [X, X, X * INF]
    assert find(model, *batches) == "0"
    assert find(model, *batches[:2]) is None


def test_the_loss_function_is_named_for_its_value_and_for_its_gradient():
    assert find(chain(), X, loss_fn=lambda output: output.sum() * NAN) == LOSS
    assert find(chain(), X, loss_fn=lambda output: (output - output).abs().sqrt().sum()) == LOSS
    assert find(chain(), X, loss_fn=lambda output: output.sum()) is None


@dataclass
class Output:
    logits: torch.Tensor
    note: str = "text"


@pytest.mark.parametrize("wrap", [lambda t: {"a": t}, lambda t: (None, [t]), lambda t: Output(t)])
def test_outputs_may_be_nested_in_anything(wrap):
    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain()

        def forward(self, x):
            return wrap(self.body(x))

    def tensor(output):
        return next(iter(output.values())) if isinstance(output, dict) else getattr(output, "logits", None)

    def loss_fn(output):
        logits = output[1][0] if isinstance(output, tuple) else tensor(output)
        return (logits - logits).abs().sqrt().sum()

    assert find(Wraps(), X, loss_fn=loss_fn) == LOSS


def test_a_nan_of_the_batch_is_the_batchs():
    batch = X.clone()
    batch[2, 1] = NAN
    assert find(chain(nn.Tanh()), batch) == BATCH


def test_a_mask_of_infinities_in_the_batch_is_no_fault_of_the_batch():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, batch):
            return self.layer(batch["x"]) + batch["mask"].softmax(-1).sum()

    mask = torch.tensor([[0.0, -INF], [0.0, -INF]])
    assert find(nn.Sequential(Masked()), {"x": X, "mask": mask}) is None
    mask[0] = -INF  # a row with nothing left: the softmax is 0/0
    assert find(nn.Sequential(Masked()), {"x": X, "mask": mask}) == "0"


def test_sparse_gradients_are_looked_into():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), Times(1.0))
    rows = torch.tensor([1, 1])
    assert find(model, rows) is None
    nn.init.zeros_(model[0].weight)
    assert find(model, rows, loss_fn=lambda output: (output * 1e38).sum()) is None
    assert find(model, rows, loss_fn=lambda output: (output * 3e38).sum()) == "0"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_numbers_in_8_bits_are_looked_into(dtype):
    class Narrow(nn.Module):
        def forward(self, x):
            return x, (x.detach() / 0.0 * 0.0).to(dtype)

    class Wide(nn.Module):
        def forward(self, both):
            return both[0] * both[1].float()

    model = nn.Sequential(nn.Linear(2, 3), Narrow(), Wide())
    assert find(model, torch.ones(1, 2)) == "1"
    assert find(Wide(), (torch.ones(1, 2, requires_grad=True), torch.full((1, 2), NAN).to(dtype))) == BATCH


def test_complex_numbers_are_looked_into():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))

        def forward(self, x):
            return x.to(torch.complex64) @ self.weight

    model = nn.Sequential(Complex(), Times(complex(1.0, INF)))
    assert find(model, X, loss_fn=lambda output: output.abs().sum()) == "1"


def test_a_shared_module_and_a_module_called_twice():
    shared = Times(1e20)
    assert find(chain(shared, shared), X) == "1"
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.again = model[0]
    assert find(model, X * INF) == "0"


# ----------------------------------------------------------------------------------------- no trace


def test_gradients_are_those_of_before_also_outside_the_model():
    model, outside = chain(Times(INF)), nn.Parameter(torch.ones(()))
    model[0].weight.grad = kept = torch.full((3, 3), 7.0)
    outside.grad = also_kept = torch.tensor(5.0)
    assert find(model, X, loss_fn=lambda output: output.sum() * outside, others=[outside]) == "1"
    assert model[0].weight.grad is kept
    assert outside.grad is also_kept
    assert kept.unique().tolist() == [7.0]
    assert also_kept.item() == 5.0
    assert model[2].weight.grad is None


def test_no_hook_is_left_even_when_the_replay_itself_fails():
    model = chain(nn.Tanh())

    def broken(output):
        raise RuntimeError("out")

    with pytest.raises(RuntimeError, match="out"):
        find(model, X, loss_fn=broken)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


class Draws(nn.Module):
    """Draws from every global generator; a bad value follows from one number of PyTorch's."""

    def forward(self, x):
        random.random()
        np.random.rand()
        return x / (torch.rand(()) > 0.5)


def test_every_random_stream_goes_on_as_if_there_had_been_no_replay():
    model = nn.Sequential(nn.Linear(3, 3), Draws(), nn.Dropout(0.5))

    def streams():
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = streams()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    entry = MicroBatch(index=0, batch=X, rng=get_rng(CPU))
    find_first_bad_module(model, [entry, entry], lambda e: model(e.batch).sum(), CPU)
    assert streams() == expected


def test_each_batch_is_replayed_with_the_random_numbers_it_had():
    """Whether the division is by zero is one number, drawn before; the replay must draw it again."""
    model, found = nn.Sequential(nn.Linear(3, 3), Draws()), []
    for _ in range(16):
        entry = MicroBatch(index=0, batch=X, rng=get_rng(CPU))
        bad = not bool(model(X).isfinite().all())
        torch.rand(3)  # the stream went on meanwhile
        found.append((bad, find_first_bad_module(model, [entry], lambda e: model(e.batch).sum(), CPU)))
    assert set(found) == {(True, "1"), (False, None)}


def test_get_and_set_rng_are_inverse():
    state = get_rng(CPU)
    drawn = F.dropout(X, 0.5)
    set_rng(state, CPU)
    assert torch.equal(F.dropout(X, 0.5), drawn)
    assert len(state) == 1


def test_a_replay_that_runs_out_of_memory_names_none_and_leaves_nothing(caplog):
    """It needs more than the step did where that has a fused loss; what it looks for is no reason to end a training."""
    model = chain(Times(INF))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]

    def out_of_memory(output):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level("WARNING", "deepseek_mp"):
        assert find(model, X, loss_fn=out_of_memory) is None
    assert "memory ran out when a skipped step was run again" in caplog.text
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))

    def mistaken(output):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        find(model, X, loss_fn=mistaken)
