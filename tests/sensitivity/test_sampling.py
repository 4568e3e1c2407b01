"""Which rows or items are looked at, and what the loss averages over."""

import pytest
import torch
from torch import nn

from deepseek_mp.nn.call import parse_batch, run
from deepseek_mp.sensitivity.sampling import BatchLayout, Terms, draw


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def layout(batch):
    return BatchLayout.of(parse_batch(batch))


def drawn(x, where, generator, *, rowwise=True, whole=False):
    return draw(x, where, rows=16, items=4, rowwise=rowwise, whole=whole, generator=generator)


def test_labels_are_the_terms_of_a_language_model(generator):
    where = layout((torch.randn(4, 32, 8), torch.randint(0, 5, (4, 32))))
    assert (where.positions, where.items) == (128, 4)
    sample = drawn(torch.randn(4, 32, 10), where, generator)
    assert sample.by_row
    assert sample.groups == 128
    assert sample.index.unique().numel() == 16


def test_tokens_of_an_image_model_are_drawn_as_whole_images(generator):
    where = layout((torch.randn(8, 32, 8), torch.randint(0, 5, (8,))))
    x = torch.randn(8, 32, 10)
    sample = drawn(x, where, generator)
    assert not sample.by_row
    assert sample.groups == 8
    assert sample.of(x).shape == (4, 32, 10)


def test_a_head_over_one_row_per_image_is_drawn_by_row(generator):
    sample = drawn(torch.randn(64, 10), layout((torch.randn(64, 3), torch.randint(0, 5, (64,)))), generator)
    assert sample.by_row
    assert sample.groups == 64


def test_windows_that_are_no_items_are_drawn_by_row(generator):
    sample = drawn(torch.randn(32, 7, 10), layout((torch.randn(8, 3), torch.randint(0, 5, (8,)))), generator)
    assert sample.by_row


def test_a_norm_of_the_batch_is_seen_whole(generator):
    where = layout((torch.randn(64, 3), torch.randint(0, 5, (64,))))
    x = torch.randn(64, 3, 2, 2)
    sample = drawn(x, where, generator, rowwise=False, whole=True)
    assert sample.index is None
    assert torch.equal(sample.of(x), x)


def test_rows_of_input_and_gradient_are_the_same(generator):
    where = layout((torch.randn(4, 32, 8), torch.randint(0, 5, (4, 32))))
    x = torch.arange(128.0).view(4, 32, 1)
    sample = drawn(x, where, generator)
    assert torch.equal(sample.of(x) * 2, sample.of((2 * x).bfloat16()))


def terms(loss_fn, output, target):
    class Model(nn.Module):
        def forward(self, x):
            return output

    call = parse_batch((torch.randn(len(target), 1), target))
    return Terms.of(run(Model(), call, loss_fn), loss_fn)


def test_squared_errors_have_the_curvature_of_normal_errors():
    output = torch.randn(16, 2, requires_grad=True)
    found = terms(None, output, torch.randn(16, 2))
    assert found.count == 32
    assert float(found.curvature) == pytest.approx(1 / (2 * float(found.loss)))
    assert float(terms(nn.MSELoss(), output, torch.randn(16, 2)).curvature) != 1


def test_cross_entropy_is_a_likelihood_as_it_is():
    found = terms(None, torch.randn(16, 5, requires_grad=True), torch.randint(0, 5, (16,)))
    assert found.count == 16
    assert found.curvature == 1
