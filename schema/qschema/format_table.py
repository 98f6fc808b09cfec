"""docs/formats.md, from the declarations: `python -m qschema.format_table > docs/formats.md`."""

from collections.abc import Iterator

from qschema.formats import Format, formats


def markdown() -> str:
    """Return the page: one table row per format, then its tensors, formula, source, departures."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Formats"
    yield ""
    yield "Generated from `schema/qschema/formats/` by `make generate`; do not edit. A Linear has"
    yield "N rows (outputs) and K columns (inputs). Bits: of a 4096 x 4096 weight, scales included."
    yield ""
    yield "| Format | `quant_algo` on disk | Bits | What it is |"
    yield "| --- | --- | --- | --- |"
    for declared in formats().values():
        bits = declared.bits(rows=4096, columns=4096) / 4096**2
        yield f"| {declared.name} | `{declared.spelling}` | {bits:.3f} | {declared.title} |"
    for declared in formats().values():
        yield ""
        yield from _section(declared)


def _section(declared: Format) -> Iterator[str]:
    yield f"## {declared.name}"
    yield ""
    yield "| Tensor | dtype | Shape | Meaning |"
    yield "| --- | --- | --- | --- |"
    for spec in declared.tensors:
        shape = ", ".join(spec.shape)
        yield f"| `{spec.suffix}` | {spec.dtype} | [{shape}] | {spec.meaning} |"
    yield ""
    yield f"- Formula: {declared.formula}."
    yield f"- Made from {', '.join(declared.source_dtypes)}; needs {_needs(declared)}."
    yield f"- ||w - dequantized|| / ||w|| is at most {declared.error_bound}."
    yield f"- Also accepted as: {', '.join((declared.spelling, *declared.aliases))}, in any case."
    yield f"- Source: {declared.source}."
    if declared.departures:
        yield "- Departures from ModelOpt 0.47's CPU bytes:"
        for departure in declared.departures:
            yield f"    - {departure}."
    else:
        yield "- Departures from ModelOpt 0.47's CPU bytes: none known."


def _needs(declared: Format) -> str:
    needs = [
        f"{axis} in multiples of {multiple}"
        for axis, multiple in (("N", declared.multiple_of_n), ("K", declared.multiple_of_k))
        if multiple > 1
    ]
    return " and ".join(needs) or "no particular shape"


if __name__ == "__main__":
    print(markdown(), end="")
