"""Exported programs: graphs of a model's operations with their tensors, made, stored and read as data alone."""

from deepseek_mp.programs.archive import read, write
from deepseek_mp.programs.exporting import Exported, bits_equal, exported, signature_of
from deepseek_mp.programs.onnx_export import export_onnx, widened
from deepseek_mp.programs.signature import Signature

__all__ = ["Exported", "Signature", "bits_equal", "export_onnx", "exported", "read", "signature_of", "widened", "write"]
