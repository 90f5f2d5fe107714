"""SIMPLER's four WidowX + Bridge tasks: what the protocol fixes, as constants, and the layouts of its episodes.

Nothing here needs ManiSkill, so `headrace tasks` and the tests of the protocol stay light. The simulation is in
`headrace.sim.simpler_scene`.

Source: simpler-env/SimplerEnv (evaluation scripts) and simpler-env/ManiSkill2_real2sim
(envs/custom_scenes/put_on_in_scene.py), the code behind arXiv 2405.05941; the port is mani-skill 3.0.1,
envs/tasks/digital_twins/bridge_dataset_eval.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headrace.contracts import ActionSpec

Port = Literal["restored", "stock"]
CAMERA = "3rd_view_camera"
CONTROL_RATE = 5.0  # [Hz]
PHYSICS_RATE = 500  # [Hz]
OFFICIAL_EPISODES = 24
CONTROLLER = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""End effector in the robot's base frame [m], its rotation relative to straight down as Bridge V2 records it
(fixed-axis x, y, z [rad]), and the opening of the gripper, 0 shut to 1 open."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where an episode's two objects are dropped.

    Attributes:
        source: x, y of the object to be moved, world frame [m].
        target: x, y of the object to put it on [m].
        yaw: Turn of the source object about the vertical axis [rad].
        episode: Official episode id in 0..23, or -1 for a layout that is not one of them.
    """

    source: tuple[float, float]
    target: tuple[float, float]
    yaw: float
    episode: int = -1


