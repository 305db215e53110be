"""The HTML report in a real browser: it shows, fetches nothing, logs nothing, and no text is cut at 400 or 1400 px."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from fixtures import make
from sdops.verbs.diff import diff

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]

# Looks at the report from outside: what it loaded, how wide it is, which texts stick out of their boxes.
_PROBE = """<!doctype html><body><iframe src="report.html" style="width:%dpx;height:2000px;border:0"></iframe><script>
onload = () => {
  const inner = document.querySelector("iframe").contentWindow, page = inner.document;
  const cut = [...page.querySelectorAll("h1,h2,p,dt,dd,figcaption")].filter(e => e.scrollWidth > e.clientWidth + 1);
  const heat = [...page.querySelectorAll("td.heat")];
  const bars = [...page.querySelectorAll("svg rect")].map(e => e.getBoundingClientRect().height);
  document.body.innerHTML = "<pre>" + JSON.stringify({
    title: page.title, cut: cut.map(e => e.textContent),
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    resources: inner.performance.getEntriesByType("resource").map(e => e.name),
    cells: heat.length, colours: new Set(heat.map(e => inner.getComputedStyle(e).backgroundColor)).size,
    size: Math.min(...heat.map(e => parseFloat(inner.getComputedStyle(e).fontSize))), highest: Math.max(...bars),
    ink: inner.getComputedStyle(page.body).color, paper: inner.getComputedStyle(page.body).backgroundColor,
  }) + "</pre>";
};
</script></body>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    make.small("sdxl", folder / "a.safetensors")
    make.small("sdxl", folder / "b.safetensors", tuned=1)
    diff(folder / "a.safetensors", folder / "b.safetensors", html=folder / "report.html")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_shows(folder, width, scheme):
    probe = folder / f"probe-{width}.html"
    probe.write_text(_PROBE % width)
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", "--dump-dom", probe.as_uri(),
        ],
        check=True, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    found = json.loads(unescape(re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)[1]))
    assert "CONSOLE" not in done.stderr
    assert found["title"] == "a.safetensors -> b.safetensors"
    assert found["resources"] == []
    assert found["cut"] == []
    assert found["overflow"] <= 0
    assert found["cells"] > 50
    assert found["colours"] > 5
    assert found["size"] >= 11
    assert found["highest"] > 100
    assert contrast(found["ink"], found["paper"]) > 7


def contrast(*colours: str) -> float:
    """As WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted(map(luminance, colours))
    return (bright + 0.05) / (dark + 0.05)
