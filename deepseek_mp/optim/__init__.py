"""Optimizers whose weights may be stored in BF16 without losing small updates, and the change of a weight's storage."""

from deepseek_mp.optim.adamw import AdamW
from deepseek_mp.optim.conversion import set_storage
from deepseek_mp.optim.footprint import Footprint, footprint
from deepseek_mp.optim.sgd import SGD
from deepseek_mp.optim.stored import StoredOptimizer

__all__ = ["SGD", "AdamW", "Footprint", "StoredOptimizer", "footprint", "set_storage"]
