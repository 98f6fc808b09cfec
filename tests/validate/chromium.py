"""Chromium without a window, driven through its DevTools protocol over two pipes.

Only the standard library: no driver and no port. The messages are JSON, each ended by a zero byte;
Chromium reads them from file descriptor 3 and writes to 4 (`--remote-debugging-pipe`).
"""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    # the page is our own, and containers give no user namespaces
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--no-first-run",
)


class Page:
    """One tab. `complaints` are the console's errors, exceptions, and what the policy refused."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number, self._rest, self._session = 0, b"", ""
        self._events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(
        self, file: Path, *, width: int = 1280, dark: bool = False, scripts: bool = True
    ) -> None:
        """Show `file` in a window of `width` CSS pixels."""
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", media="", features=[scheme])
        self._send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._events.clear()
        self._send("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def print_media(self) -> None:
        """Show the page as it is printed."""
        self._send("Emulation.setEmulatedMedia", media="print", features=[])

    def run(self, expression: str) -> Any:
        """Return what a JavaScript expression yields, as JSON."""
        done = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self) -> bytes:
        """Return the whole page as a PNG."""
        done = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(done["data"])

    @property
    def complaints(self) -> list[str]:
        """What went wrong since the page was opened."""
        return [
            json.dumps(event["params"])
            for event in self._events
            if event["method"] == "Runtime.exceptionThrown"
            or (event["method"] == "Log.entryAdded" and _is_error(event["params"]["entry"]))
            or (
                event["method"] == "Runtime.consoleAPICalled"
                and event["params"]["type"] in ("error", "warning", "assert")
            )
        ]

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def _send(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "Chromium ended"
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message


def _is_error(entry: dict[str, Any]) -> bool:
    return entry["level"] in ("error", "warning")


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """Start Chromium with a profile of its own, and end it afterwards."""
    child_reads, to_browser = os.pipe()
    from_browser, child_writes = os.pipe()

    def connect() -> None:
        os.dup2(child_reads, 3)
        os.dup2(child_writes, 4)

    command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(
        command,
        pass_fds=(3, 4),
        preexec_fn=connect,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(child_reads)
    os.close(child_writes)
    try:
        yield Page(to_browser, from_browser)
    finally:
        # it ends when nobody holds the pipe
        os.close(to_browser)
        os.close(from_browser)
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
