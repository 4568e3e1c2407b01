"""Bad input ends in one line and status 2; a failed run in one line and status 1; a defect in a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepseek_mp.cli import doctor as doctor_command
from deepseek_mp.cli.app import main
from deepseek_mp.errors import ConfigError, MixedPrecisionError, NonFiniteError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["doctor", "--nonsense"], "No such option: --nonsense"),
        (["demo", "--seed", "many"], "Invalid value for '--seed'"),
        (["train", "net.py:job", "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["profile", "net.py:job", "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["bench", "inference", "net.py:job", "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["demo", "--task", "digit"], "task 'digit'. Allowed: digits, text. Use one of these. Did you mean 'digits'?"),
        (["doctor", "--device", "bogus"], "device 'bogus' is not known to this PyTorch"),
        (["demo", "--device", "bogus"], "device 'bogus' is not known to this PyTorch"),
        ([], "Missing command. (see deepseek-mp --help)"),
        (["bench"], "Missing command. (see deepseek-mp bench --help)"),
        (["profile"], "Missing argument 'TARGET'. (see deepseek-mp profile --help)"),
        (["bench", "inference"], "Missing argument 'TARGET'. (see deepseek-mp bench inference --help)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("deepseek-mp: ")
    assert expected in err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("wrong\nvalue"), 2),
        (NonFiniteError("25 steps were skipped", first_bad_module=None, skipped=25), 1),
        (MixedPrecisionError("something"), 1),
    ],
)
def test_errors_of_the_package_are_one_line(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(doctor_command, "examine", fail)
    assert main(["doctor"]) == status
    assert capsys.readouterr().err == f"deepseek-mp: {' '.join(str(error).split())}\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not expected by anyone")

    monkeypatch.setattr(doctor_command, "examine", fail)
    with pytest.raises(RuntimeError, match="not expected by anyone"):
        main(["doctor"])


def test_an_interruption_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_command, "examine", interrupt)
    assert main(["doctor"]) == 130


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "doctor" in out


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_mp", "doctor", "--device", "bogus"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("deepseek-mp: device 'bogus'")
    assert done.stderr.count("\n") == 1


def test_the_version_and_a_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("deepseek-mp 0.")
    for arguments in (["-h"], ["--help"]):
        main(arguments)
        assert "doctor" in capsys.readouterr().out
