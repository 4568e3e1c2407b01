"""Run records: the directory a run leaves behind, written so that a kill loses nothing, and read back."""

from deepseek_mp.records.reader import Run, read_run
from deepseek_mp.records.runfile import RECORD_VERSION, Attempt
from deepseek_mp.records.writer import RunWriter

__all__ = ["RECORD_VERSION", "Attempt", "Run", "RunWriter", "read_run"]
