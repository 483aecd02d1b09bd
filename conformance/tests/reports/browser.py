"""Drive a headless Chromium over its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
SECONDS = 90.0


def find_chromium() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """What became of a page that was opened.

    Args:
        problems: errors, warnings and exceptions of the console.
        requests: what it asked for, itself left out.
        values: what the expressions gave.
        screenshot: PNG of the whole page.
    """

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    screenshot: bytes = b""


class Browser:
    """A running browser with a profile of its own.

    Args:
        program: path of the browser.
        folder: an empty folder for its profile.
    """

    def __init__(self, program: str, folder: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()  # what it reads, and what it writes
        pipes = f"3</dev/fd/{ours[0]} 4>/dev/fd/{theirs[1]}"
        self._process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {pipes}', "sh", program, *FLAGS, f"--user-data-dir={folder}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(ours[0], theirs[1]),
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
        self._buffer, self._id = b"", 0
        self._events: list[dict[str, Any]] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._read, selectors.EVENT_READ)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        os.close(self._write)
        os.close(self._read)

    def open(
        self,
        path: Path,
        width: int,
        *,
        dark: bool = False,
        script: bool = True,
        expressions: tuple[str, ...] = (),
        at: str = "",
    ) -> Page:
        """Open a file in a window of this width; `at` is an element to photograph alone."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        self._call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._call("Emulation.setScriptExecutionDisabled", session, value=not script)
        self._events.clear()
        url = path.resolve().as_uri()
        self._call("Page.navigate", session, url=url)
        self._wait_for("Page.loadEventFired")
        page = Page()
        for expression in expressions:
            result = self._call("Runtime.evaluate", session, expression=expression)
            page.values[expression] = result["result"].get("value")
        options: dict[str, Any] = {"captureBeyondViewport": True}
        if at:
            box = (
                f"JSON.stringify(document.querySelector({json.dumps(at)}).getBoundingClientRect())"
            )
            found = json.loads(
                self._call("Runtime.evaluate", session, expression=box)["result"]["value"]
            )
            options["clip"] = {k: found[k] for k in ("x", "y", "width", "height")} | {"scale": 1}
        else:
            box = self._call("Page.getLayoutMetrics", session)["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": width, "height": box["height"], "scale": 1}
        shot = self._call("Page.captureScreenshot", session, **options)
        page.screenshot = base64.b64decode(shot["data"])
        for event in self._events:
            _note(event["method"], event.get("params", {}), url, page)
        self._call("Target.closeTarget", targetId=target)
        return page

    def _call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not any(event["method"] == method for event in self._events):
            self._events.append(self._next(deadline))

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser ended with status {self._process.wait()}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _note(method: str, params: dict[str, Any], url: str, page: Page) -> None:
    if method == "Network.requestWillBeSent":
        asked = params["request"]["url"]
        if asked.partition("#")[0] != url and not asked.startswith("data:"):
            page.requests.append(asked)
    elif method == "Log.entryAdded":
        page.problems.append(params["entry"]["text"])
    elif method == "Runtime.exceptionThrown":
        page.problems.append(str(params["exceptionDetails"]))
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
        page.problems.append(str(params["args"]))
