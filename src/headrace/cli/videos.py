"""`headrace videos`: render videos without actions, of several tasks and robots."""

from pathlib import Path
from typing import Literal


def videos(
    *,
    task: tuple[str, ...],
    out: Path,
    robot: tuple[str, ...] = (),
    episodes: int = 50,
    steps: int = 60,
    mover: Literal["expert", "random"] = "expert",
    image_size: int = 128,
    seed: int = 2_000_000,
) -> int:
    """Render MP4 files into OUT/TASK or OUT/TASK-ROBOT, with the instructions beside them; go on after a kill.

    Args:
        task: Task names; `headrace tasks` lists them.
        out: Folder; each task and robot gets its own inside, which `headrace label --data` takes.
        robot: ManiSkill's names of robots that the tasks support, such as panda, so100 or fetch; needs --mover random.
        episodes: Videos per task and robot.
        steps: Longest video, in frames.
        mover: The scripted expert, or a smooth random walk through the action space.
        image_size: Side of the frames, in pixels.
        seed: First seed.
    """
    from headrace.sim.actionless import VideoSettings, record_videos
    from headrace.sim.tasks import find_task

    for name in task:
        for body in robot or (None,):
            settings = VideoSettings(
                episodes=episodes, steps=steps, mover=mover, robot=body, image_size=image_size, seed=seed
            )
            folder = out / (name if body is None else f"{name}-{body}").replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            made = record_videos(find_task(name), settings, folder)
            print(f"{folder}: {made.written} videos written ({made.frames} frames), {made.kept} were there", flush=True)
    return 0
