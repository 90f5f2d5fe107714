"""The claim, cell by cell: demonstrations x pretraining x seed, success on every task with Wilson intervals.

    python recipes/vipra_maniskill/table.py --story runs/vipra --out runs/vipra_table --budgets 25 50 100

The story's folder must hold `pretrain_ls_la` and, for the other columns, `pretrain_la`, `pretrain_ls`,
`pretrain_ls_la1` (`story.py --only pretrain --fields la`). One policy learns all tasks from the budget's demonstrations
of each; `scratch` is the same network with freshly drawn weights. `sp3` is `la` that predicts the future frame while
fine-tuning, with a new head; `ls_la_frame`, only if named in `--arms`, is `ls_la` that goes on predicting it. All
columns get the same fine-tuning updates.

A cell that is done is not run again, so the command may be given again after a kill, or with more seeds; one that was
done, or begun, with other settings is refused. `table.md` is written after every cell; `cells.jsonl` beside it has one
line per cell and task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from headrace.nn.fingerprint import folder_fingerprint
from headrace.robot.chunking import RecedingHorizon
from headrace.robot.finetune import FinetuneSettings, train_policy
from headrace.robot.frame_beside import PolicyWithFrame, open_frames, predict_frame
from headrace.robot.policy import load_policy
from headrace.robot.policy_start import Start, prepare
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_bins import VipraBins
from headrace.sim.rollout import RolloutSettings, roll_out
from headrace.sim.run_folder import write_json
from headrace.sim.statistics import wilson_interval
from headrace.sim.tasks import find_task
from headrace.training.same_settings import require_same_settings


class Arm(NamedTuple):
    """A column: which pretraining, whether its weights are taken over, the future frame's weight in fine-tuning."""

    fields: str
    carry: bool = True
    frame: float = 0.0
    new_head: bool = False


