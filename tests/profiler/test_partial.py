"""Halves of a profile, joined and on disk."""

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.profiler.partial import Partial
from deepseek_mp.sensitivity import UnitReading


def reading(energy, batches=1):
    return UnitReading(order=0, batches=batches, calls=batches, effects={}, energy=energy, row_energy=1.0, spreads={})


def partial(loss, energy, **values):
    return Partial(seen=1, counted=1, loss=loss, readings={"a": reading(energy)}, **values)


def test_joined_halves_weigh_by_batches():
    first = Partial().joined(partial(1.0, 2.0)).joined(partial(3.0, 4.0))
    both = first.joined(partial(5.0, 9.0, skipped=("batch 2: why",)))
    assert both.loss == pytest.approx(3.0)
    assert both.readings["a"].energy == pytest.approx(5.0)
    assert (both.seen, both.counted, both.skipped) == (3, 3, ("batch 2: why",))


def test_what_a_later_batch_measures_is_no_longer_unmeasured():
    known = partial(1.0, 1.0, unmeasured={"b": "never called"})
    more = Partial(seen=1, counted=1, loss=1.0, readings={"b": reading(1.0)})
    assert known.joined(more).unmeasured == {}


def test_it_survives_the_disk_and_answers_one_question_only(tmp_path):
    made = partial(1.5, 2.5, unmeasured={"b": "why"}, skipped=("batch 0: why",))
    made.save(tmp_path / "p.json", {"seed": 1})
    assert Partial.load(tmp_path / "p.json", {"seed": 1}) == made
    assert Partial.load(tmp_path / "none.json", {"seed": 1}) == Partial()
    with pytest.raises(ConfigError, match="of another profile"):
        Partial.load(tmp_path / "p.json", {"seed": 2})


def test_numbers_need_only_be_close(tmp_path):
    partial(1.5, 2.5).save(tmp_path / "p.json", {"first_loss": 2.0})
    Partial.load(tmp_path / "p.json", {"first_loss": 2.0 + 1e-5})
    for other in ({"first_loss": 2.01}, {"first_loss": "nan"}, {}):
        with pytest.raises(ConfigError, match="of another profile"):
            Partial.load(tmp_path / "p.json", other)


@pytest.mark.parametrize("text", ["", "x", "[]", "{}"])
def test_what_is_no_measurement_is_refused(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match="which holds no measurements of a profile"):
        Partial.load(tmp_path / "p.json", {})
