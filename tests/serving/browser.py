"""Headless Chromium, driven by the DevTools protocol over a pipe, without any package."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab. `call` is a method of the protocol, `run` evaluates JavaScript."""

    def __init__(self, send: int, receive: int) -> None:
        self.pipe, self.receive, self.buffer, self.number, self.session = send, receive, b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.console: list[str] = []
        self.call("Runtime.enable")

    def call(self, method: str, seconds: float = 60, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.pipe, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while (found := self._next(end)).get("id") != self.number:
            if found.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.console.append(json.dumps(found["params"]))
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        return found["result"]

    def run(self, code: str):
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, code: str, seconds: float = 60) -> None:
        """Waits for a JavaScript condition."""
        end = time.monotonic() + seconds
        while not self.run(code):
            assert time.monotonic() < end, f"not within {seconds} s: {code}; {self.console}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def screenshot(self, width: int = 1100, height: int = 900) -> bytes:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _next(self, end: float):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive], [], [], max(0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            part = os.read(self.receive, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def page(profile):
    """A Page of a separate Chromium instance whose profile is in the folder `profile`."""
    down, up = os.pipe(), os.pipe()  # it reads from 3 and writes to 4

    def hold():
        os.dup2(down[0], 103)
        os.dup2(up[1], 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}"], preexec_fn=hold, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(down[0])
    os.close(up[1])
    try:
        yield Page(down[1], up[0])
    finally:
        process.kill()
        process.wait()
        os.close(down[1])
        os.close(up[0])
