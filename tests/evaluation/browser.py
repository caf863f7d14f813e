"""What a browser makes of a page: headless Chromium opens it, a probe inside looks around."""

from __future__ import annotations

import html
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.packages import need_command

PROBE = """<script>
addEventListener("load", () => {
  const seen = {
    images: [...document.querySelectorAll("figure img")].map(i => i.naturalWidth),
    drawings: [...document.querySelectorAll("section > .figures svg")].filter(s => s.clientHeight > 40).length,
    folded_drawings: document.querySelectorAll("details figure svg").length,
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("figure svg text") ?? document.body).fill,
  };
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""
# a window cannot be narrower than 500 pixels, a frame can
FRAME = """<body style="margin:0"><iframe src="{page}" width="{width}" height="900" style="border:0"></iframe>
<script>addEventListener("message", m => {{ document.body.dataset.probe = m.data; }});</script>"""
SCHEMES = {"dark": 0, "light": 1}


@dataclass(frozen=True)
class Sight:
    """What a browser said of a page: its console, and what the probe found."""

    console: list[str]
    probe: dict[str, Any]


def open_page(page: Path, scratch: Path, width: int, scheme: str = "light") -> Sight:
    """Open a page in a window of a width, in a copy that carries the probe; no network is to be had."""
    command = need_command("chromium", "chromium")
    copy = scratch / f"probed-{width}-{scheme}.html"
    copy.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    frame = scratch / f"frame-{width}-{scheme}.html"
    frame.write_text(FRAME.format(page=copy.name, width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--hide-scrollbars"]
    options += [f"--user-data-dir={scratch / 'profile'}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    options += ["--window-size=1600,1000", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run([command, *options], capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, f"the page did not load: {done.stderr[-2000:]}"
    return Sight(console, json.loads(html.unescape(found[1])))
