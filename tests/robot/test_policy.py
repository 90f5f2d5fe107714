import numpy as np
import pytest
import torch

from headrace.cli.rollout import make_policy, settings_of
from headrace.contracts import ActionSpec, Needs, Observation, Policy, needs_of
from headrace.robot.chunking import RecedingHorizon, TemporalEnsemble
from headrace.robot.policy import FlowPolicy, RandomPolicy, load_policy, settle
from headrace.robot.vipra import VipraConfig, VipraPolicy

SPEC = ActionSpec(
    names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0,
    low=(-1, -1, -1), high=(1, 1, 1),
)  # fmt: skip


def observation(size: int = 64, camera: str = "base_camera", state: int = 15) -> Observation:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Observation(
        images={camera: picture}, state=generator.normal(size=state).astype(np.float32), instruction="push"
    )


def grey() -> Observation:
    return Observation(images={"base_camera": np.zeros((64, 64), np.uint8)}, state=np.zeros(15, np.float32))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    VipraPolicy(VipraConfig.tiny(SPEC)).save_pretrained(tmp_path)
    return tmp_path


def test_a_batch_gives_what_each_slot_gives_alone(folder):
    together, alone = load_policy(str(folder)), load_policy(str(folder))
    for policy in (together, alone):
        policy.reset(0, seed=5)
        policy.reset(1, seed=6)
    both = together.act([observation(), observation()], [0, 1]).actions
    one = np.concatenate([alone.act([observation()], [slot]).actions for slot in (0, 1)])
    np.testing.assert_allclose(both, one, atol=1e-5)
    assert not np.allclose(both[0], both[1]) and isinstance(together, Policy)


def test_what_a_checkpoint_must_see_reaches_whoever_asks_its_wrapper_or_its_server(folder):
    from headrace.robot.client import RemotePolicy
    from headrace.robot.server import ServerConfig, background

    wanted = Needs(cameras=("base_camera",), state_names=tuple(f"s{i}" for i in range(15)))
    policy = load_policy(str(folder))
    assert needs_of(RecedingHorizon(policy, 2)) == needs_of(TemporalEnsemble(policy)) == wanted
    assert needs_of(RandomPolicy(SPEC)) == Needs()
    with background(policy, ServerConfig(port=0)) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}", timeout=20.0)
        assert needs_of(remote) == wanted
        remote.close()


def test_more_actions_than_a_chunk_has_are_refused(folder):
    given = {"solver": "euler", "steps": None, "grid": None, "ensemble": False, "precision": "fp32"}
    horizon = load_policy(str(folder)).horizon
    assert make_policy(str(folder), [], settings_of(execute=horizon, **given)).execute == horizon
    with pytest.raises(ValueError, match=f"execute {horizon + 1} asks for more than the {horizon} actions"):
        make_policy(str(folder), [], settings_of(execute=horizon + 1, **given))


def test_the_seed_fixes_the_actions(folder):
    policy = load_policy(str(folder))
    chunks = []
    for _ in range(2):
        policy.reset(0, seed=5)
        chunks.append(policy.act([observation()], [0]).actions)
    np.testing.assert_array_equal(*chunks)


def test_actions_are_brought_to_the_controller():
    settled = settle(np.array([[0.4, -3.0, 0.2], [np.nan, 0.0, -0.1]], np.float32), SPEC)
    np.testing.assert_allclose(settled[0], [0.4, -1.0, 1.0])
    assert np.isnan(settled[1, 0]) and settled[1, 2] == -1.0


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (observation(camera="wrist"), "needs the cameras base_camera; the observation has wrist"),
        (grey(), r"uint8 pictures \(height, width, 3\), got uint8 \(64, 64\)"),
        (observation(state=3), "state of 15 numbers, got 3"),
    ],
)
def test_observations_that_do_not_fit_are_named(folder, seen, message):
    policy = load_policy(str(folder))
    policy.reset(0, seed=0)
    with pytest.raises(ValueError, match=message):
        policy.act([seen], [0])


