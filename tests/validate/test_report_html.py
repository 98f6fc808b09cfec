"""The HTML page as text: what is on it, and that nothing in a checkpoint can write it."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import report_samples as samples
from report_samples import COMPARISON, engine, finding, outcome, result

from qvalidate.matrix import read
from qvalidate.measured import LayerError, Measured, ScaleHistogram
from qvalidate.reports import html
from qvalidate.reports.markup import Html, breakable, escaped, tag
from qvalidate.reports.support import rows
from qvalidate.result import EngineReport, Prediction, Result

VOID = {"meta", "input", "wbr", "rect", "line"}


class Tree(HTMLParser):
    """Every element with its attributes and its text; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        assert name in VOID, name
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def find(self, name: str, class_: str | None = None) -> Iterator[dict[str, str | None]]:
        for found, attributes in self.elements:
            classes = (attributes.get("class") or "").split()
            if found == name and (class_ is None or class_ in classes):
                yield attributes

    @property
    def text(self) -> str:
        shown = " ".join(data for name, data in self.texts if name not in ("style", "script"))
        return " ".join(shown.split())


def page(given: Result, **options: object) -> Tree:
    return Tree(html.render(given, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rich() -> Tree:
    return page(samples.rich(), measured=samples.measured(), support_matrix=samples.MATRIX)


def test_sections_are_in_the_order_of_importance(rich: Tree) -> None:
    ids = [attributes["id"] for attributes in rich.find("section")]

    assert ids == ["verdicts", "comparison", "findings", "errors", "scales", "support", "about"]
    assert [link["href"] for link in rich.find("a")][:7] == [f"#{key}" for key in ids]


def test_parts_without_content_are_left_out() -> None:
    ids = [attributes["id"] for attributes in page(result()).find("section")]

    assert ids == ["findings", "errors", "about"]


def test_headings_skip_no_level(rich: Tree) -> None:
    levels = [int(name[1]) for name, _ in rich.elements if re.fullmatch("h[1-6]", name)]

    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_ids_are_unique_and_links_lead_somewhere(rich: Tree) -> None:
    ids = [attributes["id"] for _, attributes in rich.elements if "id" in attributes]

    assert len(ids) == len(set(ids))
    for link in rich.find("a"):
        assert (link["href"] or "").removeprefix("#") in ids


def test_tables_have_heads_and_captions(rich: Tree) -> None:
    tables = len(list(rich.find("table")))

    assert tables == len(list(rich.find("caption"))) > 5
    assert all("scope" in attributes for attributes in rich.find("th"))


def test_nothing_comes_from_the_network(rich: Tree) -> None:
    text = html.render(samples.rich(), measured=samples.measured())

    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not any(
        {"src", "srcset", "style"} & attributes.keys() for _, attributes in rich.elements
    )


def test_policy_allows_the_own_style_and_script_alone(rich: Tree) -> None:
    (policy,) = (
        attributes["content"] or ""
        for attributes in rich.find("meta")
        if "http-equiv" in attributes
    )

    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (engine("loads"), "Would load vllm 0.32.0, 0.33.0"),
        (engine("refuses", by=("missing-tensor",)), "Would refuse"),
        (engine("loads-but-wrong"), "Would load, but wrong"),
        (engine("unknown"), "Unknown"),
        (engine("loads", outcome("passed", level="load", reached="load")), "Loads vllm"),
        (engine("loads", outcome("passed", comparison=COMPARISON)), "Loads and agrees vllm"),
        (
            engine("loads", outcome("failed", finding("engine-refused", "", ""), reached=None)),
            "Refuses vllm",
        ),
        (engine("loads", outcome("no-kernel", reached=None)), "Would load vllm"),
    ],
)
def test_card_says_what_was_seen_and_what_is_only_predicted(
    report: EngineReport, words: str
) -> None:
    assert words in page(result(engines=(report,))).text


@pytest.mark.parametrize(
    ("report", "step"),
    [
        (engine("loads"), "--engine vllm --reference SOURCE"),
        (engine("unknown"), "The rules can't tell. Ask the engine:"),
        (engine("refuses", by=("missing-tensor",)), "qvalidate explain missing-tensor"),
        (engine("loads", outcome("no-kernel", reached=None)), "on a machine whose GPU"),
        (engine("loads", outcome("not-run", reached=None)), "--python vllm=PATH"),
        (engine("loads", outcome("passed", level="load", reached="load")), "which proves little"),
        (engine("loads", outcome("passed", comparison=COMPARISON)), "Nothing is left to do"),
        (engine("refuses", outcome("passed", level="load", reached="load")), "rules were wrong"),
        (
            engine("loads", outcome("failed", finding("compare-kl", "", "3"))),
            "qvalidate explain compare-kl",
        ),
    ],
)
def test_card_ends_with_the_next_step(report: EngineReport, step: str) -> None:
    assert step in page(result(engines=(report,))).text


