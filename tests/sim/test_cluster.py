"""Episodes on a local Ray cluster of two processes: the same rows as in one."""

import importlib.util
import os
from functools import partial

import pytest

from headrace.sim.cluster import Cluster, ClusterRollout
from headrace.sim.rollout import RolloutSettings, roll_out
from headrace.sim.run_folder import read_episodes
from headrace.sim.tasks import Task

HERE = os.path.dirname(__file__)
COUNTING = '''
import numpy as np
from headrace.contracts import ActionChunk
from toy_simulator import SPEC

class Noisy:
    """Acts by the noise of its episode's seed, as a flow policy does; dies in the middle of seed 36."""
    spec = SPEC
    def __init__(self): self.noise, self.seeds = {}, {}
    def reset(self, slot, *, seed):
        self.noise[slot], self.seeds[slot] = np.random.default_rng(seed), seed
    def act(self, observations, slots):
        import os
        if any(self.seeds[slot] == 36 for slot in slots): os._exit(3)
        chunks = [self.noise[slot].uniform(0.1, 0.6, (3, 1)) for slot in slots]
        return ActionChunk(np.asarray(chunks, np.float32), 1.0)
'''


@pytest.fixture
def task(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("rollout_test", os.path.join(HERE, "test_rollout.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "toy_simulator.py").write_text(module.TOY)
    (tmp_path / "counting_policy.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Task(name="Toy", instruction="reach one", max_steps=8, environment="toy_simulator:Toy")


def importable_maker():
    """The maker by a name that a worker can import: this file is no module there."""
    import counting_policy

    return counting_policy.Noisy


def test_a_cluster_needs_workers():
    with pytest.raises(ValueError, match="workers"):
        Cluster(workers=0)


def test_rows_are_those_of_one_process_and_a_dead_worker_costs_its_episode(task, tmp_path):
    ray = pytest.importorskip("ray")
    maker = importable_maker()
    settings = RolloutSettings(episodes=5, seed=33, videos=0, timeout=60.0)
    spread = partial(ClusterRollout, cluster=Cluster(workers=2), make_policy=maker)
    try:
        results = roll_out([task], None, settings, tmp_path / "many", policy_name="p", make_rollout=spread)
    finally:
        ray.shutdown()
    alone = RolloutSettings(episodes=3, seed=33, videos=0, timeout=60.0)
    roll_out([task], maker(), alone, tmp_path / "one", policy_name="p")
    one = {row["seed"]: row for row in read_episodes(tmp_path / "one" / "episodes.jsonl")}
    many = {row["seed"]: row for row in read_episodes(tmp_path / "many" / "episodes.jsonl")}
    assert sorted(many) == [33, 34, 35, 36, 37] and results["errors"] == 1
    assert "Ray worker died" in many[36]["error"] and many[37]["error"] is None
    for seed, row in one.items():
        same = ("success", "steps", "actions", "states", "episode", "first_success_step", "readings")
        assert {key: row[key] for key in same} == {key: many[seed][key] for key in same}


def test_a_node_that_is_slow_to_start_is_tried_again():
    from headrace.sim.cluster import start_node

    class Slow:
        tries, stopped = 0, 0

        def init(self, **options):
            self.tries += 1
            if self.tries < 3:
                raise Exception("The current node timed out during startup.")

        def shutdown(self):
            self.stopped += 1

    ray = Slow()
    start_node(ray, num_cpus=1)
    assert (ray.tries, ray.stopped) == (3, 2)
    with pytest.raises(Exception, match="timed out"):
        start_node(Slow(), attempts=2)
