"""What a forward keeps for the backward, in fewer bytes: FP8, single bits, or computed again."""

from deepseek_mp.activations.account import Account
from deepseek_mp.activations.choice import BlockChoice, ChosenBlock
from deepseek_mp.activations.context import compressed_activations
from deepseek_mp.activations.record import ActivationRecord, Pair, SavedActivations, SavedForm, SavedReason
from deepseek_mp.activations.settings import ActivationSettings

__all__ = [
    "Account",
    "ActivationRecord",
    "ActivationSettings",
    "BlockChoice",
    "ChosenBlock",
    "Pair",
    "SavedActivations",
    "SavedForm",
    "SavedReason",
    "compressed_activations",
]