@pytest.mark.parametrize("verdict", ["loads", "refuses", "loads-but-wrong", "unknown"])
def test_verdict_is_told_by_a_word_and_a_colour(verdict: Prediction) -> None:
    (card,) = page(result(engines=(engine(verdict),))).find("article")

    assert card["class"] == f"card {verdict} predicted"


def test_commands_quote_the_path(rich: Tree) -> None:
    assert f"qvalidate '{samples.PATH}' --format json" in rich.text


def test_comparison_and_texts_are_shown(rich: Tree) -> None:
    assert "vllm 0.0921 0.881 81.2 % 0.159 5.44 5.21 1.044 186" in rich.text
    assert "<b>42</b> & more" in rich.text


def test_what_a_checkpoint_says_is_never_markup() -> None:
    nasty = '<img src=x onerror="alert(1)">\x1b[0m\x00\udcff'
    bad = finding("missing-tensor", nasty, nasty).model_copy(update={"file": nasty})
    run = outcome("failed", bad, message=nasty).model_copy(update={"texts": [nasty]})
    given = result(bad, engines=(engine("loads", run),))
    subject = given.checkpoint.model_copy(update={"path": f"/{nasty}", "model_type": nasty})
    found = page(
        given.model_copy(update={"checkpoint": subject}),
        measured=Measured(
            errors_from="reference",
            errors=[LayerError(module=f"{nasty}.1.{nasty}", relative_error=0.1)],
            scales=[
                ScaleHistogram(
                    kind=nasty, role=nasty, num_tensors=1, num_scales=1, first_log2=0, counts=[1]
                )
            ],
        ),
        support_matrix=[samples.Row(*[nasty] * 7)],
    )

    assert list(found.find("img")) == []
    assert '<img src=x onerror="alert(1)">\\x1b[0m\\x00\\udcff' in found.text


def test_page_is_utf8(tmp_path: Path) -> None:
    odd = finding("missing-tensor", "\udcff", "half a character")

    assert samples.write(tmp_path, "page.html", html.render(result(odd))).stat().st_size > 0


def test_many_findings_of_a_rule_are_cut() -> None:
    many = [finding("missing-tensor", f"a.{index}", "missing") for index in range(1000)]
    found = page(result(*many))

    assert sum("data-severity" in attributes for attributes in found.find("tr")) == 200
    assert "800 more are left out" in found.text


def test_errors_are_open_and_the_rest_is_closed(rich: Tree) -> None:
    groups = {
        attributes["id"]: "open" in attributes
        for attributes in rich.find("details")
        if "id" in attributes
    }

    assert groups["rule-missing-tensor"]
    assert not groups["rule-weight-nonfinite"]


def cell(found: Tree, module: str) -> dict[str, str | None]:
    (only,) = (
        attributes
        for attributes in found.find("td")
        if (attributes.get("title") or "").startswith(f"{module}:")
    )
    return only


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (LayerError(module="a.0.b", relative_error=0.0, expected=0.25), "h0"),
        (LayerError(module="a.0.b", relative_error=0.1, expected=0.25), "h3"),
        (LayerError(module="a.0.b", relative_error=0.25, expected=0.25), "h7"),
        (LayerError(module="a.0.b", relative_error=0.26, expected=0.25), "h8"),
        (LayerError(module="a.0.b", relative_error=0.0, expected=0.0), "h0"),
        (LayerError(module="a.0.b", relative_error=None, expected=0.25), "h8"),
        (LayerError(module="a.0.b", relative_error=0.0024), "h0"),
        (LayerError(module="a.0.b", relative_error=0.0025), "h1"),
        (LayerError(module="a.0.b", relative_error=0.1), "h6"),
        (LayerError(module="a.0.b", relative_error=9.0), "h7"),
    ],
)
def test_colour_is_the_share_of_what_is_explained(error: LayerError, step: str) -> None:
    found = page(result(), measured=Measured(errors_from="reference", errors=[error]))

    assert cell(found, "a.0.b")["class"] == step


