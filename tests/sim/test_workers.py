"""Workers around ManiSkill without pictures: one process serves several tasks, and the next one looks the same."""

import os
from dataclasses import replace

import numpy as np
import pytest

from headrace.sim.tasks import Task, find_task
from headrace.sim.workers import Simulators, Worker, WorkerFailed

pytestmark = pytest.mark.sim
ACTIONS = np.linspace(-0.5, 0.5, 70, dtype=np.float32).reshape(10, 7)


def blind(name: str) -> Task:
    task = find_task(name)
    return replace(task, settings=(*task.settings, ("render", False)))


def played(worker: Worker, seed: int) -> list[np.ndarray]:
    worker.call("start", seed, timeout=300)
    worker.call("run", ACTIONS, timeout=300)
    return worker.call("finish", timeout=300).states


def test_a_process_that_simulated_another_task_gives_the_same_episodes():
    with Simulators() as kept, Simulators() as fresh:
        (worker,) = kept.assign(blind("PushCube-v1"), None, 1)
        first = played(worker, 3)
        process = worker.process.pid
        (worker,) = kept.assign(blind("PickCube-v1"), None, 1)
        second = played(worker, 3)
        assert worker.process.pid == process
        np.testing.assert_array_equal(second, played(fresh.assign(blind("PickCube-v1"), None, 1)[0], 3))
        (worker,) = kept.assign(blind("PushCube-v1"), None, 1)
        np.testing.assert_array_equal(first, played(worker, 3))
        assert not np.array_equal(first, second)


def test_a_task_of_another_simulator_gets_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "broken_simulator.py").write_text("class Broken:\n    def __init__(self, task): raise OSError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Simulators() as kept:
        (worker,) = kept.assign(blind("PushCube-v1"), None, 1)
        process = worker.process
        other = Task(name="Broken", instruction="x", environment="broken_simulator:Broken")
        (worker,) = kept.assign(other, None, 1)
        with pytest.raises(WorkerFailed, match="OSError: no"):
            worker.call("describe", timeout=300)
        assert not process.is_alive() and worker.process.is_alive()


def test_a_worker_has_the_environment_variables_of_now(tmp_path, monkeypatch):
    told = "import os\nclass Telling:\n    def __init__(self, task): raise OSError(os.environ.get('TOLD', 'nothing'))\n"
    (tmp_path / "telling_simulator.py").write_text(told)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = Task(name="Telling", instruction="x", environment="telling_simulator:Telling")
    assert "TOLD" not in os.environ
    for value in ("one", "two"):
        monkeypatch.setenv("TOLD", value)
        with Simulators() as kept, pytest.raises(WorkerFailed, match=f"OSError: {value}"):
            kept.assign(task, None, 1)[0].call("describe", timeout=300)
    monkeypatch.delenv("TOLD")
    with Simulators() as kept, pytest.raises(WorkerFailed, match="OSError: nothing"):
        kept.assign(task, None, 1)[0].call("describe", timeout=300)
