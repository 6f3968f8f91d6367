"""A headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver), without a package."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage window-size=1280,1100"
).split()
_PATIENCE = 60.0  # seconds: machines that run tests are busy


def why_not() -> str | None:
    """Why there is no browser; None if there is."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found" if missing else None


class Browser:
    """One window."""

    def __init__(self, driver: str, session: str) -> None:
        self._session = f"{driver}/session/{session}"

    def open(self, url: str) -> None:
        """Load a page."""
        _call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """The value that JavaScript returns."""
        return _call("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, is_wanted: Callable[[Any], object] = bool) -> Any:
        """Wait until a script's value is as wanted, and return it."""
        end = time.monotonic() + _PATIENCE
        while not is_wanted(value := self.run(script)):
            assert time.monotonic() < end, f"{script} is still {str(value)[:200]}"
            time.sleep(0.05)
        return value

    def press(self, selector: str, keys: str) -> None:
        """Type into an element; an arrow key moves a slider by a step."""
        element = _call("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        (identity,) = element.values()
        _call("POST", f"{self._session}/element/{identity}/value", {"text": keys})

    def click(self, selector: str) -> None:
        """Click an element."""
        element = _call("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        (identity,) = element.values()
        _call("POST", f"{self._session}/element/{identity}/click", {})

    def requests(self) -> list[str]:
        """Every URL requested since the last call, including blocked ones."""
        entries = _call("POST", f"{self._session}/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        wanted = [x["params"] for x in events if x["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in wanted]

    def picture(self, path: Path) -> None:
        """Save what the window shows."""
        path.write_bytes(base64.b64decode(_call("GET", f"{self._session}/screenshot")))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a separate profile."""
    command, quiet = ["chromedriver", "--port=0"], subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        assert process.stdout is not None
        try:
            lines = (line for line in process.stdout if "started successfully" in line)
            driver = f"http://127.0.0.1:{next(lines).split()[-1].rstrip('.')}"
            options = {
                "goog:chromeOptions": {
                    "binary": shutil.which("chromium"),
                    "args": [f"--{flag}" for flag in (*_FLAGS, f"user-data-dir={profile}")],
                },
                "goog:loggingPrefs": {"performance": "ALL"},
            }
            made = _call("POST", f"{driver}/session", {"capabilities": {"alwaysMatch": options}})
            try:
                yield Browser(driver, made["sessionId"])
            finally:
                _call("DELETE", f"{driver}/session/{made['sessionId']}")
        finally:
            process.terminate()


def _call(method: str, url: str, content: object = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with opener.open(request, timeout=2 * _PATIENCE) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {json.load(error)['value']['message'].splitlines()[0]}") from error
