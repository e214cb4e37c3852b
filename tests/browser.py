"""Headless Chromium driven over a pipe by its DevTools protocol: keys, screenshots, expressions."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu-sandbox", "--hide-scrollbars"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--mute-audio"),
    # Nothing of the network can be reached, whatever a page asks for.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find():
    """Its path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page; use it with `with`."""

    def __init__(self, folder, size=(1400, 900)):
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()

        # The shell puts the pipes where --remote-debugging-pipe looks for them.
        place = f'exec 100<&{theirs_read} 101>&{theirs_write} && exec "$@" 3<&100 4>&101'
        self.process = subprocess.Popen(
            [
                *("bash", "-c", place, "bash"),
                *(find(), *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"),
                *(f"--window-size={size[0]},{size[1]}", "about:blank"),
            ],
            pass_fds=(theirs_read, theirs_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_write)
        os.close(theirs_read)
        self.reader, self.writer = os.fdopen(ours_read, "rb"), os.fdopen(ours_write, "wb")
        self.count, self.session, self.said = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call("Browser.close")
        self.writer.close()
        self.reader.close()
        self.process.wait(timeout=300)

    def call(self, method, **params):
        """One call and its answer; what else the browser says is kept in `said`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.said.append(answer)

    def _message(self):
        parts = bytearray()
        while (byte := self.reader.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            parts += byte
        return parts

    def open(self, url):
        self.call("Page.navigate", url=url)

    def evaluate(self, expression):
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait(self, expression, seconds=300):
        """Until the expression is true; returns its value."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := self.evaluate(expression):
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{expression} stayed false; the page said {self.errors()}")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def screenshot(self):
        """PNG of what is shown."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def errors(self):
        """What the page has complained about."""
        found = []
        for event in self.said:
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error":
                    found.append(entry["text"])
            if event.get("method") == "Runtime.consoleAPICalled":
                call = event["params"]
                if call["type"] == "error":
                    found.append(" ".join(str(a.get("value")) for a in call["args"]))
        return found

    def requests(self):
        """Addresses that were asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.said
            if event.get("method") == "Network.requestWillBeSent"
        ]
