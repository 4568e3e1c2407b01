"""The mark of a forward that is not the step's own: on its thread, nested, gone after an exception."""

from __future__ import annotations

import threading

import pytest

from deepseek_mp.nn.again import computed_again, is_computed_again


def test_it_holds_inside_and_nests():
    assert not is_computed_again()
    with computed_again():
        with computed_again():
            assert is_computed_again()
        assert is_computed_again()
    assert not is_computed_again()


def test_it_is_gone_after_an_exception():
    with pytest.raises(ValueError, match="inside"), computed_again():
        raise ValueError("inside")
    assert not is_computed_again()


def test_other_threads_are_not_marked():
    seen = []
    with computed_again():
        other = threading.Thread(target=lambda: seen.append(is_computed_again()))
        other.start()
        other.join()
    assert seen == [False]