def test_one_group_of_scales_that_is_wrong_shows_in_a_small_error() -> None:
    error = LayerError(module="a.0.b", relative_error=0.03, expected=0.25)
    given = result(finding("weight-error", "a.0.b.weight", "relative error 7 in rows 0 to 127"))
    found = page(given, measured=Measured(errors_from="reference", errors=[error]))

    assert cell(found, "a.0.b")["class"] == "h8"
    assert "beyond: 3.0" in found.text


@pytest.mark.parametrize("worst", [0.2, 7.0, None])
def test_of_many_experts_the_worst_is_shown(worst: float | None) -> None:
    found = [0.1, 0.01, worst, 0.15]
    errors = [
        LayerError(module=f"a.0.experts.{index}.up", relative_error=error, expected=0.25)
        for index, error in enumerate(found)
    ]
    shown = page(result(), measured=Measured(errors_from="reference", errors=errors))

    assert "; the worst of 4" in (cell(shown, "a.0.experts.2.up")["title"] or "")


def test_heat_map_has_a_row_for_each_layer_and_the_worst_expert_of_each(rich: Tree) -> None:
    rows = [attributes for attributes in rich.find("th") if attributes.get("scope") == "row"]
    titles = [attributes["title"] or "" for attributes in rich.find("td") if "title" in attributes]

    assert len(rows) > 12
    assert sum("; the worst of 8" in title for title in titles) == 12 * 3
    assert sum(title.startswith("model.layers.") for title in titles) == 12 * 7


def test_towers_have_a_heat_map_each() -> None:
    modules = ("model.layers.0.mlp.up_proj", "visual.blocks.0.attn.qkv", "lm_head")
    errors = [LayerError(module=module, relative_error=0.02) for module in modules]
    found = page(result(), measured=Measured(errors_from="conversion-report", errors=errors))
    labels = [attributes.get("aria-label") for attributes in found.find("div", "scroller")]

    assert labels == [
        "Errors of model.layers",
        "Errors of visual.blocks",
        "Errors outside the layers",
    ]
    assert "as the conversion reported them; nothing was compared here" in found.text


def test_without_errors_the_page_says_how_to_get_them() -> None:
    assert "--reference SOURCE --format html" in page(result()).text


def test_histogram_has_a_bar_for_each_power_that_occurs() -> None:
    histogram = ScaleHistogram(
        kind="a.*.b", role="scale", num_tensors=2, num_scales=31, first_log2=-3,
        counts=[1, 0, 30], num_zero=5, num_negative=0, num_nonfinite=1,
    )  # fmt: skip
    found = page(result(), measured=Measured(scales=[histogram]))

    assert len(list(found.find("rect"))) == 2
    assert "31 in 2 tensors, 2\u207b\u00b3 to 2\u2070, 5 zero, 1 NaN or Inf" in found.text


def test_histogram_of_nothing_but_zeros_has_no_bar() -> None:
    histogram = ScaleHistogram(
        kind="a", role="global", num_tensors=1, num_scales=1, first_log2=0, counts=[], num_zero=1
    )

    assert list(page(result(), measured=Measured(scales=[histogram])).find("rect")) == []


def test_matrix_begins_with_the_format_of_the_checkpoint(rich: Tree) -> None:
    assert "This checkpoint's format, NVFP4" in rich.text
    assert "vllm 0.33.0" in rich.text


@pytest.mark.parametrize("algo", ["fp8_pb_wo", "MIXED_PRECISION", None])
def test_format_is_found_by_any_spelling(algo: str | None) -> None:
    given = result()
    subject = given.checkpoint.model_copy(update={"algo": algo})
    found = page(given.model_copy(update={"checkpoint": subject}), support_matrix=samples.MATRIX)

    assert ("This checkpoint's format, FP8_PB_WO" in found.text) == (algo == "fp8_pb_wo")


def test_rows_of_the_committed_matrix_say_how_they_are_known() -> None:
    found = rows(read().cells)

    assert len(found) == len(read().cells) > 0
    assert all(row.source for row in found)


def test_the_same_result_gives_the_same_page() -> None:
    assert html.render(samples.rich()) == html.render(samples.rich())


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<", tag("b", "&"), None, class_="a", hidden=True, open=False) == (
        '<p class="a" hidden>&lt;<b>&amp;</b></p>'
    )
    assert tag("a", "x", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;">x</a>'
    assert escaped("\x1b\ud800") == "\\x1b\\ud800"
    assert breakable("a.b/<") == "a.<wbr>b/<wbr>&lt;"
    assert isinstance(tag("p"), Html)
