"""A headless Chromium, driven through its DevTools pipe: enough to open a page, ask it things and hear it complain.

All tests of a process share one, which is started for the first; each has a profile of its own, that nobody else sees.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--disable-extensions", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """Its path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@functools.cache
def start_chromium() -> tuple[int, int]:
    """Descriptors on which it is read and written; it ends with this process."""
    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    # Chromium reads descriptor 3 and writes 4
    command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh", str(find_chromium()), *FLAGS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile.name}", "about:blank"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def stop() -> None:
        with profile, process:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

    atexit.register(stop)
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdout.fileno(), process.stdin.fileno()


class Browser:
    """One page. `complaints`: errors and warnings of the page; `requests`: everything it asked the network for."""

    numbers = itertools.count(1)
    received = b""  # and not read yet

    def __init__(self, timeout: float = 30.0) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.timeout = timeout
        self._session: str | None = None

    def __enter__(self) -> Browser:
        self._in, self._out = start_chromium()
        self._profile = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=self._profile)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.call("Target.disposeBrowserContext", browserContextId=self._profile)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until its script says that it is ready."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait_for("document.documentElement?.dataset.ready === 'yes'")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true; TimeoutError."""
        until = time.monotonic() + self.timeout
        while self.ask(expression) is not True:
            if time.monotonic() > until:
                raise TimeoutError(f"never true: {expression}; the page said {self.complaints}")
            time.sleep(0.02)

    def ask(self, expression: str) -> Any:
        """The JSON value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; RuntimeError where there is none."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for received in self._receive():
            if received.get("id") == number:
                if "error" in received:
                    raise RuntimeError(f"{method}: {received['error']}")
                result: dict[str, Any] = received["result"]
                return result
            self._hear(received)
        start_chromium.cache_clear()
        raise RuntimeError("Chromium has gone")

    def _receive(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + self.timeout
        while True:
            while b"\0" in Browser.received:
                message, _, Browser.received = Browser.received.partition(b"\0")
                yield json.loads(message)
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                return
            Browser.received += part

    def _hear(self, event: dict[str, Any]) -> None:
        if event.get("sessionId") != self._session:
            return  # the page before, as it closes
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"][:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
