"""The runner against a small simulator of our own, so that hangs and crashes can be had on purpose."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from headrace.cli.rollout import identity_of
from headrace.contracts import ActionChunk, ActionSpec, EpisodesLost, Needs, SpecMismatch
from headrace.sim.results import summarise
from headrace.sim.rollout import RolloutSettings, roll_out
from headrace.sim.run_folder import claim, read_episodes
from headrace.sim.tasks import Task

TOY = '''
import os, time
import numpy as np
from headrace.contracts import ActionSpec, Observation
from headrace.sim.environment import Step, check_action

SPEC = ActionSpec(names=("x",), frame="joint", rotation="none", gripper="none", rate=10.0, low=(-1.0,), high=(1.0,))

class Toy:
    """Reach 1 by adding actions up. Some seeds misbehave."""
    def __init__(self, task, **settings):
        self.spec, self.cameras, self.state_names = SPEC, ("eye",), ("x",)
    def observe(self):
        picture = np.full((16, 16, 3), int(np.clip(self.x, 0, 1) * 255), np.uint8)
        return Observation(images={"eye": picture}, state=np.array([self.x], np.float32), instruction="reach one")
    def reset(self, seed):
        self.seed, self.x = seed, 0.0
        if seed % 100 == 96: os._exit(7)
        if seed % 100 == 76: time.sleep(100)
        if seed % 100 == 56: raise RuntimeError("the toy broke")
        return self.observe()
    def step(self, action):
        self.x += float(check_action(action, self.spec)[0]) * 0.5
        return Step(self.observe(), self.x >= 1, {"x": self.x})
    def close(self): pass

class Expert:
    def __init__(self, environment): pass
    def reset(self): pass
    def act(self): return np.array([0.6], np.float32)
'''
SPEC = ActionSpec(names=("x",), frame="joint", rotation="none", gripper="none", rate=10.0, low=(-1.0,), high=(1.0,))


class Pusher:
    """Always the same action, three at a time; counts how many observations came in one call."""

    def __init__(self, value: float = 0.4, spec: ActionSpec = SPEC) -> None:
        self.spec, self.value, self.batches = spec, value, []

    def reset(self, slot: int, *, seed: int) -> None:
        pass

    def act(self, observations, slots) -> ActionChunk:
        self.batches.append(len(observations))
        return ActionChunk(np.full((len(observations), 3, 1), self.value, np.float32), 2.0)


@pytest.fixture
def task(tmp_path, monkeypatch):
    (tmp_path / "toy_simulator.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Task(
        name="Toy",
        instruction="reach one",
        max_steps=8,
        environment="toy_simulator:Toy",
        expert="toy_simulator:Expert",
    )


class Looker(Pusher):
    """Notes what the present picture and those before it show, two steps back."""

    look_back = 2

    def act(self, observations, slots) -> ActionChunk:
        for seen in observations:
            self.batches.append([int(images["eye"][0, 0, 0]) for images in (seen.images, *seen.past)])
        return ActionChunk(np.full((len(observations), 4, 1), self.value, np.float32), 2.0)


def run(task, policy, folder, **settings):
    chosen = {"episodes": 3, "videos": 0, "timeout": 30.0, **settings}
    return roll_out([task], policy, RolloutSettings(**chosen), folder, policy_name="toy")


def test_results_hold_what_the_interface_promises(task, tmp_path):
    results = run(task, Pusher(), tmp_path / "out", videos=1)
    promised = (
        "task episodes successes success_rate ci95 seconds env_steps env_steps_per_second policy_ms_per_chunk seeds"
    )
    assert set(promised.split()) | {"versions"} <= set(results)
    assert (results["successes"], results["episodes"], results["seeds"]) == (3, 3, [0, 1, 2])
    assert results["policy_ms_per_chunk"] == 2.0 and results["env_steps"] == 15  # 0.2 a step, success at the fifth
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    rows = read_episodes(tmp_path / "out" / "episodes.jsonl")
    assert rows[0]["first_success_step"] == rows[0]["steps"] == 5 and len(rows[0]["states"]) == 6
    assert (tmp_path / "out" / rows[0]["video"]).stat().st_size > 0 and rows[1]["video"] is None


def test_rules_read_the_same_episode_differently(task, tmp_path):
    # 0.45 a step for three steps overshoots 1 and stays there; -1 afterwards would fall below.
    once = run(task, Pusher(0.9), tmp_path / "a", success_rule="once")
    end = run(task, Pusher(0.9), tmp_path / "b", success_rule="at_end")
    assert once["tasks"][0]["env_steps"] == 9 and end["tasks"][0]["env_steps"] == 24
    assert once["successes"] == end["successes"] == 3


def test_the_expert_runs_without_a_policy(task, tmp_path):
    assert run(task, None, tmp_path / "out")["successes"] == 3


@pytest.mark.parametrize(
    ("seed", "reason"),
    [(56, "the toy broke"), (76, "hangs"), (96, "simulator process died")],
    ids=["error", "hang", "crash"],
)
def test_one_bad_episode_never_ends_the_run(task, tmp_path, seed, reason):
    results = run(task, Pusher(), tmp_path / "out", seed=seed - 1, episodes=3, timeout=10.0)
    rows = {row["seed"]: row for row in read_episodes(tmp_path / "out" / "episodes.jsonl")}
    assert reason in rows[seed]["error"] and not rows[seed]["success"]
    assert rows[seed - 1]["success"] and rows[seed + 1]["success"]
    assert (results["errors"], results["episodes"], results["successes"]) == (1, 3, 2)


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not a finite number"), (3.0, "outside its bounds")])
def test_bad_actions_mark_the_episode_and_go_on(task, tmp_path, value, reason):
    results = run(task, Pusher(value), tmp_path / "out")
    rows = read_episodes(tmp_path / "out" / "episodes.jsonl")
    assert results["errors"] == 3 and all(reason in row["error"] and "x" in row["error"] for row in rows)


def test_a_policy_for_another_controller_is_refused_by_field(task, tmp_path):
    other = replace(SPEC, rate=5.0, names=("y",))
    with pytest.raises(SpecMismatch, match=r"names: policy \('y',\).*rate: policy 5.0, environment 10.0"):
        run(task, Pusher(spec=other), tmp_path / "out")


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(cameras=("wrist", "eye")), "needs the camera wrist; this environment has eye"),
        (Needs(cameras=("eye",), picture_size=(32, 32)), "32 x 32 px, camera eye gives 16 x 16"),
        (Needs(state_names=("x", "y")), r"a state of 2 numbers \(x, y\), this environment's has 1 \(x\)"),
    ],
    ids=["camera", "size", "state"],
)
def test_a_policy_that_needs_to_see_something_else_is_refused(task, tmp_path, needs, reason):
    policy = Pusher()
    policy.needs = needs
    with pytest.raises(SpecMismatch, match=reason):
        run(task, policy, tmp_path / "out")
    assert not policy.batches and not read_episodes(tmp_path / "out" / "episodes.jsonl")


def test_a_policy_that_looks_back_too_far_is_refused(task, tmp_path):
    policy = Looker()
    policy.look_back = 65
    with pytest.raises(ValueError, match="may look back 64 steps, this one wants 65"):
        run(task, policy, tmp_path / "out")
    assert policy.batches == []


def test_a_state_of_other_names_is_warned_of(task, tmp_path, caplog):
    policy = Pusher()
    policy.needs = Needs(cameras=("eye",), picture_size=(16, 16), state_names=("tcp",))
    assert run(task, policy, tmp_path / "out", episodes=1)["successes"] == 1
    assert "Toy: the policy knows the state by other names than this environment: tcp is x" in caplog.text


def test_a_task_that_cannot_run_here_is_refused_before_the_first_task(task, tmp_path):
    lacking = replace(task, name="Lacking", missing=lambda: "fetch it")
    with pytest.raises(FileNotFoundError, match=r"Lacking needs files.*fetch it"):
        roll_out([task, lacking], Pusher(), RolloutSettings(episodes=1), tmp_path / "out", policy_name="toy")
    assert not (tmp_path / "out").exists()


def test_several_processes_share_policy_calls_and_agree_with_one(task, tmp_path):
    policy = Pusher()
    many = run(task, policy, tmp_path / "many", episodes=6, num_envs=3)
    one = run(task, Pusher(), tmp_path / "one", episodes=6)
    assert many["env_steps"] == one["env_steps"] and many["seeds"] == one["seeds"]
    actions = [
        {row["seed"]: row["actions"] for row in read_episodes(tmp_path / name / "episodes.jsonl")}
        for name in ("many", "one")
    ]
    assert actions[0] == actions[1]


def test_a_cut_off_run_goes_on_where_it_stopped(task, tmp_path):
    out = tmp_path / "out"
    run(task, Pusher(), out, episodes=2)
    path = out / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-25])  # killed while writing the second line
    policy = Pusher()
    results = run(task, policy, out, episodes=3)
    assert results["episodes"] == 3 and results["seeds"] == [0, 1, 2]
    assert sum(policy.batches) == 4  # two episodes of two chunks each were missing


def test_a_folder_of_another_run_is_refused(task, tmp_path):
    run(task, Pusher(), tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"policy: 'toy' before, 'other' now"):
        roll_out([task], Pusher(), RolloutSettings(episodes=1), tmp_path / "out", policy_name="other")


def test_a_checkpoint_trained_anew_under_the_old_name_is_refused(task, tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(2000))
    settings = RolloutSettings(episodes=1, videos=0)

    def again():
        known = {"policy_name": str(folder), "checkpoint": identity_of(str(folder), {})[0]}
        return roll_out([task], Pusher(), settings, tmp_path / "out", **known)

    again()
    (folder / "README.md").write_text("no part of what the policy does")
    assert again()["successes"] == 1
    (folder / "model.safetensors").write_bytes(bytes(1000) + b"x" + bytes(999))  # one byte, in the middle
    with pytest.raises(FileExistsError, match=r"checkpoint: '\w{16}' before, '\w{16}' now"):
        again()
    assert identity_of("random", {}) == ("", {})


def test_a_servers_checkpoint_is_the_runs_and_settings_that_were_not_used_are_not():
    from headrace.robot.client import RemotePolicy
    from headrace.robot.server import ServerConfig, background

    config = ServerConfig(port=0, checkpoint="0123456789abcdef", settings={"steps": 4, "precision": "bf16"})
    with background(Pusher(), config) as server:
        url = f"ws://127.0.0.1:{server.port}"
        remote = RemotePolicy(url)
        for found in (identity_of(url, {"steps": 10}), identity_of(url, {"steps": 10}, remote)):
            assert found == ("0123456789abcdef", {"steps": 4, "precision": "bf16"})
        remote.close()


def test_the_policys_noise_can_differ_on_the_same_layouts(task, tmp_path):
    class Noisy(Pusher):
        def reset(self, slot, *, seed):
            self.batches.append(seed)

    for given, seeds in ((None, [7, 8, 9]), (50, [50, 51, 52])):
        policy = Noisy()
        results = run(task, policy, tmp_path / str(given), seed=7, policy_seed=given)
        assert [seed for seed in policy.batches if seed != 1] == seeds and results["seeds"] == [7, 8, 9]
    with pytest.raises(FileExistsError, match="policy_seed: 50 before, None now"):
        run(task, Noisy(), tmp_path / "50", seed=7)


def test_an_episode_that_broke_off_is_no_success_under_any_rule():
    row = {"success": False, "success_once": True, "success_at_end": True, "success_rule": "at_end", "error": "died",
           "steps": 3, "policy_ms": [], "seconds": 1.0, "seed": 0}  # fmt: skip
    told = summarise("Toy", [row], seconds=1.0)
    assert told["successes"] == told["successes_once"] == told["successes_at_end"] == 0 and told["errors"] == 1


def test_what_an_environment_tells_about_itself_is_in_the_results(task, tmp_path):
    source = (tmp_path / "toy_simulator.py").read_text()
    (tmp_path / "told_simulator.py").write_text(source.replace("class Toy:", "class Toy:\n    about = {'port': 'toy'}"))
    for _ in range(2):  # asked again, nothing is simulated
        results = run(replace(task, environment="told_simulator:Toy"), Pusher(), tmp_path / "out")
        assert results["environment"] == results["tasks"][0]["environment"] == {"port": "toy"}


def test_a_folder_of_one_renderer_takes_no_episodes_of_another(task, tmp_path):
    source = (tmp_path / "toy_simulator.py").read_text()
    for name in ("gpu", "cpu"):
        about = f"about = {{'render_backend': '{name}', 'packages': {{'torch': '{name}'}}}}"
        (tmp_path / f"drawn_by_{name}.py").write_text(source.replace("class Toy:", f"class Toy:\n    {about}"))
    first, other = (replace(task, environment=f"drawn_by_{name}:Toy") for name in ("gpu", "cpu"))
    run(first, Pusher(), tmp_path / "out", episodes=1)
    (tmp_path / "out" / "results.json").unlink()  # as of a run that was killed
    with pytest.raises(FileExistsError, match=r"another environment \(render_backend: 'gpu' before, 'cpu' now"):
        run(other, Pusher(), tmp_path / "out", episodes=2)
    assert len(read_episodes(tmp_path / "out" / "episodes.jsonl")) == 1
    assert run(first, Pusher(), tmp_path / "out", episodes=2)["episodes"] == 2


def test_a_finished_run_that_is_asked_for_again_keeps_what_it_measured(task, tmp_path):
    first = run(task, Pusher(), tmp_path / "out")
    again = run(task, policy := Pusher(), tmp_path / "out")
    assert policy.batches == [] and again["seconds"] == first["seconds"] > 0
    assert again["action_names"] == again["state_names"] == ["x"]
    more = run(task, Pusher(), tmp_path / "out", episodes=4)
    assert more["seconds"] > first["seconds"] and more["episodes"] == 4


def test_two_runs_into_one_folder_are_refused(task, tmp_path):
    with claim(tmp_path / "out"), pytest.raises(FileExistsError, match="another run is writing"):
        run(task, Pusher(), tmp_path / "out")


def test_nothing_half_written_counts_as_results(task, tmp_path, monkeypatch):
    """A full disk while writing results.json leaves no results.json."""
    from headrace.sim import rollout

    def full_disk(path, data):
        path.with_name(f".{path.name}.part").write_text("{")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(rollout, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(task, Pusher(), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_video_that_cannot_be_written_costs_only_itself(task, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "videos").write_text("a file where the folder should be")
    results = run(task, Pusher(), tmp_path / "out", episodes=2, videos=1)
    rows = read_episodes(tmp_path / "out" / "episodes.jsonl")
    assert (results["errors"], results["successes"]) == (0, 2)
    assert [row["video"] for row in rows] == [None, None] and rows[1]["note"] is None
    assert "the video could not be written" in rows[0]["note"] and "Toy, seed 0: the video" in caplog.text


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        RolloutSettings(episodes=0)


class Forgetful(Pusher):
    """Loses the episode of slot 0 when asked for it the second time, as a policy behind a lost connection does."""

    asked = 0

    def act(self, observations, slots):
        self.asked += 0 in slots
        if self.asked == 2 and 0 in slots:
            raise EpisodesLost("gone", frozenset({0}))
        return super().act(observations, slots)


def test_a_policy_that_lost_one_episode_is_asked_again_for_the_others(task, tmp_path):
    results = run(task, Forgetful(), tmp_path / "out", episodes=4, num_envs=2)
    rows = read_episodes(tmp_path / "out" / "episodes.jsonl")
    assert (results["errors"], results["successes"]) == (1, 3)
    assert [row["slot"] for row in rows if row["error"]] == [0] and "gone" in str([row["error"] for row in rows])


def test_a_connection_lost_in_an_episode_costs_that_episode(task, tmp_path):
    """Against a live server, cut in the middle of the second episode; the third runs on a new connection."""
    from headrace.robot.client import RemotePolicy
    from headrace.robot.server import ServerConfig, background

    with background(Pusher(), ServerConfig(port=0)) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}", timeout=20.0)
        calls = []

        class Cut:
            spec = remote.spec
            reset = staticmethod(remote.reset)

            def act(self, observations, slots):
                calls.append(1)
                if len(calls) == 4:  # the second chunk of the second episode
                    remote._connection.close()
                return remote.act(observations, slots)

        results = run(task, Cut(), tmp_path / "out", episodes=3)
    rows = read_episodes(tmp_path / "out" / "episodes.jsonl")
    assert [bool(row["error"]) for row in rows] == [False, True, False] and "lost ws://" in rows[1]["error"]
    assert (results["errors"], results["successes"]) == (1, 2)
    remote.close()


@pytest.mark.parametrize("draws_on_demand", [False, True])
def test_a_policy_that_looks_back_gets_the_pictures_of_the_steps_before(task, tmp_path, draws_on_demand):
    source = (tmp_path / "toy_simulator.py").read_text()
    if draws_on_demand:
        source = source.replace("self.spec, self", "self.drawing = True; self.spec, self")
        source = source.replace('images={"eye": picture}', 'images={"eye": picture} if self.drawing else {}')
    (tmp_path / "looked_at.py").write_text(source)
    policy = Looker(0.1)  # the picture brightens by 0.05 of 255 a step
    run(replace(task, environment="looked_at:Toy"), policy, tmp_path / "out", episodes=1)
    assert policy.batches == [[0], [51, 38, 25]]
    run(replace(task, environment="looked_at:Toy"), Pusher(0.1), tmp_path / "plain", episodes=1)
