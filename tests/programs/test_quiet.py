"""Inside, other packages are silent but for errors; afterwards all is as before."""

from __future__ import annotations

import logging
import warnings

import pytest

from deepseek_mp.programs.quiet import quiet


def test_only_errors_of_the_named_loggers_are_heard(caplog, recwarn):
    with quiet("some.package", "another"):
        logging.getLogger("some.package").warning("about itself")
        logging.getLogger("another").error("an error")
        logging.getLogger("a third").warning("not named")
        warnings.warn("about itself", stacklevel=1)
    assert [record.message for record in caplog.records] == ["an error", "not named"]
    assert not recwarn.list


def test_levels_come_back():
    logger = logging.getLogger("some.package")
    logger.setLevel(logging.INFO)
    with pytest.raises(KeyError, match="of its own"), quiet("some.package"):
        raise KeyError("of its own")
    assert logger.level == logging.INFO
    logger.setLevel(logging.NOTSET)
