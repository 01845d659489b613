"""A headless Chromium for tests that look at a page as people do: its text, its boxes, a picture of it.

Speaks the DevTools protocol over tornado, which Dask brings. Loopback only; the browser's own traffic is switched off.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_TIMEOUT_S = 20.0
SWITCHES = [
    "--headless",
    "--no-sandbox",  # tests may run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # 64 MiB in most containers: too small for a tab
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]

# Bokeh draws into shadow roots, which neither innerText nor querySelector sees into.
WALK = """
(() => {
  const all = []
  const walk = (node) => {
    if (node.shadowRoot) walk(node.shadowRoot)
    for (const child of node.childNodes) { all.push(child); walk(child) }
  }
  walk(document)
  window.deepText = all.filter((n) => n.nodeType == 3 && !["STYLE", "SCRIPT"].includes(n.parentNode.nodeName))
    .map((n) => n.textContent.trim()).filter((t) => t).join(" ")
  window.deepAll = (selector) => all.filter((n) => n.nodeType == 1 && n.matches(selector))
})()
"""


class Page:
    """One open tab."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self._socket, self._id = socket, 0
        self.errors: list[str] = []  # what the page has written to its console as an error, or thrown

    async def send(self, method: str, **params: Any) -> Any:
        """One DevTools command and its answer; events in between are passed over."""
        self._id += 1
        await self._socket.write_message(json.dumps({"id": self._id, "method": method, "params": params}))
        while True:
            raw = await asyncio.wait_for(self._socket.read_message(), 20)
            assert raw is not None, "the browser is gone"
            answer = json.loads(raw)
            self._listen(answer)
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]

    def _listen(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(said["exceptionDetails"].get("exception", {}).get("description")))
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(each.get("value")) for each in said["args"]))

    async def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        size = {"width": width, "height": height}
        await self.send("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    async def settled(self, expression: str, timeout_s: float = 20.0) -> None:
        """Wait until an expression has had the same value for half a second."""
        loop = asyncio.get_running_loop()
        deadline, since, before = loop.time() + timeout_s, loop.time(), None
        while loop.time() - since < 0.5:
            if (value := await self.value(expression)) != before:
                before, since = value, loop.time()
            assert loop.time() < deadline, f"{expression} does not come to rest"
            await asyncio.sleep(0.1)

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression; may use `deepText` and `deepAll(selector)`."""
        result = await self.send("Runtime.evaluate", expression=f"{WALK};({expression})", returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def text(self) -> str:
        """All text on the page, in the order of the document."""
        return str(await self.value("deepText"))

    async def wait_for(self, words: str, timeout_s: float = 20.0) -> str:
        """The page's text once it has these words."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while words not in (text := await self.text()):
            assert asyncio.get_running_loop().time() < deadline, f"no {words!r} in: {text}"
            await asyncio.sleep(0.1)
        return text

    async def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        picture = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.asynccontextmanager
async def browse(url: str, folder: Path, *, width: int = 1280, height: int = 800) -> AsyncIterator[Page]:
    """Open a URL in a browser of its own, with a fresh profile below `folder`; the browser ends with the block."""
    assert CHROMIUM is not None
    profile = folder / "chromium"
    process = subprocess.Popen(
        [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(START_TIMEOUT_S):
            while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
                assert process.poll() is None, f"{CHROMIUM} ended with {process.returncode}"
                await asyncio.sleep(0.05)
        port, path = port_file.read_text().splitlines()[:2]
        root = Page(await websocket_connect(f"ws://127.0.0.1:{port}{path}"))
        target = (await root.send("Target.createTarget", url="about:blank"))["targetId"]
        socket = await websocket_connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_message_size=2**26)
        page = Page(socket)
        await page.resize(width, height)
        await page.send("Runtime.enable")
        await page.send("Page.navigate", url=url)
        yield page
        with contextlib.suppress(Exception):
            await root.send("Browser.close")
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        process.kill()
        process.wait()
