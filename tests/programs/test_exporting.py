"""Sizes are free where the module bears it, and what an exported program computes is what the module does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import get_ident

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError, ConfigError
from deepseek_mp.programs import bits_equal, exported
from deepseek_mp.programs.signature import inputs


class Module(nn.Module):
    """A function of the arguments, with a linear layer at hand."""

    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(3, 3)

    def forward(self, args, kwargs):
        return self.function(self.layer, *args, **kwargs)


def made(function, *args, dynamic=(0,), **kwargs):
    module = Module(function)
    return module, exported(module, args, kwargs, dynamic=dynamic)


def same(module, found, *args, **kwargs):
    found.signature.check(args, kwargs)
    with torch.no_grad():
        return bits_equal(found.program.module(check_guards=False)(*inputs(args, kwargs)), module(args, kwargs))


@pytest.mark.parametrize("count", [1, 4])
def test_the_first_size_is_free_whatever_it_is_in_the_example(count):
    module, found = made(lambda layer, x, scale: layer(x) * scale, torch.randn(count, 3), torch.randn(count, 1))
    assert found.signature.is_free
    for other in (1, 2, 7):
        assert same(module, found, torch.randn(other, 3), torch.randn(other, 1))
    with pytest.raises(BatchError, match=r"\[5, 1\]"):
        found.signature.check((torch.randn(4, 3), torch.randn(5, 1)), {})


def test_other_dimensions_are_free_when_asked_for():
    _, fixed = made(lambda layer, x: layer(x), torch.randn(2, 4, 3))
    module, free = made(lambda layer, x: layer(x), torch.randn(2, 4, 3), dynamic=(0, 1))
    assert same(module, free, torch.randn(5, 9, 3))
    with pytest.raises(BatchError, match=r"\[2, 9, 3\]"):
        fixed.signature.check((torch.randn(2, 9, 3),), {})


def test_a_size_in_the_code_fixes_it_and_is_the_reason():
    _, found = made(lambda layer, x: layer(x).reshape(4, 3), torch.randn(4, 3))
    assert not found.signature.is_free
    assert "needs the size" in found.signature.fixed_because
    with pytest.raises(BatchError, match=r"Allowed: .*\[4, 3\].*needs the size that it was exported with"):
        found.signature.check((torch.randn(2, 3),), {})


def test_an_example_of_one_that_needs_one_is_fixed_at_one():
    module, found = made(lambda layer, x: layer(x).reshape(1, 3), torch.randn(1, 3))
    assert same(module, found, torch.randn(1, 3))


def test_decisions_by_size_are_conditions_of_the_sizes():
    module, found = made(lambda layer, x: layer(x) if x.shape[0] % 2 == 0 else x, torch.randn(4, 3))
    assert same(module, found, torch.randn(6, 3))
    for odd in (1, 3):
        with pytest.raises(BatchError, match=r"which are not as|from 2"):
            found.signature.check((torch.randn(odd, 3),), {})


def test_one_sample_that_is_computed_otherwise_is_refused():
    module, found = made(lambda layer, x: layer(x) if x.shape[0] > 1 else x, torch.randn(4, 3))
    assert same(module, found, torch.randn(2, 3))
    with pytest.raises(BatchError, match=r"s\d+ from 2"):
        found.signature.check((torch.randn(1, 3),), {})


def test_named_arguments_and_plain_values():
    module, found = made(lambda layer, *, x, twice: layer(x) * (2 if twice else 1), x=torch.randn(4, 3), twice=True)
    assert same(module, found, x=torch.randn(2, 3), twice=True)


def test_what_cannot_be_exported_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"a Module that torch\.export cannot export \(\w+: "):
        made(lambda layer, x: layer(x) if x.sum() > 0 else x, torch.randn(4, 3))
    with pytest.raises(ConfigError, match="gives other outputs than itself"):
        made(lambda layer, x: layer(x) + torch.rand(()), torch.randn(4, 3))
    with pytest.raises(ConfigError, match=r"input args\[1\] of type complex"):
        made(lambda layer, x, y: x, torch.randn(4, 3), 1j)


def test_equal_bits_have_nans_in_the_same_places():
    nan = torch.tensor([float("nan"), 1.0])
    assert bits_equal({"a": nan}, {"a": nan.clone()})
    assert not bits_equal(nan, torch.tensor([1.0, 1.0]))
    assert not bits_equal(nan, nan.double())
    assert not bits_equal((nan,), nan)


def test_the_old_flags_of_fp32_products_are_not_read(monkeypatch):
    monkeypatch.delattr(torch._C, "_get_cudnn_allow_tf32")  # it raises where users write the new ones
    assert made(lambda layer, x: layer(x), torch.randn(4, 3))[1].signature.is_free


class Says(nn.Linear):
    """Gives text beside numbers."""

    def forward(self, args, kwargs):
        return {"y": super().forward(*args), "unit": kwargs["unit"]}


def test_text_among_the_outputs_is_named_since_no_file_can_hold_it():
    with pytest.raises(ConfigError, match=r"outputs with the text 'ms'\. Allowed: tensors, numbers and None"):
        exported(Says(4, 2), (torch.randn(3, 4),), {"unit": "ms"})


@pytest.mark.parametrize("dynamic", [0, None, "0", (-1,), (True,), (0.0,), (0, 2)])
def test_what_names_no_dimension_is_refused_since_sizes_would_be_fixed_in_silence(dynamic):
    with pytest.raises(ConfigError, match=r"dynamic=.*Allowed: (a tuple of )?dimensions.*Pass \(0,\) for the first"):
        made(lambda layer, x: layer(x), torch.randn(4, 3), dynamic=dynamic)


def test_the_first_dimension_may_be_named_for_inputs_that_have_none():
    assert not made(lambda layer, x: layer.weight * x, torch.tensor(2.0))[1].signature.is_free


def test_a_call_without_inputs_or_outputs_is_refused():
    with pytest.raises(ConfigError, match=r"a call without inputs\. Allowed: one input or more"):
        made(lambda layer: layer.weight)
    with pytest.raises(ConfigError, match="a forward without outputs"):
        made(lambda layer, x: (), torch.ones(2, 3))


def test_threads_export_one_after_the_other():
    inside, most, others = [], [], []  # by thread: regions of one are nested

    with ThreadPoolExecutor(1) as pool:

        @contextmanager
        def region():
            inside.append(get_ident())
            most.append(len(set(inside)))
            if not others:
                others.append(pool.submit(again))
                wait(others, timeout=0.5)  # for one that does not wait its turn
            try:
                yield
            finally:
                inside.pop()

        def again():
            return exported(Module(lambda layer, x: layer(x)), (torch.ones(2, 3),), {}, kept=region)

        again()
        others[0].result()
    assert max(most) == 1
