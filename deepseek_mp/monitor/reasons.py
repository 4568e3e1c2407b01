"""Why an operation inside a 16-bit autocast region ran in a wider format.

The first that holds, in this order:

1. the plan in force gives the layer a wide recipe: the reason of that decision (`pinned`, or what
   was measured or lacking);
2. autocast is off at the call, inside a module that was entered with it on: `outside_region`;
3. the operation works on complex numbers, or is an FFT or a matrix decomposition: `no_kernel`;
4. autocast has a kernel of its own for the operation, or for the function of `torch.nn.functional`
   that called it, on this device, and not one that casts down or only promotes: `autocast_list`.
   PyTorch's dispatcher is asked for this, so it is the list of the version and device in use;
5. otherwise it ran in the format of its inputs: `follows_input`. A product among these stands inside a
   larger operation that had cast its inputs up, as attention's plain implementation does.

A limit of (4): a listed function in C++ that is made of several smaller operations and was called
neither through `torch.nn.functional` nor by a name like theirs (`torch.cosine_similarity`) is
reported by those smaller operations, as `follows_input`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import nn

from deepseek_mp.monitor import internals
from deepseek_mp.monitor.classify import Ran, product
from deepseek_mp.nn.convert import current_plan
from deepseek_mp.precision import FORMATS, Reason

# Autocast casts these down, beside the products: in FP32 they can only follow their inputs.
_CAST_DOWN = frozenset({
    "prelu", "addr", "chain_matmul", "linalg_multi_dot", "linalg_vecdot", "gru_cell", "lstm_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "scaled_dot_product_attention",
})  # fmt: skip
# Autocast casts the inputs of these to the widest among them, so the inputs decide.
_PROMOTE = frozenset({
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "scatter_add", "tensordot",
    "cat", "stack", "index_copy",
})  # fmt: skip
_DECOMPOSITIONS = frozenset({
    "cholesky", "cholesky_inverse", "cholesky_solve", "triangular_solve", "geqrf", "ormqr", "lu_unpack", "svd", "qr",
    "inverse", "pinverse",
})  # fmt: skip
_HALF_LINALG = frozenset({"linalg_vector_norm", "linalg_vecdot", "linalg_cross"})


def wide_layers(model: nn.Module, layers: Mapping[int, str]) -> dict[str, Reason]:
    """Layers that the plan in force runs wider than 16 bits, with the reason of the decision.

    `layers`: id of each module -> its name. The plan may be that of a module inside `model`.
    """
    wide: dict[str, Reason] = {}
    for module in model.modules():
        plan = current_plan(module)
        for decision in plan.decisions if plan is not None else ():
            format = FORMATS.get(decision.new)
            if format is not None and format.storage_bits > 16 and decision.reason is not Reason.NOT_CONTROLLABLE:
                name = ".".join(part for part in (layers[id(module)], decision.layer) if part)
                wide[name] = decision.reason
    return wide


def why_wide(
    ran: Ran, layer: str, decided: Mapping[str, Reason], *, region_here: bool, region_around: bool
) -> Reason | None:
    """Reason of a fallback, or None if this is none.

    `region_here`: autocast to 16 bits is on at the call. `region_around`: a module around it was
    entered with it on.
    """
    if not (ran.reads and ran.wide and (region_here or region_around)):
        return None
    if layer in decided:
        return decided[layer]
    if not region_here:
        return Reason.OUTSIDE_REGION
    if ran.complex or _lacks_16_bits(ran.op):
        return Reason.NO_KERNEL
    return Reason.AUTOCAST_LIST if _on_autocast_list(ran) else Reason.FOLLOWS_INPUT


def _lacks_16_bits(op: str) -> bool:
    if op in _HALF_LINALG:
        return False
    return op.startswith(("_fft_", "fft_", "linalg_", "_linalg_")) or op in _DECOMPOSITIONS


def _on_autocast_list(ran: Ran) -> bool:
    if ran.device is None:
        return False
    if product(ran.op) is not None:
        return False
    listed = internals.autocast_kernels(ran.device.type) - _PROMOTE - _CAST_DOWN
    if _public_names(ran.op) & listed:
        return True
    caller = internals.functional_caller()
    return caller is not None and bool({caller, f"{caller}_loss"} & listed)


@cache
def _public_names(op: str) -> frozenset[str]:
    """The operation's name and those a user would call it by: `_softmax` is `softmax`."""
    names = {op}
    for prefix in ("_", "native_", "_fused_"):
        names |= {name.removeprefix(prefix) for name in names}
    for suffix in ("_forward", "_with_indices", "_kernel"):
        names |= {name.removesuffix(suffix) for name in names}
    return frozenset(names)
