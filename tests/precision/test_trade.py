"""Trades in words: what is saved, what it costs, at which rates."""

from __future__ import annotations

import pytest

from deepseek_mp.precision.trade import Trade, number, quantity


def test_a_dear_trade() -> None:
    trade = Trade(objective="seconds", saved=0.12e-3, taken=(3.1e-4, 0.0, 0.0), rates=(2.0, 0.0, 0.0))
    assert str(trade) == (
        "save 120 µs and cost 3.1e-4 of the loss budget, 5.2 times the going rate of 200 µs per 1e-4 of loss"
    )
    assert trade.price == pytest.approx(0.62e-3)
    assert trade.profit == pytest.approx(-0.5e-3)


def test_several_budgets_and_what_is_given_back() -> None:
    trade = Trade(objective="bytes", saved=4e6, taken=(-1e-4, 2e-3, 3e5), rates=(1e9, 1e9, 0.5))
    assert str(trade) == (
        "save 4 MB and cost 2e-3 of the noise budget and 300 kB of the bytes budget, "
        "0.51 times the going rates of 1 MB per 1e-3 of noise and 50 kB per 100 kB of bytes"
    )


def test_what_has_no_price_has_no_rate() -> None:
    trade = Trade(objective="seconds", saved=2.0, taken=(0.01, 0.0, 0.0), rates=(0.0, 0.0, 0.0))
    assert str(trade) == "save 2 s and cost 0.01 of the loss budget"
    free = Trade(objective="seconds", saved=2.0, taken=(0.0, -1.0, 0.0), rates=(0.0, 1.0, 0.0))
    assert str(free) == "save 2 s and cost nothing"


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (1.5, "seconds", "1.5 s"),
        (-2.5e-3, "seconds", "-2.5 ms"),
        (99.6e-6, "seconds", "100 µs"),
        (3e-12, "seconds", "3e-12"),
        (0.0, "seconds", "0"),
        (2.5e12, "bytes", "2.5e3 GB"),
        (999.0, "bytes", "999 B"),
        (1e-4, "loss", "1e-4"),
        (0.0123, "noise", "0.012"),
    ],
)
def test_quantities(value: float, kind: str, words: str) -> None:
    assert quantity(value, kind) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0"), (5.0, "5"), (312.4, "312"), (1234.0, "1.2e3"), (-0.5, "-0.5")]
)
def test_numbers(value: float, words: str) -> None:
    assert number(value) == words
