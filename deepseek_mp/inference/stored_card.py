"""A form and a card read again from the JSON that `to_json` made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from deepseek_mp.inference.card import Card, ServingPlan
from deepseek_mp.inference.choice import Trial
from deepseek_mp.inference.form import Form
from deepseek_mp.inference.layer_plan import LayerChoice, LayerPlan
from deepseek_mp.inference.measure import Energy, Latency

_PARTS: Mapping[str, type[Any]] = {"latency": Latency, "energy": Energy}


def form_from_json(data: Mapping[str, Any]) -> Form:
    """`TypeError` or `ConfigError` for what is no form."""
    if not isinstance(data, Mapping):
        raise TypeError(f"a {type(data).__name__} as a form")
    form = Form(**{name: _values(value) for name, value in data.items()})
    for field in fields(Form):
        value = getattr(form, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):  # or text would turn it on
            raise TypeError(f"{field.name}={value!r}")
    return form


def card_from_json(data: Mapping[str, Any]) -> Card:
    """The card with its plan; `KeyError` or `TypeError` for what is none."""
    trials = tuple(map(_trial, data["trials"]))
    layers = None if data["layers"] is None else _layers(data["layers"])
    plan = ServingPlan(
        form=form_from_json(data["form"]), budget=data["budget"], metric=data["metric"], trials=trials, layers=layers
    )
    return Card(model=data["model"], device=data["device"], batch_size=data["batch_size"], plan=plan)


def _layers(data: Mapping[str, Any]) -> LayerPlan:
    return LayerPlan(why=data["why"], choices=tuple(LayerChoice(**choice) for choice in data["choices"]))


def _trial(data: Mapping[str, Any]) -> Trial:
    parts: dict[str, Any] = {
        name: None if data[name] is None else _part(kind, data[name]) for name, kind in _PARTS.items()
    }
    rest = {name: value for name, value in data.items() if name not in ("name", "form", *_PARTS)}
    return Trial(form=form_from_json(data["form"]), **parts, **rest)


def _part(kind: type[Any], data: Mapping[str, Any]) -> Any:
    """Without what follows from the rest."""
    return kind(**{field.name: data[field.name] for field in fields(kind)})


def _values(value: Any) -> Any:
    """Lists as the tuples that they were."""
    return tuple(map(_values, value)) if isinstance(value, list) else value
