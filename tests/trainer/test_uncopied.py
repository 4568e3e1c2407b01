import copy
import pickle

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.trainer.uncopied import Uncopied


class Holder(Uncopied):
    pass


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_every_kind_of_copy_is_refused(copied):
    with pytest.raises(ConfigError, match=r"a copy of a trainer.*load it into another trainer"):
        copied(Holder())
