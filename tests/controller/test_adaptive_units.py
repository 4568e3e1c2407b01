"""What live precision knows of a layer, and that a state is what its record says."""

import json

from deepseek_mp.controller.adaptive_units import UnitState


def test_a_state_is_rebuilt_from_its_values_as_json():
    state = UnitState(recipe="row", votes=2, locked_until=30, patience=64, kurtosis=3.5, alarmed=True, suspected=True)
    assert UnitState(**json.loads(json.dumps(vars(state)))) == state