def test_a_truncated_checkpoint_is_one_clear_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read as safetensors.*truncated"):
        load_policy(str(folder))


def test_another_models_folder_is_named(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"VipraPolicy"', '"TokenFlow"'))
    with pytest.raises(ValueError, match="holds a TokenFlow, not a VipraPolicy"):
        load_policy(str(folder))


def test_a_missing_folder_says_so():
    with pytest.raises(FileNotFoundError, match=r"no folder '\./nowhere' here"):
        load_policy("./nowhere")


def test_history_repeats_the_first_frame_then_fills(folder):
    from dataclasses import replace

    torch.manual_seed(0)
    policy = FlowPolicy(VipraPolicy(replace(VipraConfig.tiny(SPEC), history=(-2, 0))))
    policy.reset(0, seed=0)
    frames = [np.full((64, 64, 3), value, np.uint8) for value in (1, 2, 3, 4)]
    seen = []
    for frame in frames:
        inputs = policy._history.inputs(
            [Observation(images={"base_camera": frame}, state=np.zeros(15, np.float32))], [0]
        )
        seen.append(inputs.images[0, 0, :, 0, 0, 0].tolist())
    assert seen == [[1, 1], [1, 2], [1, 3], [2, 4]]


def test_a_call_that_fails_leaves_every_history_as_it_was():
    from dataclasses import replace

    policy = FlowPolicy(VipraPolicy(replace(VipraConfig.tiny(SPEC), history=(-2, 0))))
    for slot in (0, 1):
        policy.reset(slot, seed=0)

    def seen(value: int, state: int = 15) -> Observation:
        picture = np.full((64, 64, 3), value, np.uint8)
        return Observation(images={"base_camera": picture}, state=np.zeros(state, np.float32))

    policy._history.inputs([seen(1)], [0])
    with pytest.raises(ValueError, match="a state of 15 numbers"):
        policy._history.inputs([seen(2), seen(2, state=3)], [0, 1])
    assert policy._history.inputs([seen(2)], [0]).images[0, 0, :, 0, 0, 0].tolist() == [1, 2]


def test_history_is_of_control_steps_where_the_observation_brings_them(caplog):
    from dataclasses import replace

    torch.manual_seed(0)
    policy = FlowPolicy(VipraPolicy(replace(VipraConfig.tiny(SPEC), history=(-2, 0))))
    assert policy.look_back == RecedingHorizon(TemporalEnsemble(policy), 1).look_back == 2
    assert RecedingHorizon(RandomPolicy(SPEC), 1).look_back == 0
    policy.reset(0, seed=0)

    def look(*values: int) -> list[int]:
        pictures = [{"base_camera": np.full((64, 64, 3), value, np.uint8)} for value in values]
        seen = Observation(images=pictures[0], state=np.zeros(15, np.float32), past=tuple(pictures[1:]))
        return policy._history.inputs([seen], [0]).images[0, 0, :, 0, 0, 0].tolist()

    assert [look(1), look(8, 7, 6), look(9, 8), look(20, 19, 18, 17)] == [[1, 1], [6, 8], [8, 9], [18, 20]]
    assert "looks 2 steps back" not in caplog.text
    look(30)
    look(31)
    assert caplog.text.count("looks 2 steps back") == 1


def test_pictures_of_another_size_are_stretched_as_training_reads_them(folder):
    import cv2

    policy, wide = load_policy(str(folder)), np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    policy.reset(0, seed=0)
    inputs = policy._history.inputs([Observation(images={"base_camera": wide}, state=np.zeros(15, np.float32))], [0])
    wanted = cv2.resize(wide, (64, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(inputs.images[0, 0, 0].numpy(), wanted)


def test_random_actions_stay_within_bounds():
    policy = RandomPolicy(SPEC, horizon=50)
    policy.reset(0, seed=1)
    actions = policy.act([observation()], [0]).actions
    assert actions.shape == (1, 50, 3) and np.abs(actions).max() <= 1 and actions.std() > 0.3
