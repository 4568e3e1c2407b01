"""The inputs for a number of samples: cut, repeated, or refused."""

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError, LoaderError
from deepseek_mp.inference.samples import inputs_of
from deepseek_mp.nn.call import Call, parse_batch


class Named(nn.Module):
    """Keyword arguments, of which one is no sample's own; it does not take labels."""

    def forward(self, *, x, scale):
        return x * scale


def test_samples_are_cut_and_repeated():
    x = torch.arange(9.0).view(3, 3)
    call, model = parse_batch((x, torch.zeros(3))), nn.Linear(3, 2)
    torch.testing.assert_close(inputs_of(model, call, 2), (x[:2],))
    torch.testing.assert_close(inputs_of(model, call, 5), (x[[0, 1, 2, 0, 1]],))


def test_sparse_samples_are_repeated_as_dense_ones():
    x = torch.arange(9.0).view(3, 3)
    (found,) = inputs_of(nn.Linear(3, 2), parse_batch((x.to_sparse(), torch.zeros(3))), 5)
    torch.testing.assert_close(found.to_dense(), x[[0, 1, 2, 0, 1]])


def test_names_are_kept_labels_are_left_out_and_what_is_no_sample_stays():
    call = parse_batch({"x": torch.randn(3, 3), "scale": torch.tensor(2.0), "labels": torch.zeros(3)})
    found = inputs_of(Named(), call, 5)
    assert set(found) == {"x", "scale"}
    assert (len(found["x"]), found["scale"].dim()) == (5, 0)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(LoaderError, match="a first batch without samples"):
        inputs_of(nn.Linear(3, 2), parse_batch((torch.zeros(0, 3), torch.zeros(0))), 2)
    both = Call(args=(torch.ones(2, 3),), kwargs={"scale": torch.ones(2)}, target=None)
    with pytest.raises(ConfigError, match="positional and keyword arguments"):
        inputs_of(nn.Linear(3, 2), both, 2)
    with pytest.raises(ConfigError, match="inputs of 1125899906842624 samples, which alone are more than the memory"):
        inputs_of(nn.Linear(3, 2), parse_batch(torch.ones(2, 3)), 1 << 50)
    with pytest.raises(RuntimeError, match="index_select"):
        inputs_of(nn.Linear(3, 2), Call(args=(torch.ones(2, 3).to_sparse_bsr((1, 1)),), kwargs={}, target=None), 2)
