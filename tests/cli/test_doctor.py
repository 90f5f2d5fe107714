from headrace.cli.doctor import Finding, device_name, doctor, findings, vulkan_device

SUMMARY = """GPU: an old card
  Supported: 0
  Present:   0
GPU: llvmpipe (LLVM 15.0.6, 256 bits)
  Supported: 1
  rayTrace:  1
"""


def test_the_first_supported_device_is_named():
    assert device_name(SUMMARY) == "llvmpipe (LLVM 15.0.6, 256 bits)"
    assert device_name("") == "a device without a name"


def test_everything_that_is_needed_is_looked_at(tmp_path):
    rows = {row.what: row for row in findings(tmp_path)}
    assert {"Python", "torch", "Vulkan", "OpenCV", "video encoder", "disk"} <= set(rows)
    assert not rows["OpenCV"].advice  # exactly one build is installed


def test_a_device_that_is_gone_is_looked_for_again_by_the_set_up(tmp_path, monkeypatch):
    (tmp_path / ".vulkan").touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr("headrace.cli.doctor.vulkan_device", lambda: "a device")
    assert not {row.what: row for row in findings(tmp_path)}["Vulkan"].advice and (tmp_path / ".vulkan").exists()
    monkeypatch.setattr("headrace.cli.doctor.vulkan_device", lambda: None)
    row = {row.what: row for row in findings(tmp_path)}["Vulkan"]
    assert "scripts/setup.sh" in row.advice and not (tmp_path / ".vulkan").exists()


def test_a_device_that_does_not_answer_counts_as_none():
    assert vulkan_device(timeout=0.01) is None


def test_something_missing_gives_its_next_step_and_status_1(monkeypatch, capsys):
    broken = Finding("Vulkan", "no usable device", "run `scripts/setup.sh`")
    monkeypatch.setattr("headrace.cli.doctor.findings", lambda folder: [Finding("Python", "3.12"), broken])
    assert doctor() == 1
    assert "! Vulkan  no usable device" in capsys.readouterr().out
    monkeypatch.setattr("headrace.cli.doctor.findings", lambda folder: [Finding("Python", "3.12")])
    assert doctor() == 0
