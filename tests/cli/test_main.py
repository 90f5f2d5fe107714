import os
import subprocess
import sys
import time
from importlib import import_module

import pytest

from headrace.cli.main import COMMANDS, find_command, main


def test_every_command_points_at_a_function():
    for target, line in COMMANDS.values():
        module, attribute = target.split(":")
        assert callable(getattr(import_module(module), attribute)) and line[0].islower()


def test_help_needs_no_torch_and_answers_within_a_second():
    code = "import sys, headrace.cli.main as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
    assert done.returncode == 0 and "rollout" in done.stdout
    assert min(times) < 1.0


def test_help_of_a_command_loads_no_torch():
    code = (
        "import sys, headrace.cli.main as m\n"
        "try: m.main(['rollout', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--episodes" in done.stdout


def test_unknown_commands_name_a_near_match(capsys):
    assert main(["rolout"]) == 2
    assert "did you mean 'rollout'" in capsys.readouterr().err


def test_wrong_arguments_give_status_2(capsys):
    assert main(["rollout", "random", "--task", "PickCub-v1"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["rollout", "random", "--no-such-flag"])
    assert stopped.value.code == 2


def test_two_word_commands_are_found():
    assert find_command(["rollout", "x", "y"]) == ("rollout", ["x", "y"])


@pytest.mark.parametrize("word", ["tasks", "--help"])
def test_a_reader_that_left_is_no_error(word):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "headrace.cli.main", word]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_is_one(monkeypatch, capsys):
    import headrace.cli.tasks

    def lose_the_simulator() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(headrace.cli.tasks, "tasks", lose_the_simulator)
    assert main(["tasks"]) == 1
    assert "headrace tasks: [Errno 32] Broken pipe" in capsys.readouterr().err