ARMS = {
    "scratch": Arm("ls_la", carry=False),
    "ls_la": Arm("ls_la"),
    "la": Arm("la"),
    "ls": Arm("ls"),
    "ls_la1": Arm("ls_la1"),
    "sp3": Arm("la", frame=1.0, new_head=True),
    "ls_la_frame": Arm("ls_la", frame=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is run.

    Attributes:
        story: Folder of `story.py`.
        out: Cells and the table.
        tasks: With demonstrations under STORY/demonstrations, or in `demonstrations`.
        demonstrations: Datasets, one per task, in place of the story's.
        budgets: Demonstrations per task.
        arms: Columns, names of `ARMS`.
        tokenizer: Frame tokenizer for the columns that predict the future frame in fine-tuning; the story's if not
            given. Another one than pretraining's is refused.
        seeds: Of fine-tuning.
        steps, batch_size, lr: Of fine-tuning, the same for all.
        horizon: Actions of a chunk, at the control rate.
        episodes: Per cell and task, from seed 0 on.
        execute: Actions of a chunk that are carried out.
    """

    story: Path
    out: Path
    tasks: tuple[str, ...] = ("PushCube-v1", "PickCube-v1", "StackCube-v1")
    demonstrations: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (25, 50, 100)
    arms: tuple[str, ...] = ("scratch", "ls_la", "la", "ls", "ls_la1", "sp3")
    tokenizer: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 2000
    batch_size: int = 64
    lr: float = 5e-4
    horizon: int = 14
    episodes: int = 100
    execute: int = 7
    processes: int = 1

    def __post_init__(self) -> None:
        unknown = set(self.arms) - set(ARMS)
        if unknown:
            raise ValueError(f"no columns {sorted(unknown)} (there are: {', '.join(ARMS)})")


def settings_of(table: Table) -> dict[str, Any]:
    """What the figures of a cell depend on beside its budget, arm and seed, as JSON gives it back."""
    names = ("story", "tasks", "demonstrations", "steps", "batch_size", "lr", "horizon", "episodes", "execute")
    return json.loads(json.dumps({name: getattr(table, name) for name in names}, default=str))


def run_cell(table: Table, budget: int, arm: str, seed: int) -> list[dict[str, Any]]:
    """Train and roll out one policy; returns a row per task."""
    folder = table.out / f"{arm}_{budget}_{seed}"
    done, own = folder / "cell.json", settings_of(table)
    if done.is_file():
        found = json.loads(done.read_text())
        require_same_settings(done, found.get("settings", {}), own)
        return found["rows"]
    kind = ARMS[arm]
    start = Start(
        init=str(table.story / f"pretrain_{kind.fields}" / "model"),
        carry=kind.carry,
        demonstrations=budget,
        horizon=table.horizon,
        seed=seed,
    )
    sources = table.demonstrations or tuple(str(table.story / "demonstrations" / task) for task in table.tasks)
    policy, data, _ = prepare(sources, start)
    model: VipraPolicy | VipraBins | PolicyWithFrame = policy
    if kind.frame:
        tokenizer = table.tokenizer or table.story / "tokenizer" / "model"
        frames = open_frames(start.init, tokenizer, new_head=kind.new_head)
        model, data = predict_frame(policy, data, frames, kind.frame)
    settings = FinetuneSettings(
        steps=table.steps, batch_size=table.batch_size, lr=table.lr, seed=seed, ema=0.998, checkpoint_every=200
    )
    resume = (folder / "training" / "run.json").is_file()
    trained_by = {"arm": arm, "budget": budget, "init": folder_fingerprint(Path(start.init))}
    trained_by |= {name: own[name] for name in ("story", "tasks", "demonstrations", "horizon")}
    fitted = train_policy(model, data, settings, folder / "training", resume=resume, facts=trained_by)
    actor = RecedingHorizon(load_policy(str(folder / "training" / "model")), table.execute)
    results = roll_out(
        [find_task(task) for task in table.tasks],
        actor,
        RolloutSettings(episodes=table.episodes, seed=0, num_envs=table.processes, videos=0),
        folder / "rollout",
        policy_name=f"{arm}_{budget}_{seed}",
        policy_settings={"execute": table.execute},
        checkpoint=folder_fingerprint(folder / "training" / "model"),
    )
    last = fitted.losses[-50:]
    facts = {"budget": budget, "arm": arm, "seed": seed, "steps": table.steps}
    facts["loss"] = sum(last) / len(last) if last else None  # None where training had ended in an earlier run
    rows = [facts | {k: row[k] for k in ("task", "successes", "episodes", "errors")} for row in results["tasks"]]
    write_json(done, {"settings": own, "rows": rows})
    return rows


def cell_text(rows: list[dict[str, Any]]) -> str:
    """Successes of trials over seeds, rate and 95 % Wilson interval."""
    won, tried = sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows)
    interval = wilson_interval(won, tried)
    return f"{won}/{tried}: {100 * won / tried:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def table_text(table: Table, rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per budget and task and one for all tasks, a column per arm."""
    lines = [
        "| demonstrations | task | " + " | ".join(table.arms) + " |",
        "|---|---|" + "---|" * len(table.arms),
    ]
    for budget in table.budgets:
        for task in (*table.tasks, "all"):
            cells = []
            for arm in table.arms:
                found = [r for r in rows if r["budget"] == budget and r["arm"] == arm and (task in ("all", r["task"]))]
                cells.append(cell_text(found) if found else "not run")
            lines.append(f"| {budget} | {task} | " + " | ".join(cells) + " |")
    note = (
        f"Successes of episodes over seeds {list(table.seeds)}, per cent, 95 % Wilson interval (episodes counted as "
        f"independent). {table.steps} updates of {table.batch_size} for every cell."
    )
    return "\n".join([*lines, "", note, ""])


def main(table: Table) -> None:
    """Run the cells that are missing and write the table after each."""
    rows: list[dict[str, Any]] = []
    for seed in table.seeds:  # every column once before the second seed, so that a cut-off table can be read
        for budget in table.budgets:
            for arm in table.arms:
                rows += run_cell(table, budget, arm, seed)
                table.out.mkdir(parents=True, exist_ok=True)
                (table.out / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (table.out / "table.md").write_text(table_text(table, rows))
                print((table.out / "table.md").read_text(), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Table))
