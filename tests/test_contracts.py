from dataclasses import replace

import pytest

from headrace.contracts import ActionSpec, SpecMismatch, require_same_spec

SPEC = ActionSpec(names=("x", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=5.0)


def test_json_round_trip():
    import json

    assert ActionSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="unknown ActionSpec fields: speed"):
        ActionSpec.from_dict({**SPEC.to_dict(), "speed": 1})


def test_every_differing_field_is_named():
    other = replace(SPEC, gripper="close_is_1", rate=20.0)
    with pytest.raises(SpecMismatch, match=r"gripper: policy 'open_is_1', environment 'close_is_1'; rate: policy 5.0"):
        require_same_spec(SPEC, other)


def test_a_policy_may_leave_bounds_and_controller_open():
    require_same_spec(SPEC, replace(SPEC, controller="pd_ee_delta_pose", low=(-1, -1), high=(1, 1)))


def test_bounds_need_one_number_per_action():
    with pytest.raises(ValueError, match="bounds need 2 numbers"):
        replace(SPEC, low=(-1,))
