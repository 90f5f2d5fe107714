# mypy: disable-error-code="attr-defined,misc"
"""ManiSkill's port of the four Bridge tasks, and subclasses that restore what the port changed.

Restored, each as in simpler-env/ManiSkill2_real2sim @ef7a4d4: finger friction (agents/configs/widowx/defaults.py),
axis-angle turns about the gripper (agents/controllers/pd_ee_pose.py, frame `ee_align2`), dropping and settling of the
objects, their damping and the 5 mm contact offset (envs/custom_scenes/move_near_in_scene.py), the success rule with
its contact test and centres of mass (envs/custom_scenes/put_on_in_scene.py), the grasp test
(agents/robots/widowx.py). Not restored: inverse kinematics on a GPU, and collision groups of the gripper bar, for
which ManiSkill's SRDF stands.

Import this only after `MS_ASSET_DIR` is set: ManiSkill reads it once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController, PDEEPoseControllerConfig
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import base_env, put_on_in_scene
from mani_skill.utils import common
from mani_skill.utils.geometry.rotation_conversions import (
    axis_angle_to_quaternion,
    quaternion_apply,
    quaternion_multiply,
    quaternion_to_matrix,
)
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SceneConfig, SimConfig
from scipy.spatial.transform import Rotation

from headrace.sim.simpler import CONTROL_RATE, PHYSICS_RATE, Layout, Port, SimplerTask

GRASP_IMPULSE = 1e-6  # [N s]
GRASP_ANGLE = 60.0  # [deg]
TOUCH_IMPULSE = 1e-6  # [N s]
DROP_HEIGHT = 0.87 + 0.5  # world z from which the objects fall [m]
SINK_HEIGHTS = (0.933, 1.0)  # world z from which eggplant and target plane fall, as in the port [m]
FRICTION: dict[str, Any] = {
    "_materials": {"gripper": {"static_friction": 2.0, "dynamic_friction": 2.0, "restitution": 0.0}},
    "link": {
        link: {"material": "gripper", "patch_radius": 0.01, "min_patch_radius": 0.01}
        for link in ("left_finger_link", "right_finger_link")
    },
}


class AxisAngleController(PDEEPoseController):
    """Target-pose controller whose turn is an axis-angle vector about the gripper's present position.

    The commanded pose moves by the translation and turns about where the gripper is now, not about where it was
    commanded to be; the two differ while the arm lags behind.
    """

    def compute_target_pose(self, prev_ee_pose_at_base: Pose, action: torch.Tensor) -> Pose:
        """Commanded pose after `action`, shape (B, 6): metres and radians."""
        turn = axis_angle_to_quaternion(action[:, 3:6])
        here = self._hand()
        moved = here + action[:, :3] + quaternion_apply(turn, prev_ee_pose_at_base.p - here)
        return Pose.create_from_pq(moved, quaternion_multiply(turn, prev_ee_pose_at_base.q))

    def _hand(self) -> torch.Tensor:
        """Present gripper position in the base frame, shape (B, 3); on the CPU without a detour over batched poses."""
        if self.scene.gpu_sim_enabled:
            return self.ee_pose_at_base.p
        pose = self.articulation._objs[0].pose.inv() * self.ee_link._objs[0].entity.pose
        return torch.from_numpy(pose.p)[None]


@dataclass
class AxisAngleControllerConfig(PDEEPoseControllerConfig):
    """Settings of `AxisAngleController`; the same as those of ManiSkill's end-effector controller."""

    controller_cls = AxisAngleController


def _restored_controllers(configs: dict[str, Any]) -> dict[str, Any]:
    """The port's controllers with the arm's one read as axis-angle."""
    for parts in configs.values():
        parts["arm"] = AxisAngleControllerConfig(**vars(parts["arm"]))
    return configs


class RestoredFlatTableArm(base_env.WidowX250SBridgeDatasetFlatTable):
    """WidowX 250S before the table, with the rubber fingers of the original."""

    urdf_config = FRICTION

    @property
    def _controller_configs(self) -> dict[str, Any]:
        return _restored_controllers(super()._controller_configs)


class RestoredSinkArm(base_env.WidowX250SBridgeDatasetSink):
    """WidowX 250S before the sink, with the rubber fingers of the original."""

    urdf_config = FRICTION

    @property
    def _controller_configs(self) -> dict[str, Any]:
        return _restored_controllers(super()._controller_configs)


class UnsharedScene:
    """Gives each environment its own overlay pictures and green-screen list.

    The port keeps both in class attributes, so that a second environment of one process inherits the first one's
    objects, and two that live at once share the last background.
    """

    def __init__(self, **options: Any) -> None:
        self._objects_to_remove_from_greenscreen: list = []
        self._rgb_overlay_images: dict[str, torch.Tensor] = {}
        if options.get("obs_mode") == "none":
            self.rgb_overlay_mode = "none"  # without cameras there is nothing to lay pictures over
        super().__init__(**options)


