"""The report page, opened in a browser: the plot is there, its script runs, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from made_reports import COUNT, FIRST_BAD, NOT_FINITE, OPEN, drifting, evidence, report

from normsurgery.reporting.html import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
    "--virtual-time-budget=5000", "--window-size=1200,900",
)  # fmt: skip
MARK = re.compile(r'<g class="mark ([^"]*)"')

# Moves over the plot as a reader does and leaves behind what the reader then sees.
HOVER = """<script>
const plot = document.getElementById("error-plot"), box = plot.getBoundingClientRect();
const unit = box.width / plot.viewBox.baseVal.width;
const mark = plot.querySelector('.mark[data-i="40"]');
const where = {clientX: box.left + mark.dataset.x * unit, clientY: box.top + mark.dataset.y * unit};
plot.dispatchEvent(new PointerEvent("pointermove", where));
document.body.dataset.hovered = document.getElementById("told").textContent;
plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
document.body.dataset.next = document.getElementById("told").textContent;
plot.dispatchEvent(new PointerEvent("pointerleave"));
document.body.dataset.left = document.getElementById("told").style.visibility;
</script></body>"""


class Opened(NamedTuple):
    """dom: the page after its scripts ran. errors: what the browser's console said."""

    dom: str
    errors: list[str]


def opened(text: str, folder: Path) -> Opened:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium to open the page with")
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", file.as_uri()]
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def marks(dom: str) -> list[set[str]]:
    """The kinds of each mark of the plot, in graph order; those of the key are left out."""
    drawing = dom.partition('<svg id="error-plot"')[2].partition("</svg>")[0]
    return [set(match[1].split()) for match in MARK.finditer(drawing)]


def test_the_plot_is_found_and_no_script_fails(tmp_path: Path) -> None:
    seen = opened(page(report(bad=True)), tmp_path)
    assert seen.errors == []
    assert f'data-ready="{COUNT}"' in seen.dom  # set by the last line of the page's script
    kinds = marks(seen.dom)
    assert len(kinds) == COUNT
    assert [index for index, kind in enumerate(kinds) if "failed" in kind] == list(
        range(FIRST_BAD, COUNT)
    )
    assert [index for index, kind in enumerate(kinds) if "undecided" in kind] == [OPEN]
    assert sum("norm" in kind for kind in kinds) == COUNT // 8
    assert seen.dom.count('class="allowed"') == 1
    assert seen.dom.count('class="halo"') == seen.dom.count(">diverges here<") == 1


def test_a_reader_who_points_at_a_mark_is_told_what_it_is(tmp_path: Path) -> None:
    seen = opened(page(report(bad=True)).replace("</body>", HOVER), tmp_path)
    assert seen.errors == []
    told = {
        name: text.replace("\n", " ")
        for name, text in re.findall(r'data-(hovered|next|left)="([^"]*)"', seen.dom)
    }
    wanted = ["val_40", "MatMul", "failed", "allowed", "with what it inherited", "first operation"]
    wanted += ["module vit.layers.2.mlp.fc1", "modeling_vit.py:123", "against the source"]
    assert [words for words in wanted if words not in told["hovered"]] == []
    assert told["next"].startswith("val_41")
    assert told["left"] == "hidden"


def test_a_script_that_fails_is_seen(tmp_path: Path) -> None:
    """Planted faults: without them the tests above might look at nothing."""
    broken = page(report()).replace('"use strict";', "no_such_function();")
    seen = opened(broken, tmp_path)
    assert any("no_such_function is not defined" in line for line in seen.errors)
    assert "data-ready" not in seen.dom.partition("<head>")[0]


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """A report of somebody's model must not call home, nor look different without a network."""
    text = page(report(bad=True))
    assert not re.search(r"https?:|url\(|@import|<link|\ssrc=|\shref=", text)
    fetching = text.replace("</body>", '<img src="http://example.com/seen.png"></body>')
    assert any("Content Security Policy" in line for line in opened(fetching, tmp_path).errors)


def test_pages_without_a_graph_open_too(tmp_path: Path) -> None:
    for made in (evidence(bad=False, inner=(), coverage=None), drifting(), report(evidence=None)):
        seen = opened(page(made), tmp_path)
        assert seen.errors == []
        assert 'data-ready="0"' in seen.dom
        assert 'id="error-plot"' not in seen.dom


def test_what_is_not_finite_stands_above_everything_else() -> None:
    text = page(report(bad=True))
    heights = [float(y) for y in re.findall(r'data-y="([\d.]+)"', text)]
    assert heights[NOT_FINITE] == min(heights)
    assert heights.count(min(heights)) == 1
    exact = [index for index, y in enumerate(heights) if y == max(heights)]
    assert exact == [index for index in range(FIRST_BAD) if index % 8 == 7]
