"""docs/formats.md is what the declarations say."""

from pathlib import Path

from qschema.format_table import markdown


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "formats.md"

    assert page.read_text() == markdown(), "run `make generate`"
