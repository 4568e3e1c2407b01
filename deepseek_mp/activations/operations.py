"""Which operations' backwards bear that a saved tensor was rounded, and which read only its sign.

An operation is known by the name of the function that was called. What is not listed is left alone, since rounding may
do any harm there: a quotient divides by a value that may have become zero, `amax` compares values for equality, a loss
and `lerp` take the difference of two that are close, a log-softmax and an attention take exponentials of what they
saved, the slope of `hardswish` jumps at 3.
"""

from __future__ import annotations

TOLERANT = frozenset(
    {
        # Products: linear in what they saved.
        "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv",
        "tensordot", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply", "square", "addcmul",
        # Activations whose slope does not jump, but at zero: rounding keeps the sign.
        "gelu", "silu", "silu_", "mish", "softplus", "elu", "celu", "selu", "glu", "softmax",
        # Norms: their statistics are kept.
        "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm",
        # Only the sizes of what they saved are read.
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dropout",
    }
)  # fmt: skip
STATISTICS = (
    "Rsqrt", "Sqrt", "Reciprocal", "Pow", "Log", "LogSoftmax", "LogSumExp", "Logsumexp", "Var", "Std", "Norm",
    "LinalgVectorNorm", "Sigmoid", "Tanh", "Amax", "Max", "Min", "Exp",
)  # fmt: skip
"""Nodes whose results are read otherwise than linearly, also inside a function that is listed."""
_STATISTIC_NODES = frozenset(f"{name}Backward{number}" for name in STATISTICS for number in range(4))
_SPLITTING = ("Split", "Unbind", "Chunk", "UnsafeSplit", "TensorSplit")
POSITIVE_IF_PASSED = frozenset({"leaky_relu", "leaky_relu_"})
NOT_POSITIVE_IF_STOPPED = frozenset({"relu", "relu_"})


def reads_sign(operation: str) -> bool:
    """Whether the backward of the operation reads no more of the floating tensor it saves than which are positive."""
    return operation in POSITIVE_IF_PASSED or operation in NOT_POSITIVE_IF_STOPPED


def is_statistic(node: str, output: int) -> bool:
    """Whether a result of this autograd node is one that must not be rounded.

    Args:
        node: the name of the node that made the tensor; '' for a leaf.
        output: which of the node's results it is. Those after the first are statistics, but for parts of a tensor.
    """
    return node in _STATISTIC_NODES or (output > 0 and not node.startswith(_SPLITTING))