@dataclass(frozen=True, kw_only=True)
class SimplerTask:
    """One task of the benchmark.

    Attributes:
        name: Our name, `simpler/...`.
        official: SimplerEnv's name of the task.
        upstream: Class name in ManiSkill's port.
        instruction: The prompt, word for word.
        steps: Length of an episode in control steps; it does not end earlier on success.
        needs_contact: Success also asks that the source object touches nothing but the target and the robot.
        z_slack: Largest gap between the two boxes that still counts as "on" [m].
        source, target: Model ids of the two objects.
        positions: Source and target x, y of each official position, in official order.
        yaws: Turns of the source object that are tried at each position [rad].
    """

    name: str
    official: str
    upstream: str
    instruction: str
    steps: int
    needs_contact: bool
    z_slack: float
    source: str
    target: str
    positions: tuple[tuple[tuple[float, float], tuple[float, float]], ...]
    yaws: tuple[float, ...]

    @property
    def on_sink(self) -> bool:
        """Whether the scene is the sink (eggplant) and not the flat table."""
        return self.source == "eggplant"

    def official_layout(self, episode: int) -> Layout:
        """The layout of official episode `episode`; yaw runs fastest.

        Raises:
            ValueError: `episode` is not in 0..23.
        """
        if not 0 <= episode < OFFICIAL_EPISODES:
            raise ValueError(f"official episode ids are 0..{OFFICIAL_EPISODES - 1}, got {episode}")
        source, target = self.positions[episode // len(self.yaws)]
        return Layout(source=source, target=target, yaw=self.yaws[episode % len(self.yaws)], episode=episode)

    def random_layout(self, seed: int) -> Layout:
        """A layout drawn from the area that the official ones span, never near an official one; same seed, same layout.

        Positions and yaw are continuous. A draw is refused when it is within 1 cm (sink: 2 mm) and 10 degrees of an
        official layout, or when the two objects are nearer to each other than `least_distance`.
        """
        rng = np.random.default_rng([seed, 0x51A9])
        while True:
            layout = self._draw(rng)
            apart = float(np.hypot(*np.subtract(layout.source, layout.target)))
            if apart > self.least_distance and not self.near_official(layout):
                return layout

    @property
    def area(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the area that the official positions span: lowest and highest x, y, each (2, 2), source first."""
        positions = np.array(self.positions)
        return positions.min(axis=0), positions.max(axis=0)

    @property
    def least_distance(self) -> float:
        """How near the two objects of a random layout may be [m]: nine tenths of the nearest official pair."""
        return 0.9 * min(float(np.hypot(*np.subtract(source, target))) for source, target in self.positions)

    def _draw(self, rng: np.random.Generator) -> Layout:
        low, high = self.area
        movable = 1 if self.on_sink else 2  # the sink's basket stays where it is
        (a, b), (c, d) = [*rng.uniform(low[:movable], high[:movable]), *low[movable:]]
        # The sink's yaws are within an eighth turn; a cube looks the same every quarter turn.
        turn = np.pi / 4 if self.on_sink or len(self.yaws) == 1 else np.pi
        return Layout(source=(float(a), float(b)), target=(float(c), float(d)), yaw=float(rng.uniform(-turn, turn)))

    def near_official(self, layout: Layout) -> bool:
        """Whether `layout` is, to the eye, one of the official 24."""
        reach = 0.002 if self.on_sink else 0.01
        for episode in range(OFFICIAL_EPISODES):
            test = self.official_layout(episode)
            turned = abs((layout.yaw - test.yaw + np.pi) % (2 * np.pi) - np.pi)
            moved = max(
                np.hypot(*np.subtract(layout.source, test.source)), np.hypot(*np.subtract(layout.target, test.target))
            )
            if moved < reach and turned < np.radians(10):
                return True
        return False


def _corner_pairs(half_edge: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Ordered pairs of different corners of a square around (-0.16, 0), the first corner outermost."""
    corners = [(-0.16 + i * half_edge, j * half_edge) for i in (-1, 1) for j in (-1, 1)]
    return [(a, b) for a in corners for b in corners if a != b]


def _sink_positions() -> list[tuple[tuple[float, float], tuple[float, float]]]:
    offsets = [(x, y) for x in (-0.01, 0.01) for y in (-0.015, -0.005, 0.005, 0.015)]
    return [((-0.105 + x, 0.206 + y), (-0.125, 0.025)) for x, y in offsets]


TASKS: dict[str, SimplerTask] = {
    task.name: task
    for task in (
        SimplerTask(
            name="simpler/spoon-on-towel",
            official="widowx_spoon_on_towel",
            upstream="PutSpoonOnTableClothInScene",
            instruction="put the spoon on the towel",
            steps=60,
            needs_contact=False,
            z_slack=0.02,
            source="bridge_spoon_generated_modified",
            target="table_cloth_generated_shorter",
            positions=tuple(_corner_pairs(0.075)),
            yaws=(0.0, np.pi / 2),
        ),
        SimplerTask(
            name="simpler/carrot-on-plate",
            official="widowx_carrot_on_plate",
            upstream="PutCarrotOnPlateInScene",
            instruction="put carrot on plate",
            steps=60,
            needs_contact=True,
            z_slack=0.02,
            source="bridge_carrot_generated_modified",
            target="bridge_plate_objaverse_larger",
            positions=tuple(_corner_pairs(0.075)),
            yaws=(np.pi, -np.pi / 2),
        ),
        SimplerTask(
            name="simpler/stack-cube",
            official="widowx_stack_cube",
            upstream="StackGreenCubeOnYellowCubeBakedTexInScene",
            instruction="stack the green block on the yellow block",
            steps=60,
            needs_contact=True,
            z_slack=0.02,
            source="baked_green_cube_3cm",
            target="baked_yellow_cube_3cm",
            positions=tuple(_corner_pairs(0.05) + _corner_pairs(0.1)),
            yaws=(0.0,),
        ),
        SimplerTask(
            name="simpler/eggplant-in-basket",
            official="widowx_put_eggplant_in_basket",
            upstream="PutEggplantInBasketScene",
            instruction="put eggplant into yellow basket",
            steps=120,
            needs_contact=False,
            z_slack=0.06,
            source="eggplant",
            target="dummy_sink_target_plane",
            positions=tuple(_sink_positions()),
            yaws=(0.0, np.pi / 4, -np.pi / 4),
        ),
    )
}


# What stands between SIMPLER's other half and this simulator; `headrace tasks` prints it.
GOOGLE_ROBOT: dict[str, str] = {
    name: "not in ManiSkill 3: needs the robot's planner controller, its scenes ported, and " + lacks
    for name, lacks in {
        "simpler/pick-coke-can": "the table stage google_pick_coke_can_1_v4.glb",
        "simpler/move-near": "three object visuals (red bull, blue bottle, eggplant) and the same table stage",
        "simpler/open-drawer": "the cabinet articulation's ray-traced protocol",
        "simpler/close-drawer": "the cabinet articulation's ray-traced protocol",
        "simpler/place-apple-in-drawer": "the cabinet articulation's ray-traced protocol",
    }.items()
}


def simpler_task(name: str) -> SimplerTask:
    """The task of that name; `simpler/` may be left out, and SimplerEnv's own names are understood.

    A suffix after `@`, which names a variant of the environment, is the same task.

    Raises:
        ValueError: No such task; names a near match.
    """
    names = {alias: task for task in TASKS.values() for alias in (task.name, task.name.split("/")[1], task.official)}
    name = name.split("@")[0]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no SIMPLER task {name!r}{hint} (known: {', '.join(TASKS)})")
    return names[name]


def action_spec(port: Port) -> ActionSpec:
    """Action convention of the tasks; the stock port reads rotations as Euler angles, the restored one as axis-angle.

    Deltas are metres and radians, not normalised, added to the pose last commanded.
    """
    quarter = float(np.float32(np.pi / 2))
    return ActionSpec(
        names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
        frame="base_delta",
        rotation="axis_angle" if port == "restored" else "euler_xyz",
        gripper="open_is_1",
        rate=CONTROL_RATE,
        controller=CONTROLLER,
        low=(-1.0,) * 3 + (-quarter,) * 3 + (-1.0,),
        high=(1.0,) * 3 + (quarter,) * 3 + (1.0,),
    )


def stock_episode(task: SimplerTask, episode: int) -> int:
    """ManiSkill's id of the layout that is official episode `episode`.

    The port lists 8 recorded resting orientations of the eggplant where the protocol has 3 yaws, hence 64 ids, not 24.
    """
    return 8 * (episode // 3) + (1, 2, 0)[episode % 3] if task.on_sink else episode
