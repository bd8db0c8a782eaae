"""A headless Chromium for tests. Without one, they are skipped."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
ABORTED = "net::ERR_ABORTED"
POISON = "<img src=x onerror=window.poisoned=1><script>window.poisoned=1</script>"
"""Runs in a page that takes it for HTML."""


def chromium() -> str:
    """The path of the browser; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


class Tab:
    """A page, and what went wrong on it: console errors, exceptions, failed requests, requests beyond this machine.

    Requests that Chromium calls aborted have not failed: leaving a page breaks off what it still fetches, and a stream
    that a script has read to its end counts as aborted, too.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.on("console", lambda m: self.wrong.append(f"{m.type}: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(f"exception: {error}"))
        page.on("requestfailed", lambda r: r.failure == ABORTED or self.wrong.append(f"failed: {r.url}: {r.failure}"))
        page.on("request", lambda r: self.wrong.append(f"external: {r.url}") if is_external(r.url) else None)

    def until(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression of JavaScript holds. Playwright's own way is to have the page evaluate a string,
        which a page that forbids scripts but its own refuses."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"after {seconds} s there is not: {condition}"
            self.page.wait_for_timeout(50)


def is_external(url: str) -> bool:
    return url.startswith("http") and not url.startswith("http://127.0.0.1")


@contextmanager
def launched(profile: Path) -> Iterator[Any]:
    """A browser, for tabs one after another."""
    executable = chromium()
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch_persistent_context(profile, executable_path=executable, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, *, width: int = 1280, height: int = 900) -> Iterator[Tab]:
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    yield Tab(page)
    page.close()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a Dash application that a thread of this process serves on loopback."""
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, app.server, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
