"""The first interrupt asks to stop, the second stops."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from deepseek_mp.cli.interrupt import stopping


def test_one_interrupt_asks_and_two_stop(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    with stopping(lambda: asked.append(True), "wait"):
        signal.raise_signal(signal.SIGINT)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            signal.raise_signal(signal.SIGINT)
    assert asked == [True]
    assert capsys.readouterr().err == "wait\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_put_back_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="on purpose"), stopping(lambda: None, ""):
        raise ValueError("on purpose")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_forked_process_passes_interrupts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    with stopping(lambda: asked.append(True), ""):
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        signal.raise_signal(signal.SIGINT)
    assert asked == []


def test_elsewhere_than_in_the_main_thread_it_does_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def other() -> None:
        with stopping(lambda: None, ""):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]