class RestoredScene(UnsharedScene):
    """Physics, episode start and success rule of the original, over one of the port's four classes.

    Set `task` before use. `reset(options={"layouts": [...]})` takes one `Layout` per environment.
    """

    SUPPORTED_OBS_MODES = ("rgb+segmentation", "none")
    task: SimplerTask
    consecutive_grasp: torch.Tensor

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(
            sim_freq=PHYSICS_RATE,
            control_freq=int(CONTROL_RATE),
            spacing=20,
            scene_config=SceneConfig(contact_offset=0.005),
        )

    def _load_agent(self, options: dict) -> None:
        self.robot_uids = RestoredSinkArm if self.scene_setting == "sink" else RestoredFlatTableArm
        super()._load_agent(options)

    def _load_scene(self, options: dict) -> None:
        super()._load_scene(options)
        self._recorded_quats = self.quat_configs[:, 0].clone()  # of the port: -45, 0, 45, ... degrees of yaw
        for actor in self.objs.values():
            for body in actor._bodies:
                body.linear_damping = 0.1
                body.angular_damping = 0.1

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict) -> None:
        layouts: list[Layout] = options.get("layouts", [self.task.official_layout(0)] * len(env_idx))
        if len(layouts) != len(env_idx):
            raise ValueError(f"reset needs one layout per environment: {len(env_idx)} wanted, got {len(layouts)}")
        self._place(layouts)
        # The port's own code sets the robot and the statistics. It would also place the objects again: let it place
        # them where they now rest, and not settle a second time.
        resting = torch.stack([actor.pose.raw_pose for actor in self.objs.values()], dim=1)
        self.xyz_configs, self.quat_configs = resting[..., :3], resting[..., 3:]
        count = len(layouts)
        port_options = {"episode_id": torch.arange(count, device=self.device) * (count + 1)}
        super()._initialize_episode(env_idx, port_options)
        self._measure_boxes()

    def _settle(self, t: float = 0.5) -> None:
        """The port's settling, which divides by the control rate: replaced by `_place`."""

    def _place(self, layouts: list[Layout]) -> None:
        """Drop the objects as the original does and wait until they rest; the arm is out of the way meanwhile.

        The eggplant alone starts at the height and in the resting orientation that the port recorded: dropped from half
        a metre it rolls up to 7 cm here, away from where the original's picture shows it.
        """
        self.agent.robot.set_pose(sapien.Pose([-10.0, 0.0, 0.0]))
        for index, actor in enumerate(self.objs.values()):
            poses = [self._start_pose(layout, index) for layout in layouts]
            actor.set_pose(Pose.create(torch.tensor(np.stack(poses), dtype=torch.float32, device=self.device)))
        self._stop_objects()
        self._lock_tilt(not self.task.on_sink)
        self._run(0.5)
        self._lock_tilt(False)
        self._stop_objects()
        self._run(0.5)
        speed = sum(torch.linalg.norm(actor.linear_velocity, dim=-1) for actor in self.objs.values())
        spin = sum(torch.linalg.norm(actor.angular_velocity, dim=-1) for actor in self.objs.values())
        if bool((speed > 1e-3).any() or (spin > 1e-2).any()):
            self._run(1.5)

    def _start_pose(self, layout: Layout, index: int) -> np.ndarray:
        """World position and quaternion (w, x, y, z) from which object `index` falls, shape (7,)."""
        turn = Rotation.from_euler("z", layout.yaw if index == 0 else 0.0)
        height = SINK_HEIGHTS[index] if self.task.on_sink else DROP_HEIGHT
        if self.task.on_sink and index == 0:
            nearest = int(np.clip(np.round(layout.yaw / (np.pi / 4)), -1, 1))
            recorded = np.roll(self._recorded_quats[nearest + 1].cpu().numpy(), -1)
            turn = Rotation.from_euler("z", layout.yaw - nearest * np.pi / 4) * Rotation.from_quat(recorded)
        xy = layout.source if index == 0 else layout.target
        return np.concatenate([xy, [height], np.roll(turn.as_quat(), 1)])

    def _lock_tilt(self, locked: bool) -> None:
        for actor in self.objs.values():
            for body in actor._bodies:
                body.set_locked_motion_axes([False, False, False, locked, locked, False])

    def _stop_objects(self) -> None:
        """Zero velocities; setting the pose again keeps an object from falling asleep in the air."""
        for actor in self.objs.values():
            actor.set_pose(actor.pose)
            actor.set_linear_velocity(torch.zeros(3, device=self.device))
            actor.set_angular_velocity(torch.zeros(3, device=self.device))
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()

    def _run(self, seconds: float) -> None:
        for _ in range(int(PHYSICS_RATE * seconds)):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()

    def _measure_boxes(self) -> None:
        """Extents of the two objects turned by the pose they rest in, one row per environment (the port keeps one)."""
        for side, name in (("source", self.source_obj_name), ("target", self.target_obj_name)):
            extent = self.episode_model_bbox_sizes[name].float()
            box = (quaternion_to_matrix(self.objs[name].pose.q) @ extent[..., None])[..., 0]
            setattr(self, f"episode_{side}_obj_bbox_world", box)

    def _centre(self, name: str) -> torch.Tensor:
        """Centre of mass in the world, shape (B, 3) [m]."""
        actor = self.objs[name]
        local = torch.as_tensor(np.asarray(actor._bodies[0].cmass_local_pose.p), device=self.device)
        return actor.pose.p + quaternion_apply(actor.pose.q, local.expand_as(actor.pose.p))

    def grasped(self) -> torch.Tensor:
        """Whether both fingers press on the source object within 60 degrees of their closing direction, shape (B,)."""
        pressed = []
        for finger, sign in ((self.agent.finger1_link, 1.0), (self.agent.finger2_link, -1.0)):
            impulse = self.scene.get_pairwise_contact_impulses(finger, self.objs[self.source_obj_name])
            if not (torch.linalg.norm(impulse, dim=-1) >= GRASP_IMPULSE).any():
                return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
            opening = sign * finger.pose.to_transformation_matrix()[..., :3, 1]
            angle = torch.rad2deg(common.compute_angle_between(opening, impulse))
            pressed.append((torch.linalg.norm(impulse, dim=-1) >= GRASP_IMPULSE) & (angle <= GRASP_ANGLE))
        return pressed[0] & pressed[1]

    def touches_others(self) -> torch.Tensor:
        """Whether the source object is in contact with anything but the target and the robot, shape (B,)."""
        if self.gpu_sim_enabled:
            return self._residual_impulse() > 1e-4
        source = self.objs[self.source_obj_name]._bodies[0].entity
        allowed = {self.objs[self.target_obj_name]._bodies[0].entity}
        allowed |= {link._bodies[0].entity for link in self.agent.robot.links}
        for contact in self.scene.get_contacts():
            pair = [body.entity for body in contact.bodies]
            if source not in pair:
                continue
            other = pair[1] if pair[0] == source else pair[0]
            impulse = np.sum([point.impulse for point in contact.points], axis=0)
            if other not in allowed and np.linalg.norm(impulse) > TOUCH_IMPULSE:
                return torch.ones(1, dtype=torch.bool)
        return torch.zeros(1, dtype=torch.bool)

    def _residual_impulse(self) -> torch.Tensor:
        """Size of the impulse on the source object that neither target nor fingers explain, shape (B,) [N s].

        What a GPU can be asked; equal to the exact test but for rounding and for links other than the fingers.
        """
        source = self.objs[self.source_obj_name]
        rest = source.get_net_contact_impulses()
        for other in (self.objs[self.target_obj_name], self.agent.finger1_link, self.agent.finger2_link):
            rest = rest - self.scene.get_pairwise_contact_impulses(source, other)
        return torch.linalg.norm(rest, dim=-1)

    def evaluate(self) -> dict[str, torch.Tensor]:
        """Each rule of the original by name, shape (B,) bool; `success` is the rule at this moment."""
        grasped = self.grasped()
        self.consecutive_grasp = (self.consecutive_grasp + 1) * grasped
        offset = self._centre(self.source_obj_name) - self._centre(self.target_obj_name)
        half_target, half_source = self.episode_target_obj_bbox_world / 2, self.episode_source_obj_bbox_world / 2
        near = torch.linalg.norm(offset[:, :2], dim=1) <= torch.linalg.norm(half_target[:, :2], dim=1) + 0.003
        gap = offset[:, 2] - half_target[:, 2] - half_source[:, 2]
        above = (offset[:, 2] > 0) & (gap <= self.task.z_slack)
        success = near & above
        if self.task.needs_contact:
            success = success & ~self.touches_others()
        moved = self._moved(self.source_obj_name, self.episode_source_obj_xyz_after_settle)
        other = self._moved(self.target_obj_name, self.episode_target_obj_xyz_after_settle)
        return {
            "success": success,
            "src_on_target": success,
            "is_src_obj_grasped": grasped,
            "consecutive_grasp": self.consecutive_grasp >= 5,
            "moved_correct_obj": (moved > 0.03) & (other < moved),
            "moved_wrong_obj": (other > 0.03) & (other > moved),
        }

    def _moved(self, name: str, start: torch.Tensor) -> torch.Tensor:
        return torch.linalg.norm(self.objs[name].pose.p[:, :2] - start[:, :2], dim=1)


class StockScene(UnsharedScene):
    """The port as it is, but for the leak between environments; `reset(options={"episode_id": tensor})`."""

    SUPPORTED_OBS_MODES = ("rgb+segmentation", "none")


def build(task: SimplerTask, port: Port, **options: Any) -> base_env.BaseBridgeEnv:
    """Make the simulation of `task`; `options` go to ManiSkill's environment class.

    The class is made here and not by `gym.make`, which would ask about assets and end episodes on success.
    """
    mixin = RestoredScene if port == "restored" else StockScene
    parent = getattr(put_on_in_scene, task.upstream)
    made = type(f"{port.capitalize()}{task.upstream}", (mixin, parent), {"task": task})
    return made(**options)
