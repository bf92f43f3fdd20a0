"""Headless Chromium with real clicks, driven over a pipe by its DevTools protocol: nothing but the standard library."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-extensions",
    "--remote-debugging-pipe", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--window-size=1280,1600",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
        "PageUp": 33, "PageDown": 34, "Home": 36}  # fmt: skip


def chromium():
    """The browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One browser with one page. `requests` are the addresses that it asked for, `problems` errors of the page."""

    def __init__(self, folder, *flags):
        take, self._give = os.pipe()
        self._take, give = os.pipe()
        command = [chromium(), *FLAGS, *flags, f"--user-data-dir={folder}", "about:blank"]

        # The protocol takes descriptors 3 and 4.
        joined = ["bash", "-c", f'exec "$@" 3<&{take} 4>&{give}', "-", *command]
        self._process = subprocess.Popen(joined, pass_fds=(take, give), stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(take), os.close(give)
        self._numbers, self._left, self._session = itertools.count(1), b"", None
        self.requests, self.problems = [], []
        (page,) = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Network", "Page", "Runtime", "DOM"):
            self._call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self._give), os.close(self._take)
        self._process.terminate()
        self._process.wait(20)

    def _call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._give, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            while b"\0" not in self._left:
                if not select.select([self._take], [], [], 120)[0]:
                    raise TimeoutError(method)
                self._left += os.read(self._take, 2**20)
            text, _, self._left = self._left.partition(b"\0")
            found = json.loads(text)
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found)
        raise TimeoutError(method)

    def _note(self, event):
        name, about = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.problems.append(about["exceptionDetails"]["text"] + str(about["exceptionDetails"].get("exception")))

    # ---- what a user does --------------------------------------------------------------------------------------------

    def go(self, address):
        self._call("Page.navigate", url=address)
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def run(self, script):
        """The value of a script, awaited."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition, seconds=90):
        """Waits for a script to be true; returns its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := self.run(condition):
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {condition}; page: {self.text('#status')} {self.text('#error')}")

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def box(self, selector):
        """x, y, width, height of an element that is scrolled into view."""
        return self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.x, b.y, b.width, b.height]; })()"
        )

    def click(self, selector, across=0.5, down=0.5):
        """A click with the mouse at a share of an element's width and height."""
        x, y = self.hover(selector, across, down)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector, across=0.5, down=0.5):
        left, top, wide, high = self.box(selector)
        x, y = left + across * wide, top + down * high
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def type(self, text):
        self._call("Input.insertText", text=text)

    def press(self, key, shift=False):
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        more = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", **about, **more)
        self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose_files(self, selector, *paths):
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def picture(self, path, whole=True):
        """A screenshot as PNG."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
