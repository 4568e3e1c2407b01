"""What the user's code raises becomes one error that names the place in their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_mp.cli.user_errors import explained
from deepseek_mp.errors import ConfigError


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [ValueError("wrong\nin two lines"), SystemExit("no licence"), RuntimeError()])
def test_the_last_line_of_the_error_and_its_place(error: BaseException) -> None:
    with (
        pytest.raises(ConfigError, match=r"^it raised (ValueError|SystemExit|RuntimeError)") as caught,
        explained("it raised", __file__),
    ):
        fail(error)
    assert f"({Path(__file__).name} line " in str(caught.value)
    assert "raise error" in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_place_is_in_the_users_file_though_a_library_raised_it() -> None:
    with (
        pytest.raises(ConfigError, match=r"test_user_errors\.py line \d+: Path\(1\)"),
        explained("it raised", __file__),
    ):
        Path(1)  # type: ignore[arg-type]


def test_without_a_file_of_the_user_the_last_place_counts() -> None:
    with pytest.raises(ConfigError, match=r"test_user_errors\.py line \d+: raise error"), explained("it raised", None):
        fail(ValueError("wrong"))


def test_a_syntax_error_is_placed_where_it_is() -> None:
    with pytest.raises(ConfigError, match=r"SyntaxError: .* \(net\.py line 2\)"), explained("it raised", None):
        compile("\ndef f(:", "/somewhere/net.py", "exec")


def test_our_own_errors_and_interrupts_pass() -> None:
    with pytest.raises(ConfigError, match=r"^as it was$"), explained("it raised", None):
        fail(ConfigError("as it was"))
    with pytest.raises(KeyboardInterrupt, match=r"^$"), explained("it raised", None):
        fail(KeyboardInterrupt())
