"""The HTML page in a real browser: it works, fits and can be read.

QVALIDATE_CHROMIUM=/usr/bin/chromium pytest -m browser
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_samples as samples
from chromium import Page, chromium

from qvalidate.reports import html

CHROMIUM = os.environ.get("QVALIDATE_CHROMIUM")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs $QVALIDATE_CHROMIUM"),
]

# contrast by WCAG 2.2: of every text that is shown, with what is painted below it
CONTRAST = """
(() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const below = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) { return color; }
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const style = getComputedStyle(element);
    if (!own || !element.checkVisibility() || element.classList.contains("hidden")) { continue; }
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(numbers(ink)), light(below(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) { found.push(`${element.className || element.tagName} ${ratio.toFixed(2)}`); }
  }
  return [...new Set(found)];
})()
"""
SHOWN = "[...document.querySelectorAll('#groups tbody tr')].filter(row => row.checkVisibility())"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with chromium(CHROMIUM, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = html.render(samples.rich(), measured=samples.measured(), support_matrix=samples.MATRIX)
    return samples.write(tmp_path_factory.mktemp("page"), "report.html", text)


def type_into_filter(page: Page, text: str) -> None:
    page.run(
        "(() => { const field = document.getElementById('filter-text'); field.value = "
        f"{text!r}; field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_loads_without_a_complaint_or_a_request(browser: Page, file: Path, dark: bool) -> None:
    browser.open(file, dark=dark)

    assert browser.complaints == []
    assert browser.requests == [file.as_uri()]


def test_policy_stops_what_is_not_the_pages_own(browser: Page, file: Path, tmp_path: Path) -> None:
    injected = "<script>document.title = 'owned'</script><p style='color:red'>x</p></body>"
    text = file.read_text(encoding="utf-8").replace("</body>", injected)
    browser.open(samples.write(tmp_path, "injected.html", text))

    assert browser.run("document.title") != "owned"
    assert len(browser.complaints) == 2


def test_sections_are_there(browser: Page, file: Path) -> None:
    browser.open(file)
    shown = (
        "[...document.querySelectorAll('section')].filter(s => s.checkVisibility()).map(s => s.id)"
    )

    assert browser.run(shown) == [
        "verdicts", "comparison", "findings", "errors", "scales", "support", "about",
    ]  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_its_window(
    browser: Page, file: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(file, width=width, dark=dark)
    picture = browser.screenshot()

    assert browser.run("document.documentElement.scrollWidth") == width
    # of a PNG: bytes 16 to 24 are width and height
    assert struct.unpack(">II", picture[16:24])[0] == width
    # an empty page of this size is a few KB
    assert len(picture) > 100_000


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_contrast(browser: Page, file: Path, dark: bool) -> None:
    browser.open(file, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")

    assert browser.run(CONTRAST) == []


def test_every_step_of_colour_has_contrast(browser: Page, file: Path) -> None:
    """The legend has all of them."""
    browser.open(file)

    assert browser.run("document.querySelectorAll('.legend li').length") == 9


def test_filter_finds_words_and_counts(browser: Page, file: Path) -> None:
    browser.open(file)
    assert browser.run("document.getElementById('filter-count').textContent") == "29 of 29 findings"

    type_into_filter(browser, "layers.0 EXPERTS.3")

    assert browser.run(f"{SHOWN}.length") == 1
    assert browser.run("document.getElementById('filter-count').textContent") == "1 of 29 findings"
    groups = (
        "[...document.querySelectorAll('#groups > details')].filter(d => !d.hidden).map(d => d.id)"
    )
    assert browser.run(groups) == ["rule-missing-tensor"]


def test_filter_opens_what_it_finds_and_closes_it_again(browser: Page, file: Path) -> None:
    browser.open(file)
    state = "document.getElementById('rule-weight-nonfinite').open"
    assert browser.run(state) is False

    type_into_filter(browser, "weight-nonfinite")
    assert browser.run(state) is True

    type_into_filter(browser, "")
    assert browser.run(state) is False


def test_severities_can_be_left_out(browser: Page, file: Path) -> None:
    browser.open(file)
    browser.run("document.querySelector('input[value=error]').click()")

    assert browser.run("document.getElementById('filter-count').textContent") == "2 of 29 findings"


def test_all_groups_open_and_close(browser: Page, file: Path) -> None:
    browser.open(file)
    count = "document.querySelectorAll('#groups > details[open]').length"

    browser.run("document.querySelector('button[data-open=yes]').click()")
    assert browser.run(count) == 6
    browser.run("document.querySelector('button[data-open=no]').click()")
    assert browser.run(count) == 0


def test_a_cell_that_is_touched_is_told_in_words(browser: Page, file: Path) -> None:
    browser.open(file)
    browser.run("document.querySelector('td.h8').click()")

    text = browser.run("document.getElementById('readout').textContent")
    assert text.startswith("model.layers.3.self_attn.q_proj: 701 %, its format explains up to 25 %")


def test_page_needs_no_script(browser: Page, file: Path) -> None:
    """Without one there is no filter, and everything else."""
    browser.open(file, scripts=False)

    assert browser.run("document.getElementById('filter').checkVisibility()") is False
    assert browser.run("document.querySelectorAll('section').length") == 7
    assert browser.run(f"{SHOWN}.length") == 27


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_page_fits_with_everything_open(browser: Page, file: Path, width: int) -> None:
    browser.open(file, width=width)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")

    assert browser.run("document.documentElement.scrollWidth") == width


def test_paper_shows_every_finding_and_no_controls(browser: Page, file: Path) -> None:
    browser.open(file)
    browser.print_media()

    assert browser.run("document.getElementById('filter').checkVisibility()") is False
    assert browser.run("document.querySelector('nav').checkVisibility()") is False
    closed = (
        "document.querySelector('#rule-weight-nonfinite tbody tr').getBoundingClientRect().height"
    )
    assert browser.run(closed) > 0
