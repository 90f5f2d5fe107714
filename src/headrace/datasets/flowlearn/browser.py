"""A headless Chromium kept open for many pages, driven over its DevTools socket; no driver package is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1",
    "--allow-file-access-from-files", "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip


def find_browser() -> str | None:
    """Path of a Chromium, or None. `HEADRACE_CHROMIUM` names another one."""
    wanted = os.environ.get("HEADRACE_CHROMIUM")
    return wanted if wanted else next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One page in one Chromium process with a profile folder of its own, removed on exit.

    Raises:
        FileNotFoundError: No Chromium here.
        RuntimeError: It did not start, or a script in the page failed.
    """

    def __init__(self, *, timeout: float = 60.0) -> None:
        program = find_browser()
        if program is None:
            raise FileNotFoundError(
                f"no Chromium found (looked for {', '.join(PROGRAMS)}); install one, set HEADRACE_CHROMIUM, "
                "or choose another renderer"
            )
        self.timeout = timeout
        self.calls = 0
        self.profile = tempfile.mkdtemp(prefix="headrace-chromium-")
        self.process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.socket = self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> Any:
        from urllib.request import urlopen

        from websockets.sync.client import connect

        deadline = time.monotonic() + self.timeout
        marker = Path(self.profile, "DevToolsActivePort")
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"Chromium stopped at once with status {self.process.returncode}")
            lines = marker.read_text().split() if marker.is_file() else []
            if lines:
                with urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=self.timeout) as reply:
                    pages = [p for p in json.load(reply) if p["type"] == "page"]
                if pages:
                    return connect(pages[0]["webSocketDebuggerUrl"], max_size=None, open_timeout=self.timeout)
            time.sleep(0.05)
        raise RuntimeError(f"Chromium did not answer within {self.timeout:.0f} s")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; returns its result."""
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=self.timeout))
            if message.get("id") == self.calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error'].get('message')}")
                return message["result"]

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details.get("text", "script failed"))
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """Load a page and wait until it is complete."""
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + self.timeout
        while self.evaluate("location.href + ' ' + document.readyState") != f"{url} complete":
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url} did not load within {self.timeout:.0f} s")
            time.sleep(0.02)

    def screenshot(self, width: int, height: int) -> bytes:
        """PNG of the page's upper left corner, `width` x `height` [px]."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        return base64.b64decode(data)

    def close(self) -> None:
        """Stop the process and remove its profile."""
        if getattr(self, "socket", None) is not None:
            self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
