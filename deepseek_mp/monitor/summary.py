"""A copy of the store on the host -> statistics by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_mp.monitor.layer_statistics import (
    COMPILED,
    NOT_YET,
    SAMPLED,
    LayerStatistics,
    TensorStatistics,
    Value,
    known,
)
from deepseek_mp.monitor.observed import Observed
from deepseek_mp.monitor.store import PHASES, SEEN, TENSORS, UPDATE, Parts, corrected
from deepseek_mp.monitor.updates import UPDATE_FIELDS
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS
from deepseek_mp.precision import Operand


def summarise(observed: Observed, host: Tensor, *, is_compiled: bool) -> dict[str, LayerStatistics]:
    """Statistics of every layer that can be sampled, and of other modules with non-finite values."""
    parts, decay = observed.parts(host), observed.store.decay
    means = corrected(parts.mean, parts.count[..., None, None], decay)
    names = ("in_use", *observed.asked)
    found: dict[str, LayerStatistics] = {}
    for subject in observed.subjects:
        counts = [int(count) for count in parts.count[subject.index].tolist()]
        recipe = observed.recipes.get(subject.index)
        place = observed.places[subject.module]
        missing = COMPILED if is_compiled else NOT_YET
        found[subject.name] = LayerStatistics(
            layer=subject.name,
            status=SAMPLED if any(counts) else missing,
            recipe=None if recipe is None else recipe.name,
            tensors={
                operand.value: _tensor(parts.last[subject.index, t], means[subject.index, t], counts[t], names)
                for t, operand in enumerate(Operand)
                if counts[t]
            },
            updates=counts[UPDATE],
            update=_line(parts.last[subject.index, UPDATE, 0], means[subject.index, UPDATE, 0], UPDATE_FIELDS)
            if counts[UPDATE]
            else {},
            non_finite=_counts(SEEN, parts.bad[place]),
            produced=_counts(PHASES, parts.produced[place]),
        )
    return found | _others(observed, parts, found)


def _others(observed: Observed, parts: Parts, known_layers: dict[str, LayerStatistics]) -> dict[str, LayerStatistics]:
    """Modules that are not sampled, but had non-finite values."""
    seen = parts.bad.sum(1).tolist()
    return {
        name: LayerStatistics(
            layer=name,
            status=SAMPLED,
            non_finite=_counts(SEEN, parts.bad[place]),
            produced=_counts(PHASES, parts.produced[place]),
        )
        for place, name in enumerate(observed.modules)
        if seen[place] and name not in known_layers
    }


def _counts(names: Sequence[str], counts: Tensor) -> dict[str, int]:
    return {name: int(count) for name, count in zip(names, counts.tolist(), strict=True)}


def _tensor(last: Tensor, mean: Tensor, samples: int, ways: Sequence[str]) -> TensorStatistics:
    return TensorStatistics(
        samples=samples,
        spread=_line(last[0], mean[0], SPREAD_FIELDS),
        errors={way: _line(last[row], mean[row], ERROR_FIELDS) for row, way in enumerate(ways, 1)},
    )


def _line(last: Tensor, mean: Tensor, names: Sequence[str]) -> dict[str, Value]:
    pairs = zip(names, last.tolist(), mean.tolist(), strict=False)
    return {name: Value(known(value), known(average)) for name, value, average in pairs}


assert TENSORS[:UPDATE] == tuple(Operand), "the store keeps tensors in the order of the operands"
