"""A headless Chromium, driven over its DevTools protocol: no driver program is needed."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import websocket

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0"),
)


def program() -> str | None:
    """The path of a Chromium, or None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """One page of a browser."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that arrive meanwhile are kept in `events`.

        Raises:
            RuntimeError: the browser reports an error.
        """
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv())).get("id") != self._number:
            self.events.append(message)
        if "error" in message or "exceptionDetails" in message["result"]:
            raise RuntimeError(f"{method}: {message}")
        return message["result"]

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Return the value of an expression once it is true.

        Raises:
            TimeoutError: it stays false.
        """
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"after {seconds} s this is still {value!r}: {script}")
            time.sleep(0.1)
        return value

    def screenshot(self) -> bytes:
        """The visible part of the page as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._socket.close()


@contextmanager
def tab(width: int = 1200, height: int = 1000) -> Iterator[Tab]:
    """Yield an empty tab of a new browser with a fresh profile; both end afterwards."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([str(program()), *options, "about:blank"], **quiet) as browser:
            opened = None
            try:
                opened = Tab(_address(Path(profile)))
                yield opened
            finally:
                if opened is not None:
                    opened.close()
                browser.terminate()


def _address(profile: Path, seconds: float = 30) -> str:
    """The address of the first tab, once the browser has written its port into the profile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        try:
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as reply:
                tabs = [item for item in json.load(reply) if item["type"] == "page"]
            return tabs[0]["webSocketDebuggerUrl"]
        except (OSError, IndexError):
            continue
    raise TimeoutError(f"Chromium opened no tab within {seconds} s.")
