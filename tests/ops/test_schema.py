"""The ops as torch sees them: schemas, shapes without data, no hidden choice."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_mp.errors import ConfigError, FormatError, ShapeError
from deepseek_mp.ops.layouts import ALIGNMENT
from deepseek_mp.ops.schema import product, quantise, quantise_delayed

PAIRS = [("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32")]
LAYOUTS = [(True, True), (True, False), (False, True)]
"""Whether rows are wanted, and whether columns are."""
COUNTS = [0, 5, 128]
# torch's own schema check multiplies the inputs by a number, which FP8 tensors do not have.
PRODUCT_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("count", COUNTS)
def test_quantise_is_a_well_formed_op(granularity, count):
    # Each layout with each granularity and with each count.
    rows, columns = LAYOUTS[(list(ALIGNMENT).index(granularity) + COUNTS.index(count)) % len(LAYOUTS)]
    arguments = (torch.randn(count, 256), "fp8_e4m3", granularity, False, rows, columns, "reference")
    torch.library.opcheck(torch.ops.deepseek_mp.quantise.default, arguments)


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("count", [0, 5])
def test_quantise_with_a_seed_is_a_well_formed_op(granularity, count):
    arguments = (torch.randn(count, 256), "fp8_e4m3", granularity, False, True, True, "reference")
    torch.library.opcheck(torch.ops.deepseek_mp.quantise.default, arguments, {"seed": torch.tensor(7)})


@pytest.mark.parametrize(
    ("seed", "shown"),
    [
        (torch.tensor([7]), r"shape \[1\]"),
        (torch.tensor(7, dtype=torch.int32), "torch.int32"),
        (torch.tensor(7.0), "torch.float32"),
    ],
)
def test_a_seed_that_is_no_int64_scalar_beside_the_tensor_is_refused(seed, shown):
    with pytest.raises(ShapeError, match=rf"a seed of .*{shown}.*Allowed: int64 of shape \[\] on cpu.*torch.randint"):
        quantise(torch.randn(16, 128), "fp8_e4m3", "row", False, True, False, "reference", seed=seed)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantise_delayed_is_a_well_formed_op(count, layout):
    top = (LAYOUTS.index(layout) + COUNTS.index(count)) % 2 * 2.0  # none yet and one, with each layout and count
    arguments = (torch.randn(count, 256), torch.tensor(top), torch.zeros(()), "fp8_e4m3", False, *layout)
    options = {"implementation": "reference"}
    torch.library.opcheck(torch.ops.deepseek_mp.quantise_delayed.default, arguments, options)


@pytest.mark.parametrize("pair", PAIRS)
def test_product_is_a_well_formed_op(pair):
    left = quantise(torch.randn(128, 256), "fp8_e4m3", pair[0], False, True, False, "reference")[:2]
    right = quantise(torch.randn(256, 256), "fp8_e5m2", pair[1], False, True, False, "reference")[:2]
    for bias in (None, torch.randn(256)):
        arguments = (*left, *right)
        options = {"left_granularity": pair[0], "right_granularity": pair[1], "bias": bias}
        options |= {"dtype": torch.bfloat16, "implementation": "reference"}
        torch.library.opcheck(torch.ops.deepseek_mp.product.default, arguments, options, test_utils=PRODUCT_CHECKS)


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("count", [0, 1, 100, 256])
def test_shapes_without_data_are_those_of_the_data(granularity, count):
    real = quantise(torch.randn(count, 256), "fp8_e4m3", granularity, False, True, True, "reference")
    with FakeTensorMode():
        fake = quantise(torch.empty(count, 256), "fp8_e4m3", granularity, False, True, True, "reference")
    for made, expected in zip(fake, real, strict=True):
        assert (made.shape, made.dtype, made.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("count", [0, 1, 100, 256])
def test_shapes_under_a_delayed_scale_are_those_of_tensor(count):
    x = torch.randn(count, 256)
    delayed = (torch.ones(()), torch.zeros(()), "fp8_e5m2", False, True, True)
    real = quantise(x, "fp8_e5m2", "tensor", False, True, True, "reference")
    made = quantise_delayed(x, *delayed, implementation="reference")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = quantise_delayed(torch.empty(count, 256), *delayed, implementation="reference")
    for expected, *others in zip(real, made, fake, strict=True):
        for other in others:
            assert (other.shape, other.dtype, other.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_widths_that_are_no_whole_groups_are_refused(granularity):
    with pytest.raises(ShapeError, match=f"multiples of {ALIGNMENT[granularity]}"):
        quantise(torch.randn(4, 200 + 1), "fp8_e4m3", granularity, False, True, False, "reference")


def test_unknown_names_are_refused():
    x = torch.randn(16, 128)
    with pytest.raises(ShapeError, match="granularity '2x2'"):
        quantise(x, "fp8_e4m3", "2x2", False, True, False, "reference")
    with pytest.raises(ConfigError, match="implementation 'fast' of quantise"):
        quantise(x, "fp8_e4m3", "row", False, True, False, "fast")
    q, s, _, _ = quantise(x, "fp8_e4m3", "row", False, True, False, "reference")
    with pytest.raises(ConfigError, match="implementation 'fast' of product"):
        product(q, s, q, s, ("row", "row"), None, torch.bfloat16, implementation="fast")


def test_what_a_delayed_scale_does_not_fit_is_refused():
    x, one, zero = torch.randn(16, 128), torch.ones(()), torch.zeros(())
    rest = ("fp8_e4m3", False, True, False)
    with pytest.raises(ConfigError, match="implementation 'fast' of quantise"):
        quantise_delayed(x, one, zero, *rest, implementation="fast")
    with pytest.raises(ShapeError, match="multiples of 16"):
        quantise_delayed(x[:, :17].contiguous(), one, zero, *rest, implementation="reference")
    with pytest.raises(ShapeError, match="contiguous matrices"):
        quantise_delayed(x.t(), one, zero, *rest, implementation="reference")
    with pytest.raises(FormatError, match="format 'bf16' to quantise to"):
        quantise_delayed(x, one, zero, "bf16", *rest[1:], implementation="reference")
    with pytest.raises(ShapeError, match=r"top of shape \[1\].*Allowed: fp32 of shape \[\] on cpu"):
        quantise_delayed(x, one.view(1), zero, *rest, implementation="reference")
    with pytest.raises(ShapeError, match=r"amax of shape.*float64"):
        quantise_delayed(x, one, zero.double(), *rest, implementation="reference")


def test_the_implementation_stands_in_the_graph():
    seen = []

    def keep(graph, inputs):
        seen.extend(node for node in graph.graph.nodes if "deepseek_mp" in str(node.target))
        return graph.forward

    compiled = torch.compile(
        lambda x: quantise(x, "fp8_e4m3", "row", False, True, False, "reference")[0].float(),
        backend=keep,
        fullgraph=True,
    )
    compiled(torch.randn(16, 128))
    assert len(seen) == 1
    assert "reference" in seen[0].args


@pytest.mark.parametrize(
    "x", [torch.randn(2, 16, 64), torch.randn(64), torch.randn(64, 16).t()], ids=["3-D", "1-D", "transposed"]
)
def test_only_contiguous_matrices_are_quantised(x):
    with pytest.raises(ShapeError, match="Allowed: contiguous matrices"):
        quantise(x, "fp8_e4m3", "row", False, True, False, "reference")


@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_only_formats_of_fp8_are_quantised_to(format):
    with pytest.raises(FormatError, match=f"format '{format}' to quantise to"):
        quantise(torch.randn(16, 64), format, "row", False, True, False, "reference")


def test_going_backward_through_the_ops_warns_and_gives_no_gradient():
    x = torch.randn(16, 64, requires_grad=True)
    q, s, _, _ = quantise(x, "fp8_e4m3", "row", False, True, False, "reference")
    out = product(q, s, q, s, ("row", "row"), None, torch.float32, implementation="reference")
    with pytest.warns(UserWarning, match="deepseek_mp::(product|quantise): an autograd kernel was not"):
        out.sum().backward()
    assert x.grad is None


def test_operands_of_different_contractions_are_refused():
    left = quantise(torch.randn(16, 128), "fp8_e4m3", "row", False, True, False, "reference")[:2]
    right = quantise(torch.randn(16, 256), "fp8_e4m3", "row", False, True, False, "reference")[:2]
    with pytest.raises(ShapeError, match=r"a product of operands \[16, 128\] and \[16, 256\]"):
        product(*left, *right, ("row", "row"), None, torch.bfloat16, implementation="reference")
