"""The set-up of a software Vulkan driver, with stand-ins for everything that would change the machine."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR, OTHER = "file:/srv/mirror", "file:/srv/other"  # apt takes any address; these reach nothing
DEB822 = f"""# the machine's mirror
Types: deb deb-src
URIs: {MIRROR}
# with updates
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: {KEY}

Types: deb
URIs: {OTHER}
Suites: bookworm-security
Components: main
"""
ONE_LINE = f"""# deb {OTHER} bookworm main
deb cdrom:[Debian 12]/ bookworm main
deb-src {OTHER} bookworm main
deb {OTHER} bookworm-security main
deb [arch=amd64 signed-by={KEY}] {MIRROR} bookworm main contrib # ours
"""


def backports(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "backports_source.py"), "bookworm", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def apt(tmp_path):
    """An empty /etc/apt."""
    (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
    return tmp_path / "apt"


@pytest.mark.parametrize(
    ("place", "text"),
    [("sources.list.d/debian.sources", DEB822), ("sources.list", ONE_LINE)],
    ids=["deb822", "one-line"],
)
def test_the_mirror_and_its_key_are_the_machines_own(apt, place, text):
    (apt / place).write_text(text)
    answer = backports(apt)
    assert answer.returncode == 0
    assert answer.stdout.splitlines() == [
        "Types: deb",
        f"URIs: {MIRROR}",
        "Suites: bookworm-backports",
        "Components: main",
        f"Signed-By: {KEY}",
    ]


def test_a_source_without_a_key_gets_none(apt):
    (apt / "sources.list").write_text(f"deb {MIRROR} oldstable main\n")
    assert f"URIs: {MIRROR}\n" in backports(apt).stdout
    assert "Signed-By" not in backports(apt).stdout


@pytest.mark.parametrize(
    "text",
    [
        f"Types: deb\nURIs: {OTHER}\nSuites: bookworm bookworm-backports\nComponents: main\n",
        DEB822 + f"\nTypes: deb\nURIs: {OTHER}\nSuites: bookworm-backports\nComponents: main\n",
    ],
)
def test_backports_that_are_there_are_left_alone(apt, text):
    (apt / "sources.list.d" / "debian.sources").write_text(text)
    answer = backports(apt)
    assert (answer.returncode, answer.stdout) == (0, "")


@pytest.mark.parametrize(
    "text", ["", DEB822.replace("Types:", "Enabled: no\nTypes:"), DEB822.replace("deb deb-src", "deb-src")]
)
def test_no_source_of_the_release_is_a_failure(apt, text):
    (apt / "sources.list.d" / "debian.sources").write_text(text)
    (apt / "sources.list.d" / "debian.sources.bak").write_text(DEB822)  # apt reads no such file
    assert backports(apt).returncode == 1


@pytest.fixture
def machine(tmp_path, apt):
    """A Debian 12 machine with a normal user, whose sudo only writes down what it was asked."""
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "os-release").write_text("ID=debian\nVERSION_CODENAME=bookworm\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    log = tmp_path / "sudo.log"
    for name, body in (("id", "echo 1000"), ("sudo", f'echo "$*" >>{log}; [ "$1" != tee ] || cat >>{log}')):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "HEADRACE_YES"}
    environment |= {
        "PATH": f"{tools}:{environment['PATH']}",
        "HEADRACE_APT": str(apt),
        "HEADRACE_OS_RELEASE": str(tmp_path / "os-release"),
    }
    return environment, log


def install(environment: dict[str, str], answer: str | None = None) -> str:
    """Run the script without a terminal, or at one where `answer` is typed; returns what it said."""
    command = ["bash", str(SCRIPTS / "install_vulkan.sh")]
    if answer is None:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    else:
        ours, theirs = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(command, env=environment, stdin=theirs, capture_output=True, text=True, timeout=60)
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("answer", [None, "", "n"])
def test_without_a_yes_sudo_is_not_called(machine, answer):
    environment, log = machine
    install(environment, answer)
    assert not log.exists()


@pytest.mark.parametrize(("answer", "more"), [("y", {}), (None, {"HEADRACE_YES": "1"})])
def test_after_a_yes_the_driver_comes_from_backports(machine, answer, more):
    environment, log = machine
    install(environment | more, answer)
    asked = log.read_text()
    assert f"tee /etc/apt/sources.list.d/bookworm-backports.sources\nTypes: deb\nURIs: {MIRROR}" in asked
    assert "apt-get update" in asked and "-t bookworm-backports mesa-vulkan-drivers" in asked
