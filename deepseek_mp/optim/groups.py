"""Groups of a model's parameters in which embeddings keep FP32 moments, whatever the others have."""

from __future__ import annotations

from typing import Any

from torch import nn

from deepseek_mp.optim.states import StateFormat

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def embeddings_apart(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters as groups: weights of embeddings with `states='fp32'`, and all others.

    A row of an embedding has a gradient only where its token occurs. An optimizer is given parameters without their
    modules, so it cannot tell which these are: `AdamW(embeddings_apart(model), states="8bit")`.

    Args:
        model: a head that is tied to an embedding counts as one.

    Returns:
        One group or two; each has its parameters in the model's order.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    apart = [parameter for parameter in trained if id(parameter) in embeddings]
    others = [parameter for parameter in trained if id(parameter) not in embeddings]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": apart, "states": StateFormat.FP32.value}]
    return [group for group in groups if group["params"]]
