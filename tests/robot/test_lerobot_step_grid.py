"""The LeRobot plugin beside a step grid that was saved with the network it starts from."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lerobot")
sys.path.insert(0, str(Path(__file__).parents[2] / "plugins" / "lerobot_policy_vipra" / "src"))

from lerobot.configs import FeatureType, PolicyFeature
from lerobot_policy_vipra import LeRobotVipraConfig
from lerobot_policy_vipra.modeling_vipra import LeRobotVipraPolicy

from headrace.contracts import ActionSpec
from headrace.flow.step_grid import GridMismatch, StepGrid
from headrace.robot.vipra import VipraConfig, VipraPolicy


def test_a_straightened_network_is_refused_on_another_grid(tmp_path):
    spec = ActionSpec(names=("x", "y"), frame="base_delta", rotation="none", gripper="none", rate=20.0)
    VipraPolicy(VipraConfig.tiny(spec, cameras=("image",))).save_pretrained(tmp_path)

    def started(steps: int) -> LeRobotVipraPolicy:
        config = LeRobotVipraConfig(
            init=str(tmp_path),
            device="cpu",
            fast_pictures=False,
            num_inference_steps=steps,
            input_features={
                "observation.images.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
                "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(15,)),
            },
            output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        )
        return LeRobotVipraPolicy(config)

    assert started(10).solver.steps == 10
    grid = StepGrid.uniform(4)
    grid.save(tmp_path)
    assert started(10).solver.steps == 10  # a grid alone binds nothing
    replace(grid, tuned=True).save(tmp_path)
    assert started(4).solver.steps == 4
    with pytest.raises(GridMismatch, match="straightened for 4 Euler steps"):
        started(10)
