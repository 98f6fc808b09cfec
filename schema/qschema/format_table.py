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
    yield '"documented" stands for what an engine\'s documents or code say, without a run of ours.'
    yield ""
    yield "| Format | `quant_algo` on disk | Bits | What it is | Calibration | Read by |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for declared in formats().values():
        bits = declared.bits(rows=4096, columns=4096) / 4096**2
        calibration = "static input scale" if declared.specs("input") else "none"
        readers = ", ".join(declared.readers) or "none that we know"
        yield (
            f"| {declared.name} | `{declared.spelling}` | {bits:.3f} | {declared.title} | "
            f"{calibration} | {readers} |"
        )
    yield ""
    yield "A checkpoint of several formats has `quant_algo` MIXED_PRECISION and names each module's"
    yield "in `quantized_layers`. Common to all: amax is the largest finite magnitude, exact; tiny"
    yield "is the smallest normal number of the source dtype; a quotient is an f32 division; e4m3"
    yield "and e2m1 round once, to nearest even, and saturate."
    for declared in formats().values():
        yield ""
        yield from _section(declared)


def _section(declared: Format) -> Iterator[str]:
    yield f"## {declared.name}"
    yield ""
    if declared.read_only:
        yield f"Read, never written: {declared.read_only}."
        yield ""
    yield "| Tensor | dtype | Shape | Meaning | Shared by |"
    yield "| --- | --- | --- | --- | --- |"
    for spec in declared.tensors:
        shape = ", ".join(spec.shape)
        shared = _SHARED[spec.shared] if spec.role in ("global", "input") else ""
        yield f"| `{spec.suffix}` | {spec.dtype} | [{shape}] | {spec.meaning} | {shared} |"
    yield ""
    yield f"- Formula: {declared.formula}."
    yield f"- Made from {', '.join(declared.source_dtypes)}; needs {_needs(declared)}."
    yield (
        f"- ||w - dequantized|| / ||w|| is at most {declared.error_bound}, and half a step of the "
        "smallest codes per element."
    )
    if declared.stackable:
        yield "- Experts stacked in one tensor [E, K, N] stay stacked: codes and scales are"
        yield "  [E, ...] with the Linear's dimensions the other way around, one scale for all."
    yield f"- Also accepted as: {', '.join((declared.spelling, *declared.aliases))}, in any case."
    yield f"- Source: {declared.source}."
    if declared.departures:
        yield "- Departures from ModelOpt 0.47's CPU bytes:"
        for departure in declared.departures:
            yield f"    - {departure}."
    else:
        yield "- Departures from ModelOpt 0.47's CPU bytes: none known."


_SHARED = {
    "own": "nobody",
    "experts": "gate and up of an expert",
    "siblings": "q/k/v, gate/up, q_a/kv_a; of experts gate and up",
}


def _needs(declared: Format) -> str:
    needs = [
        f"{axis} in multiples of {multiple}"
        for axis, multiple in (("N", declared.multiple_of_n), ("K", declared.multiple_of_k))
        if multiple > 1
    ]
    return " and ".join(needs) or "no particular shape"


if __name__ == "__main__":
    print(markdown(), end="")
