"""The remote policy: what it says when the other side is absent, wrong, or goes away."""

import threading

import numpy as np
import pytest
from websockets.sync.server import serve

from headrace.contracts import ActionSpec, Observation, Policy, SpecMismatch
from headrace.robot.client import ConnectionLost, RemotePolicy, ServerRefused, ServerUnreachable
from headrace.robot.wire import WireError, pack, unpack

SPEC = ActionSpec(names=("x", "y"), frame="joint", rotation="none", gripper="none", rate=30.0)
LOOK = Observation(images={}, state=np.zeros(2, np.float32))


@pytest.fixture
def serving():
    """Start servers that greet and answer as told; stop them at the end."""
    servers = []

    def start(greeting, *answers):
        def handler(connection):
            connection.send(greeting)
            for answer in answers:
                connection.recv()
                if answer is None:
                    connection.close()
                    return
                connection.send(answer)

        server = serve(handler, "127.0.0.1", 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"ws://127.0.0.1:{server.socket.getsockname()[1]}"

    yield start
    for server in servers:
        server.shutdown()


HELLO = pack({"action_spec": SPEC.to_dict()})


def test_it_is_a_policy(serving):
    policy = RemotePolicy(serving(HELLO, pack({"actions": np.ones((3, 2))})))
    assert isinstance(policy, Policy) and policy.spec == SPEC
    policy.reset(0, seed=0)
    chunk = policy.act([LOOK], [0])
    assert chunk.actions.shape == (1, 3, 2) and chunk.actions.dtype == np.float32 and chunk.milliseconds > 0


def test_a_server_without_a_convention_needs_one_given(serving):
    url = serving(pack({}))
    with pytest.raises(ValueError, match="spec=ActionSpec"):
        RemotePolicy(url)
    assert RemotePolicy(url, spec=SPEC).spec == SPEC


def test_nobody_there_and_wrong_greetings_are_named(serving):
    with pytest.raises(ServerUnreachable, match="no policy server"):
        RemotePolicy("ws://127.0.0.1:9", timeout=2)
    with pytest.raises(ServerUnreachable):
        RemotePolicy(serving(b"\xc1"), timeout=2)
    with pytest.raises(ServerUnreachable, match="greets with int"):
        RemotePolicy(serving(pack(3)), timeout=2)
    with pytest.raises(ValueError, match="ws://"):
        RemotePolicy("http://127.0.0.1:9")


def test_a_connection_lost_in_an_episode_is_said_and_the_next_reset_connects_again(serving):
    policy = RemotePolicy(serving(HELLO, None))
    policy.reset(0, seed=0)
    with pytest.raises(ConnectionLost, match="during an episode"):
        policy.act([LOOK], [0])
    with pytest.raises(ConnectionLost, match="call reset"):
        policy.act([LOOK], [0])
    policy.url = serving(HELLO, pack({"actions": np.zeros((1, 2))}))
    policy.reset(0, seed=1)
    assert policy.act([LOOK], [0]).actions.shape == (1, 1, 2)


def test_an_episode_that_ran_on_the_lost_connection_does_not_go_on_with_the_new_one(serving):
    one = pack({"actions": np.zeros((1, 2))})
    policy = RemotePolicy(serving(HELLO, one, one, None))
    for slot in (0, 1):
        policy.reset(slot, seed=slot)
    policy.act([LOOK, LOOK], [0, 1])
    with pytest.raises(ConnectionLost) as lost:
        policy.act([LOOK], [0])
    assert lost.value.slots == {0}
    policy.url = serving(HELLO, one, one)
    policy.reset(0, seed=2)
    with pytest.raises(ConnectionLost) as lost:
        policy.act([LOOK, LOOK], [0, 1])
    assert lost.value.slots == {1}
    assert policy.act([LOOK], [0]).actions.shape == (1, 1, 2)


def test_a_server_that_stays_away_is_looked_for_as_long_as_the_patience_lasts(serving):
    policy = RemotePolicy(serving(HELLO, None), patience=0.2, timeout=2)
    policy.reset(0, seed=0)
    with pytest.raises(ConnectionLost):
        policy.act([LOOK], [0])
    policy.url = "ws://127.0.0.1:9"
    with pytest.raises(ServerUnreachable):
        policy.reset(0, seed=1)


def test_a_server_that_does_not_answer_in_time_counts_as_lost(serving):
    quiet = threading.Event()

    def handler(connection):
        connection.send(HELLO)
        quiet.wait(3)

    server = serve(handler, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    policy = RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
    policy.timeout = 0.3
    policy.reset(0, seed=0)
    with pytest.raises(ConnectionLost, match="Timeout"):
        policy.act([LOOK], [0])
    quiet.set()
    server.shutdown()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("no such camera", "no such camera"),
        (pack({"actions": np.ones((3, 5))}), r"\(3, 5\), wanted \(H, 2\)"),
        (pack({"actions": np.full((1, 2), np.nan)}), "not finite"),
        (pack({"nothing": 1}), "NoneType"),
    ],
)
def test_answers_that_must_not_reach_a_robot_are_refused(serving, answer, why):
    policy = RemotePolicy(serving(HELLO, answer))
    policy.reset(0, seed=0)
    with pytest.raises(ServerRefused, match=why):
        policy.act([LOOK], [0])


