"""Optimizers that lose no small updates of BF16 weights and may keep moments in 8 bits; and the change of storages."""

from deepseek_mp.optim.adafactor import Adafactor
from deepseek_mp.optim.adamw import AdamW
from deepseek_mp.optim.conversion import set_storage
from deepseek_mp.optim.footprint import Footprint, footprint
from deepseek_mp.optim.groups import embeddings_apart
from deepseek_mp.optim.sgd import SGD
from deepseek_mp.optim.states import StateFormat
from deepseek_mp.optim.stored import StoredOptimizer

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Footprint",
    "StateFormat",
    "StoredOptimizer",
    "embeddings_apart",
    "footprint",
    "set_storage",
]
