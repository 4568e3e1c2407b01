"""Which calls are seen to be like an earlier one, and that all of them have its signature."""

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.inference.graphed import signature
from deepseek_mp.programs.flat_call import FlatCall, LastCall

CPU = torch.device("cpu")


class Marked(Tensor):
    """A subclass, whose attributes say what they like."""


def image(**how):
    return torch.zeros(2, 3, 4, 5, **how)


def test_a_like_call_gives_its_tensors_in_order():
    flat = FlatCall((image(), None, 3), {"at": torch.zeros(1), "cached": True})
    x, at = image() + 1, torch.ones(1)
    found = flat.tensors((x, None, 3), {"at": at, "cached": True})
    assert found is not None
    assert [id(one) for one in found] == [id(x), id(at)]


def test_gradients_and_inference_mode_make_no_difference():
    flat = FlatCall((image(),), {})
    assert flat.tensors((image(requires_grad=True),), {}) is not None
    with torch.inference_mode():
        assert flat.tensors((image(),), {}) is not None


@pytest.mark.parametrize(
    "other",
    [
        image(dtype=torch.float64),
        image(device="meta"),
        image().to(memory_format=torch.channels_last),
        torch.zeros(3, 2, 4, 5),
        torch.zeros(2, 3, 4),
        torch.zeros(1).expand(2, 3, 4, 5),
        image().to_sparse(),
        image().as_subclass(Marked),
        nn.Parameter(image()),
        None,
        1.0,
    ],
    ids=["dtype", "device", "strides", "shape", "rank", "expanded", "sparse", "subclass", "parameter", "None", "float"],
)
def test_another_tensor_is_not_alike(other):
    flat = FlatCall((image(), 1), {})
    assert flat.tensors((image(), 1), {}) is not None
    assert flat.tensors((other, 1), {}) is None


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts_are_not_asked_for_strides():
    """Some have none, and those of a sparse scalar are a dense one's."""
    for like, other in (
        (torch.zeros(2, 3), torch.zeros(2, 3).to_sparse_csr()),
        (torch.zeros(()), torch.zeros(()).to_sparse()),
    ):
        assert FlatCall((like,), {}).tensors((other,), {}) is None


@pytest.mark.parametrize("other", [True, 1.0, 2, None, "1", torch.zeros(())])
def test_another_value_is_not_alike(other):
    assert FlatCall((image(), 1), {}).tensors((image(), other), {}) is None


def test_keywords_are_the_same_in_the_same_order():
    a, b = torch.zeros(1), torch.zeros(1)
    flat = FlatCall((image(),), {"a": a, "b": b})
    assert flat.tensors((image(),), {"a": a, "b": b}) is not None
    for args, kwargs in (
        ((image(),), {"b": a, "a": b}),
        ((image(),), {"a": a, "c": b}),
        ((image(),), {"a": a}),
        ((image(), a, b), {}),
        ((image(), a), {"b": b}),
        ((), {"a": a, "b": b}),
    ):
        assert flat.tensors(args, kwargs) is None
    assert FlatCall((image(),), {}).tensors((image(),), {"a": a}) is None
    assert FlatCall((image(),), {}).tensors((image(), a), {}) is None


@pytest.mark.parametrize(
    "leaf", [[torch.zeros(1)], {"x": torch.zeros(1)}, slice(1), object(), torch.zeros(1).to_sparse()]
)
def test_nothing_is_like_a_call_with_more_than_tensors_and_constants(leaf):
    flat = FlatCall((image(), leaf), {})
    assert flat.tensors((image(), leaf), {}) is None
    assert flat.tensors((image(),), {}) is None


def test_what_is_alike_has_the_same_signature():
    values = (
        image(),
        image().double(),
        image().transpose(2, 3),
        nn.Parameter(image()),
        None,
        1,
        True,
        1.0,
        0.0,
        -0.0,
        "1",
    )
    for first in values:
        for second in values:
            if FlatCall((first,), {}).tensors((second,), {}) is not None:
                assert signature((first,), CPU) == signature((second,), CPU)


def test_the_last_call_is_the_one_that_was_remembered_last():
    last = LastCall()
    assert not last.is_like((), {})
    last.remember((image(),), {})
    assert last.is_like((image() + 1,), {})
    assert not last.is_like((image().double(),), {})
    last.remember((image().double(),), {})
    assert not last.is_like((image(),), {})
