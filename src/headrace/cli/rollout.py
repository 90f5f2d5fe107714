"""`headrace rollout`: run a policy in a simulator and write results, videos and a report."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def rollout(
    policy: Annotated[str, tyro.conf.Positional],
    /,
    *,
    task: str,
    episodes: int = 24,
    seed: int = 0,
    policy_seed: int | None = None,
    num_envs: int = 1,
    out: Path | None = None,
    solver: Literal["euler", "midpoint", "heun", "dopri5"] = "euler",
    tolerance: float | None = None,
    steps: int | None = None,
    grid: Path | None = None,
    execute: int | None = None,
    ensemble: bool = False,
    success_rule: Literal["once", "at_end"] | None = None,
    videos: int = 10,
    timeout: float = 300.0,
    precision: Literal["fp32", "bf16"] = "fp32",
    report: bool = True,
    ray: int = 0,
    ray_address: str = "",
) -> int:
    """Run a policy in one or several tasks; writes results.json, episodes.jsonl, videos and report.html.

    A run that was cut off goes on where it stopped when the same command is given again; a checkpoint that has changed
    since is refused.

    Args:
        policy: Checkpoint folder, Hub id, ws://host:port of a policy server, `random`, or `oracle` where a task has a
            scripted expert.
        task: Task or group name, or several with commas; `headrace tasks` lists them.
        episodes: Episodes per task; episode i starts from seed SEED + i.
        seed: First seed.
        policy_seed: Seed of the policy's own randomness in the first episode, so that it can be varied on the same
            layouts; the episode's seed by default. Not for `oracle`, which draws nothing.
        num_envs: Simulator processes.
        out: Results folder; runs/POLICY-DATE by default.
        solver: How the flow is followed; `dopri5` chooses its own steps and needs TOLERANCE and `headrace[ode]`.
        tolerance: Error per step of `dopri5`.
        steps: Equal solver steps; without this and GRID, as saved with the checkpoint, else 10.
        grid: Step grid: a JSON list of times, or the file or model folder that BOSS wrote.
        execute: Actions of a chunk that are carried out before the policy is asked again; half of them by default.
        ensemble: Ask at every step and average overlapping chunks.
        success_rule: Overrides the task's own rule.
        videos: Videos per task.
        timeout: Seconds after which a silent simulator counts as hung.
        precision: `bf16` runs the network in bfloat16.
        report: Write report.html.
        ray: Spread the episodes over so many Ray workers, each with NUM_ENVS simulators; 0 runs them here.
        ray_address: Of a running Ray cluster; by default one is started on this machine.
    """
    from headrace.sim.rollout import RolloutSettings, roll_out
    from headrace.sim.tasks import find_tasks
    from headrace.sim.workers import Simulators, import_ahead

    if policy == "oracle" and policy_seed is not None:
        raise ValueError("'oracle' is the task's scripted expert and draws nothing: leave out --policy-seed")
    tasks, simulators = find_tasks(task), Simulators()
    if not ray:
        import_ahead(tasks[0])  # while the policy is loaded here
    name = Path(policy).name or policy
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    sampling: dict[str, Any] = {"solver": solver, "steps": steps, "grid": grid, "tolerance": tolerance}
    chosen = settings_of(**sampling, execute=execute, ensemble=ensemble, precision=precision)
    made = None if ray else make_policy(policy, tasks, chosen, simulators)
    checkpoint, sampled = identity_of(policy, chosen, made)
    results = roll_out(
        tasks,
        made,
        RolloutSettings(
            episodes=episodes,
            seed=seed,
            policy_seed=policy_seed,
            num_envs=num_envs,
            success_rule=success_rule,
            videos=videos,
            timeout=timeout,
        ),
        folder,
        policy_name=policy,
        command=shlex.join(["headrace", *sys.argv[1:]]),
        policy_settings=sampled,
        checkpoint=checkpoint,
        simulators=simulators,
        **on_ray(policy, tasks, chosen, workers=ray, address=ray_address),
    )
    for row in results["tasks"]:
        low, high = row["ci95"]
        print(
            f"{row['task']}: {row['successes']}/{row['episodes']} succeeded "
            f"({100 * row['success_rate']:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f})"
            + (f", {row['errors']} errored" if row["errors"] else "")
        )
    if all(task.name.startswith("simpler/") for task in tasks):
        from headrace.sim.simpler_table import table

        (folder / "simpler.md").write_text(table(folder, {row["task"]: row["seeds"] for row in results["tasks"]}))
        print(f"table:   {folder / 'simpler.md'}")
    print(f"results: {folder / 'results.json'}")
    if report:
        from headrace.sim.report import write_report

        print(f"report:  {write_report(folder)}")
    return int(results["errors"] > 0)


def on_ray(policy: str, tasks: list[Any], chosen: dict[str, Any], *, workers: int, address: str) -> dict[str, Any]:
    """Arguments of `roll_out` that spread episodes over Ray workers; none for 0 workers."""
    if not workers:
        return {}
    from functools import partial

    from headrace.sim.cluster import Cluster, ClusterRollout

    cluster = Cluster(workers=workers, address=address)
    return {
        "make_rollout": partial(
            ClusterRollout, cluster=cluster, make_policy=partial(make_policy, policy, tasks, chosen)
        )
    }


def is_served(policy: str) -> bool:
    """Whether the name is the address of a policy server."""
    return policy.startswith(("ws://", "wss://"))


def identity_of(policy: str, chosen: dict[str, Any], made: Any = None) -> tuple[str, dict[str, Any]]:
    """Fingerprint of the files that a policy's name stands for, and the settings that it is sampled with.

    A server tells both of what it serves. The fingerprint is empty where there are no files or the server does not
    tell; `random` and `oracle` have no settings.

    Args:
        policy: As the user named it.
        chosen: Settings of this command, see `settings_of`.
        made: The policy, where it is there already; else a server is asked.

    Raises:
        FileNotFoundError: No such folder or hub id.
        ConnectionError: No such server.
    """
    if policy in ("random", "oracle"):
        return "", {}
    if is_served(policy):
        remote = made or make_policy(policy, [], {"solver": "euler", "precision": "fp32"})
        told = remote.metadata
        if made is None:
            remote.close()
        settings = told.get("settings")
        plain = settings if isinstance(settings, dict) else {}
        kept = {str(k): v for k, v in plain.items() if isinstance(v, str | int | float | bool)}
        return str(told.get("checkpoint", "")), kept
    from headrace.nn.fingerprint import folder_fingerprint
    from headrace.nn.pretrained import resolve_folder

    return folder_fingerprint(resolve_folder(policy)), chosen


def settings_of(**chosen: Any) -> dict[str, Any]:
    """The policy's settings, JSON-ready, with a grid file read in.

    Raises:
        ValueError: Options that exclude each other, or a grid file that is none.
    """
    from headrace.flow.step_grid import read_grid

    if chosen["steps"] is not None and chosen["grid"] is not None:
        raise ValueError("--steps and --grid exclude each other")
    if chosen["ensemble"] and chosen["execute"] is not None:
        raise ValueError("--ensemble asks at every step; leave out --execute")
    if chosen["grid"] is not None:
        chosen["grid"] = list(read_grid(chosen["grid"]).times)
    return {key: value for key, value in chosen.items() if value is not None and value is not False}


def make_policy(name: str, tasks: list[Any], chosen: dict[str, Any], simulators: Any = None) -> Any:
    """The policy that `name` stands for; None for the tasks' own experts. `random` asks a simulator for its actions.

    Raises:
        ValueError: A task without an expert, solver options for a policy that is not sampled here, settings that the
            policy refuses, or more actions to execute than it gives.
    """
    asked = any(key in chosen for key in ("grid", "steps", "tolerance")) or chosen["solver"] != "euler"
    if asked and is_served(name):
        raise ValueError("the server samples: give --steps to `headrace serve`, not to this command")
    if asked and name in ("random", "oracle"):
        raise ValueError(f"{name!r} follows no flow: leave out --solver, --steps, --grid and --tolerance")
    here = [key for key in ("execute", "ensemble") if key in chosen] + ["precision"] * (chosen["precision"] != "fp32")
    if here and (name in ("random", "oracle") or is_served(name)):
        flags = ", ".join(f"--{key}" for key in here)
        served = "; `headrace serve` takes --execute and --precision" if is_served(name) else ""
        raise ValueError(f"{flags} say how a checkpoint is run here, and {name!r} is none{served}")
    if name == "oracle":
        without = [task.name for task in tasks if not task.expert]
        if without:
            raise ValueError(f"no scripted expert for {', '.join(without)}")
        return None
    if name == "random":
        from headrace.contracts import ActionSpec
        from headrace.robot.policy import RandomPolicy
        from headrace.sim.rollout import describe
        from headrace.sim.workers import Simulators

        kept = simulators or Simulators()
        described = describe(kept.assign(tasks[0], None, 1)[0])
        if simulators is None:
            kept.close()
        return RandomPolicy(ActionSpec.from_dict(described["spec"]))
    if is_served(name):
        import os

        from headrace.robot.client import RemotePolicy

        return RemotePolicy(name, token=os.environ.get("HEADRACE_TOKEN", ""))
    from headrace.robot.chunking import RecedingHorizon, TemporalEnsemble
    from headrace.robot.policy import load_policy

    solver = solver_of(name, chosen) if asked else None
    policy = load_policy(name, solver=solver, precision=chosen["precision"])
    if "ensemble" in chosen:
        return TemporalEnsemble(policy)
    return RecedingHorizon(policy, chosen.get("execute", max(1, policy.horizon // 2)))


def solver_of(name: str, chosen: dict[str, Any]) -> Any:
    """The `SolverSettings` asked for; where they say nothing of the times, those saved with the checkpoint.

    Raises:
        ValueError: Options that do not fit together.
    """
    from dataclasses import replace

    from headrace.flow.solver import SolverSettings
    from headrace.flow.step_grid import settings_for
    from headrace.nn.pretrained import resolve_folder

    method, tolerance = chosen["solver"], chosen.get("tolerance")
    if "steps" in chosen or "grid" in chosen or method == "dopri5":
        grid = tuple(chosen["grid"]) if "grid" in chosen else None
        return SolverSettings(method=method, steps=chosen.get("steps"), grid=grid, tolerance=tolerance)
    return replace(settings_for(resolve_folder(name)), method=method, tolerance=tolerance)