def test_an_observation_that_cannot_be_sent_leaves_no_answer_for_the_next_question(serving):
    """Of two observations the second cannot be packed; the answer to the first would be taken for a later one's."""
    policy = RemotePolicy(serving(HELLO, *(pack({"actions": np.full((1, 2), n)}) for n in (1.0, 2.0))))
    for slot in (0, 1):
        policy.reset(slot, seed=slot)
    bad = Observation(images={"cam": np.zeros((8, 8, 3), complex)}, state=np.zeros(2, np.float32))
    with pytest.raises(WireError, match="complex"):
        policy.act([LOOK, bad], [0, 1])
    policy.act([LOOK], [0])
    assert policy.act([LOOK], [0]).actions[0, 0, 0] == 2.0


def test_a_refused_first_observation_does_not_lose_the_start_of_the_episode():
    starts = []

    def handler(connection):
        connection.send(HELLO)
        for answer in ("no", pack({"actions": np.zeros((1, 2))}), pack({"actions": np.zeros((1, 2))})):
            starts.append(unpack(connection.recv()).get("start"))
            connection.send(answer)

    server = serve(handler, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    policy = RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
    policy.reset(0, seed=5)
    with pytest.raises(ServerRefused):
        policy.act([LOOK], [0])
    for _ in range(2):
        policy.act([LOOK], [0])
    assert starts == [5, 5, None]
    server.shutdown()


def test_ctrl_c_while_waiting_ends_the_connection(serving, monkeypatch):
    policy = RemotePolicy(serving(HELLO, pack({"actions": np.zeros((1, 2))})))
    policy.reset(0, seed=0)

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(policy._connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        policy.act([LOOK], [0])
    with pytest.raises(ConnectionLost):
        policy.act([LOOK], [0])


@pytest.mark.parametrize("told", [{"action_spec": 3}, {"action_spec": {"names": ("x",)}}, {"action_spec": {"no": 1}}])
def test_an_action_convention_that_is_none_is_named(serving, told):
    with pytest.raises(ValueError, match="no valid action convention"):
        RemotePolicy(serving(pack(told)))


@pytest.mark.parametrize(
    ("part", "before", "now"), [("checkpoint", "a", "b"), ("settings", {"steps": 4}, {"steps": 8})]
)
def test_a_server_that_comes_back_with_another_policy_is_refused_every_time(serving, part, before, now):
    policy = RemotePolicy(serving(pack({"action_spec": SPEC.to_dict(), part: before}), None))
    policy.reset(0, seed=0)
    with pytest.raises(ConnectionLost):
        policy.act([LOOK], [0])
    policy.url = serving(pack({"action_spec": SPEC.to_dict(), part: now}))
    for _ in range(2):
        with pytest.raises(SpecMismatch, match=f"differs in {part}"):
            policy.reset(0, seed=1)
