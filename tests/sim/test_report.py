import base64
import html.parser
import json
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from websockets.sync.client import connect

from headrace.sim.report import write_report
from headrace.sim.svg import histogram, line_plot

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TASKS = {"PushCube-v1": (True, True, False), "PickCube-v1": (True, False, None)}


def write_video(path, *, codec="libx264", frames=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        y, x = np.mgrid[:96, :96]
        for step in range(frames):
            near = (x - 10 - 6 * step) ** 2 + (y - 48) ** 2 < 150
            picture = np.where(near[..., None], [230, 80, 60], [40, 70, 110]).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def results(tmp_path):
    """A finished rollout of two tasks; one episode ended with an error."""
    random = np.random.default_rng(0)
    rows, summaries = [], []
    for task, outcomes in TASKS.items():
        for number, outcome in enumerate(outcomes):
            write_video(tmp_path / "videos" / f"{task}_{number}.mp4")
            error = "step 7: action 2 is NaN <b>" if outcome is None else None
            rows.append({
                "task": task, "seed": 100 + number, "episode": number, "success": bool(outcome), "steps": 25,
                "success_rule": "at_end", "seconds": 2.5, "error": error, "policy_ms": random.gamma(9, 2, 5).tolist(),
                "actions": np.cumsum(random.normal(size=(25, 4)), 0).round(4).tolist(),
                "states": random.normal(size=(26, 9)).round(4).tolist(),
                "video": f"videos/{task}_{number}.mp4", "slot": 0, "instruction": f"do {task} & stop",
            })  # fmt: skip
        wins = sum(bool(outcome) for outcome in outcomes)
        summaries.append({"task": task, "episodes": 3, "successes": wins, "success_rate": wins / 3,
                          "ci95": [0.2, 0.9]})  # fmt: skip
    report = {
        "task": ",".join(TASKS), "policy": "checkpoints/demo", "command": "headrace rollout checkpoints/demo",
        "versions": {"torch": "2.11.0", "mani-skill": "3.0.1"}, "tasks": summaries, "seeds": [100, 101, 102],
        "action_names": ["x", "y", "z", "gripper"], "date": "2026-11-23",
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(report))
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class Links(html.parser.HTMLParser):
    """Collects everything a page refers to, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.links, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "poster", "data", "action")]
        if tag not in ("meta", "input", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_outside_itself(results):
    text = write_report(results).read_text()
    page = Links(text)
    assert page.open == []
    assert len(page.links) == 6 and all(link.startswith("data:video/mp4;base64,") for link in page.links)
    assert not re.search(r"https?:|@import|url\(", text.replace("http-equiv", ""))


def test_page_says_what_the_files_say(results):
    text = write_report(results).read_text()
    for words in ("2 of 3", "66.7%", "20.0% to 90.0%", "1 of 3", "at_end", "seed 101, 25 steps", "2.11.0",
                  "headrace rollout checkpoints/demo", "30 calls: median", "100 to 102", "success (3)",
                  "failure (2)", "errored (1)",
                  "step 7: action 2 is NaN &lt;b&gt;", "do PickCube-v1 &amp; stop"):  # fmt: skip
        assert words in text, words
    assert text.count("<title>gripper</title>") == 6 and "state 8" in text


def test_episodes_stand_in_order_however_they_ended(results):
    path = results / "episodes.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[::-1]) + "\n")
    page = write_report(results).read_text()
    titles = re.findall(r"<b>(\S+-v1) #(\d)</b>", page)
    assert titles == [(task, str(k)) for task in TASKS for k in range(3)]


def test_a_single_task_has_its_keys_at_the_top(results):
    data = json.loads((results / "results.json").read_text())
    single = {**data, **data["tasks"][0]}
    del single["tasks"], single["ci95"]
    (results / "results.json").write_text(json.dumps(single))
    text = write_report(results).read_text()
    assert "20.8% to 93.9%" in text, "Wilson interval of 2 of 3"


def test_without_policy_calls_or_videos_the_page_still_stands(results):
    rows = [json.loads(line) for line in (results / "episodes.jsonl").read_text().splitlines()]
    bare = [row | {"policy_ms": [], "video": None, "actions": [], "states": []} for row in rows]
    (results / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    text = write_report(results).read_text()
    assert "No policy calls" in text and "<video" not in text and text.count("<details") == 6


def test_videos_beyond_the_budget_are_named_only(results):
    size = (results / "videos" / "PushCube-v1_0.mp4").stat().st_size
    text = write_report(results, video_bytes=int(2.5 * size)).read_text()
    assert text.count("<video") == 2 and text.count("is not embedded") == 4


def test_broken_videos_are_said_and_the_rest_is_shown(results):
    broken = results / "videos" / "PushCube-v1_0.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    (results / "videos" / "PushCube-v1_1.mp4").unlink()
    write_video(results / "videos" / "PushCube-v1_2.mp4", codec="mpeg4")
    text = write_report(results).read_text()
    assert text.count("missing or truncated") == 2 and "this video is mpeg4" in text and text.count("<video") == 3


def test_a_cut_off_last_line_is_left_out_and_a_broken_one_named(results):
    path = results / "episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:40]]))
    assert write_report(results).read_text().count("<details") == 5
    path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 2 is not valid JSON"):
        write_report(results)


def test_missing_or_damaged_results_are_named(results):
    (results / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not valid JSON"):
        write_report(results)
    with pytest.raises(FileNotFoundError, match=r"results\.json is missing.*headrace rollout"):
        write_report(results / "videos")


def test_a_failed_write_leaves_the_old_page(results, monkeypatch):
    old = write_report(results).read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full)
        write_report(results)
    assert (results / "report.html").read_text() == old
    assert not list(results.glob(".*part"))


def test_lines_go_through_the_data():
    svg = line_plot([[0.0], [1.0], [0.5]], ["x"], title="t", width=154, height=130)
    points = re.search(r'points="([^"]*)"', svg).group(1).split()
    x, y = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert x == (46.0, 96.0, 146.0)
    assert y[0] - y[2] == pytest.approx(y[2] - y[1], abs=0.11) and y[1] < y[0]


def test_numbers_that_are_not_finite_leave_a_gap():
    svg = line_plot([[0.0], [1.0], [float("nan")], [0.5], [0.2]], ["x"], title="t")
    assert svg.count("<polyline") == 2 and "nan" not in svg
    with pytest.raises(ValueError, match="2 names for rows of 1"):
        line_plot([[0.0]], ["x", "y"], title="t")


def test_histogram_counts_every_value():
    svg = histogram([1.0, 1.0, 2.0, 10.0], title="t", unit="ms", bins=3)
    assert re.findall(r"ms: (\d+)<", svg) == ["3", "0", "1"]
    assert re.findall(r"ms: (\d+)<", histogram([4.0, 4.0], title="t", unit="ms", bins=3)) == ["0", "2", "0"]


PROBE = """(async () => {
  const outcomes = [];
  for (const video of document.querySelectorAll('video')) {
    video.closest('details').open = true;
    await video.play();
    for (let n = 0; n < 100 && video.currentTime === 0; n++) await new Promise(done => setTimeout(done, 50));
    outcomes.push(video.currentTime > 0 && video.videoWidth === 96 ? 'played' : 'stuck');
  }
  document.querySelector('input[value=failure]').click();
  const hidden = [...document.querySelectorAll('details.failure')].filter(e => e.offsetParent === null).length;
  return outcomes.join(' ') + '; hidden ' + hidden;
})()"""


@contextmanager
def browser_page(url, profile):
    """A page in headless Chromium, steered through its debugging port; gives a function from script to value."""
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"),
        *("--window-size=1200,1500", "--remote-debugging-port=0", f"--user-data-dir={profile}"),
    ]
    process = subprocess.Popen([CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = profile / "DevToolsActivePort"
        until = time.monotonic() + 90
        while not (port.is_file() and port.read_text().count("\n")) and time.monotonic() < until:
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        target = next(t for t in json.loads(opener.open(address).read()) if t["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:

            def call(method, **parameters):
                socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                while (answer := json.loads(socket.recv(timeout=90))).get("id") != 1:
                    continue
                return answer["result"]

            # A new browser shows about:blank first; what runs there would speak about the wrong page.
            here = "document.readyState + ' ' + location.href"
            while call("Runtime.evaluate", expression=here)["result"].get("value") != f"complete {url}":
                assert time.monotonic() < until, "the page did not load"
                time.sleep(0.05)
            yield call
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
def test_videos_play_in_chromium(results, tmp_path):
    page = write_report(results)
    with browser_page(page.as_uri(), tmp_path / "profile") as call:
        answer = call("Runtime.evaluate", expression=PROBE, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"].get("description")
        assert answer["result"].get("value") == " ".join(["played"] * 6) + "; hidden 2"
        shot = base64.b64decode(call("Page.captureScreenshot", format="png")["data"])
    picture = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)
    colours = np.unique(picture.reshape(-1, 3), axis=0)
    assert picture.shape[1] == 1200 and picture.std() > 10 and len(colours) > 100, "the page is blank"
