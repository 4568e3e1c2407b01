"""Each fallback carries the reason that really holds, in the forward and in the backward of the same operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.monitor import Fallback, PrecisionMonitor, Usage
from deepseek_mp.nn import apply
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.precision.plan import Rule
from deepseek_mp.precision.recipes import find_recipe


class Computes(nn.Module):
    """A layer that is one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def usage_of(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor] = torch.sum) -> Usage:
    """The report of one step in a bf16 region, its loss computed outside the region unless `loss` opens it."""
    with PrecisionMonitor(model) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(inputs)
        loss(output).backward()
        return monitor.log_precision_usage()


def reasons(usage: Usage) -> dict[tuple[str, str, str], Reason]:
    return {(f.layer, f.op, f.phase): f.reason for f in usage.fallbacks}


def test_a_listed_operation_and_its_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Computes(lambda x: F.mse_loss(x, torch.zeros(3, 4))))
    usage = usage_of(model, torch.randn(3, 4))
    assert reasons(usage) == {
        ("1", "mse_loss", "forward"): Reason.AUTOCAST_LIST,
        ("1", "mse_loss_backward", "backward"): Reason.AUTOCAST_LIST,
    }


def test_a_listed_function_made_of_smaller_operations() -> None:
    """Autocast lists cross_entropy_loss on CPU, and neither log_softmax nor its backward."""
    model = nn.Sequential(nn.Linear(4, 4), Computes(lambda x: F.cross_entropy(x, torch.zeros(3, dtype=torch.long))))
    found = reasons(usage_of(model, torch.randn(3, 4)))
    assert set(found.values()) == {Reason.AUTOCAST_LIST}
    assert {op for _, op, _ in found} >= {"_log_softmax", "nll_loss_forward", "_log_softmax_backward_data"}


def test_an_operation_that_autocast_leaves_to_its_inputs() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    found = reasons(usage_of(model, torch.tensor([[1, 2]])))
    assert found == {
        ("0", "embedding", "forward"): Reason.FOLLOWS_INPUT,
        ("1", "native_layer_norm", "forward"): Reason.FOLLOWS_INPUT,
        ("0", "embedding_dense_backward", "backward"): Reason.FOLLOWS_INPUT,
        ("1", "native_layer_norm_backward", "backward"): Reason.FOLLOWS_INPUT,
    }


def test_promotion_to_the_widest_input_follows_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Computes(lambda x: torch.cat([x, torch.ones(3, 4)])))
    assert reasons(usage_of(model, torch.randn(3, 4)))["1", "cat", "forward"] is Reason.FOLLOWS_INPUT


def test_products_inside_an_operation_that_casts_up_follow_their_inputs() -> None:
    """With a dropout, attention on CPU is its plain implementation, which multiplies in FP32."""

    def attention(x: Tensor) -> Tensor:
        x = x[None, None]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    found = reasons(usage_of(nn.Sequential(nn.Linear(4, 4), Computes(attention)), torch.randn(3, 4)))
    assert found["1", "bmm", "forward"] is found["1", "bmm", "backward"] is Reason.FOLLOWS_INPUT


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: torch.fft.rfft(x).abs(), "_fft_r2c"),
        (lambda x: torch.fft.rfft(x).abs(), "abs"),  # of complex numbers
        (lambda x: torch.linalg.inv(x @ x.T + 10 * torch.eye(4)), "linalg_inv_ex"),
    ],
)
def test_an_operation_without_a_16_bit_kernel(function: Callable[[Tensor], Tensor], op: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Computes(function))
    assert reasons(usage_of(model, torch.randn(4, 4)))["1", op, "forward"] is Reason.NO_KERNEL


