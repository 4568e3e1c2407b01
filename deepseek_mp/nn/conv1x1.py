"""A 1x1 convolution in FP8: a linear layer over the channels of every pixel.

A convolution whose kernel is one pixel, with stride 1, no padding and no groups, multiplies the channels of each
pixel by one matrix. Its three products are those of a linear layer with as many rows as there are pixels, so it runs
as one, in every recipe and with the same bits. Dilation has no meaning for it, and it may have one, two or three
dimensions.

**Memory.** The rows of a linear layer are the pixels with their channels side by side, which is how `channels_last`
stores them: input and output are views then, and so are their gradients. Channels first, the input is copied, so is
the output, and in the backward its gradient. PyTorch's convolutions give channels_last where the input or the weight
has it and contiguous memory elsewhere, which `y.view(...)` in a model may count on; here it is the same. A
one-dimensional convolution gives contiguous memory always.

**The output is an ordinary tensor**: it is a view or a copy of what the linear layer gives, so an activation between
two of these is computed and not put off (`nn.lazy`).

All other convolutions stay convolutions: `nn.assign` gives them the region's format and `obstacle` as the reason.
"""

from __future__ import annotations

from torch import Tensor, nn

from deepseek_mp.errors import ShapeError, explain
from deepseek_mp.nn.functional import HeldWeight, Products, UnitScaling, low_precision_linear

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
KINDS: frozenset[type[nn.Module]] = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})


def obstacle(module: Convolution) -> str | None:
    """The setting that makes it more than one matrix for all pixels, as in `stride=(2, 2)`; None if nothing does."""
    ones = (1,) * len(module.kernel_size)
    for name, wanted in (("kernel_size", ones), ("stride", ones), ("groups", 1)):
        value = getattr(module, name)
        if value != wanted:
            return f"{name}={value}"
    padding: object = module.padding
    if padding in ("same", "valid") or not any(module.padding):  # a kernel of one pixel needs none
        return None
    return f"padding={padding}"


def as_matrix(weight: Tensor) -> Tensor:
    """The weight [O, C, 1, ...] of such a convolution as [O, C]; that of a linear layer is it already.

    The gradient comes back with the strides of the weight, which fused optimizers want.
    """
    if weight.dim() > 2 and _channels_come_last(weight):
        weight = weight.movedim(1, -1)
    return weight.flatten(1)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    products: Products,
    held: HeldWeight | None = None,
    scaling: UnitScaling | None = None,
) -> Tensor:
    """A 1x1 convolution with its three products in the formats of `products`.

    Args:
        x: [N, C, ...] or [C, ...] in fp32, bf16 or fp16, with as many more dimensions as the weight has.
        weight: [O, C, 1, ...]; O and C are multiples of what the recipe's granularities need.
        bias: [O] or None.
        products: the recipe, and what runs it.
        held: a weight quantised before; used instead of quantising now if it is this very weight.
        scaling: what delayed scaling keeps of the layer; without it tensors are scaled by their own maxima.

    Returns:
        [N, O, ...] or [O, ...] in bf16, in the memory format that PyTorch's convolution gives. Gradients have the types
        of x, weight and bias, and cannot be differentiated again.
    """
    channels = 1 - weight.dim()  # where they are, from the end
    fits = x.dim() in (weight.dim() - 1, weight.dim()) and x.shape[channels] == weight.shape[1]
    if not fits or any(size != 1 for size in weight.shape[2:]):
        raise _does_not_fit(x, weight)
    matrix = as_matrix(weight)
    if held is not None:
        held = HeldWeight(matrix, held.operands) if held.weight is weight else None
    pixels = x.movedim(channels, -1)
    y = low_precision_linear(pixels, matrix, bias, products, held, scaling).movedim(-1, channels)
    return in_layout_of(y, x, weight)


def in_layout_of(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y, whose channels come last in memory, in the memory format that PyTorch's convolution of x gives."""
    given_last = x.dim() == weight.dim() and x.movedim(1, -1).is_contiguous()
    stays = weight.dim() > 3 and (given_last or _channels_come_last(weight))
    return y if stays else y.contiguous()


def check_settings(module: Convolution) -> None:
    """`ShapeError` if the settings were changed, after a plan was applied, to those of another convolution."""
    found = obstacle(module)
    if found is not None:
        raise ShapeError(
            explain(
                f"a {type(module).__name__} with {found}, which it did not have when its plan was applied",
                "the settings of a 1x1 convolution",
                "After changing a layer's settings apply the plan again",
            )
        )


def _does_not_fit(x: Tensor, weight: Tensor) -> ShapeError:
    return ShapeError(
        explain(
            f"an input {list(x.shape)} for a 1x1 convolution with the weight {list(weight.shape)}",
            f"inputs of {weight.dim() - 1} or {weight.dim()} dimensions with {weight.shape[1]} channels, and weights "
            "that end in ones",
            "Pass such an input; after replacing a layer's weight apply the plan again",
        )
    )


def _channels_come_last(weight: Tensor) -> bool:
    """Whether [O, C, 1, ...] is channels_last by its strides: as far as order goes it always is."""
    return weight.stride(1) == 1 != weight.stride(-1)