def test_a_region_that_the_models_code_switched_off() -> None:
    def softmax_in_fp32(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.float().softmax(-1)

    model = nn.Sequential(nn.Linear(4, 4), Computes(softmax_in_fp32), nn.Linear(4, 4))
    assert reasons(usage_of(model, torch.randn(3, 4))) == {
        ("1", "_softmax", "forward"): Reason.OUTSIDE_REGION,
        ("1", "_softmax_backward_data", "backward"): Reason.OUTSIDE_REGION,
    }


def test_a_region_that_the_models_own_forward_switched_off() -> None:
    def softmax_in_fp32(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.softmax(-1)

    usage = usage_of(Computes(softmax_in_fp32), torch.randn(3, 4, requires_grad=True))
    assert reasons(usage)["", "_softmax", "forward"] is Reason.OUTSIDE_REGION


def test_a_layer_pinned_by_the_plan() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    apply(model, PrecisionPlan.of("bf16", {"1": "fp32"}))
    usage = usage_of(model, torch.randn(3, 4))
    assert reasons(usage) == {
        ("1", "addmm", "forward"): Reason.PINNED,
        ("1", "mm", "backward"): Reason.PINNED,
        ("1", "sum", "backward"): Reason.PINNED,
    }
    assert usage.layers["1"]["addmm"].keys() == {"fp32"}
    assert usage.layers["0"]["addmm"].keys() == usage.layers["2"]["addmm"].keys() == {"bf16"}


def test_a_plan_of_a_part_of_the_model() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    decision = Decision(layer="1", old="fp32", new="fp32", reason=Reason.DEVICE_LACKS)
    rule = Rule(pattern="1", recipe=find_recipe("fp32"))
    apply(inner, PrecisionPlan(base=find_recipe("bf16"), rules=(rule,), decisions=(decision,)))
    usage = usage_of(nn.Sequential(nn.Tanh(), inner), torch.randn(3, 4))
    assert reasons(usage)["1.1", "addmm", "forward"] is Reason.DEVICE_LACKS


@pytest.mark.parametrize("reason", [Reason.DEVICE_LACKS, Reason.MEASURED_FASTEST])
def test_the_reason_is_that_of_the_plans_decision(reason: Reason) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    decision = Decision(layer="0", old="fp32", new="fp32", reason=reason)
    rule = Rule(pattern="0", recipe=find_recipe("fp32"))
    apply(model, PrecisionPlan(base=find_recipe("bf16"), rules=(rule,), decisions=(decision,)))
    assert reasons(usage_of(model, torch.randn(3, 4)))["0", "addmm", "forward"] is reason


def test_without_a_region_nothing_is_a_fallback() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    apply(model, PrecisionPlan.of("fp32", {"0": "fp32"}))
    with PrecisionMonitor(model) as monitor:
        F.mse_loss(model(torch.randn(3, 4)), torch.zeros(3, 4)).backward()
        assert monitor.log_precision_usage().fallbacks == ()


def test_a_loss_inside_the_region_and_one_outside() -> None:
    def inside(output: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(output, torch.zeros(3, 4))

    def outside(output: Tensor) -> Tensor:
        return F.mse_loss(output.float(), torch.zeros(3, 4))

    model = nn.Linear(4, 4)
    assert reasons(usage_of(model, torch.randn(3, 4), inside))["", "mse_loss", "forward"] is Reason.AUTOCAST_LIST
    assert reasons(usage_of(model, torch.randn(3, 4), outside)) == {}


def test_a_region_that_begins_inside_the_model() -> None:
    class Opens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.inner(x)
            return self.head(x.float())

    model = Opens()
    with PrecisionMonitor(model) as monitor:
        model(torch.randn(2, 4)).sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.layers["inner"]["addmm"].keys() == {"bf16"}
    assert usage.layers["head"]["addmm"].keys() == {"fp32"}  # the code left the region: not a fallback
    assert usage.fallbacks == ()


def test_casts_and_fills_and_the_parameters_own_are_no_fallbacks() -> None:
    class Fills(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (torch.zeros(4) + torch.arange(4)).to(x.dtype)

    model = nn.Sequential(nn.Linear(4, 4), Fills())
    for _ in range(2):
        usage = usage_of(model, torch.randn(3, 4))
    assert usage.layers["0"]["add_"]["fp32"].backward == 2  # gradients accumulate in fp32
    assert {f.op for f in usage.fallbacks} <= {"add"}
    assert usage.ops["cast"]["bf16<-fp32"].forward == 4  # weight, bias, input, and the fill


def test_recomputed_operations_fall_back_in_the_backward() -> None:
    loss = Computes(lambda x: F.mse_loss(x, torch.zeros(3, 4), reduction="none"))
    inner = nn.Sequential(nn.Linear(4, 4), loss, nn.Linear(4, 4))
    model = Computes(lambda x: checkpoint(inner, x, use_reentrant=False))
    model.inner = inner
    usage = usage_of(model, torch.randn(3, 4))
    assert reasons(usage) == {
        ("inner.1", "mse_loss", "forward"): Reason.AUTOCAST_LIST,
        ("inner.1", "mse_loss", "backward"): Reason.AUTOCAST_LIST,
        ("inner.1", "mse_loss_backward", "backward"): Reason.AUTOCAST_LIST,
    }


def test_counts_of_fallbacks_add_up() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with PrecisionMonitor(model, sample_every=1) as monitor:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.tensor([1])).sum().backward()
        found = monitor.log_precision_usage().fallbacks
    embedding = Fallback(
        layer="0", op="embedding", phase="forward", format="fp32", reason=Reason.FOLLOWS_INPUT, count=3
    )
    assert embedding in found


@pytest.mark.gpu
def test_the_list_is_that_of_the_device() -> None:
    """On CUDA autocast lists softmax, layer_norm and cross_entropy's parts, unlike on CPU."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Softmax(-1)).cuda()
    with PrecisionMonitor(model) as monitor:
        with torch.autocast("cuda", torch.float16):
            F.cross_entropy(model(torch.randn(3, 4).cuda()), torch.zeros(3, dtype=torch.long).cuda()).backward()
        found = reasons(monitor.log_precision_usage())
    for layer, op in (("1", "native_layer_norm"), ("3", "_softmax"), ("", "_log_softmax"), ("", "nll_loss_forward")):
        assert found[layer, op, "forward"] is Reason.AUTOCAST_LIST
    assert found["1", "native_layer_norm_backward", "backward"] is Reason.AUTOCAST_LIST
    assert found["3", "_softmax_backward_data", "backward"] is Reason.AUTOCAST_LIST
