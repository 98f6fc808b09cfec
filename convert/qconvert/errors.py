"""What goes wrong in a conversion, as one sentence for the person who started it."""

from pathlib import Path


class ConvertError(ValueError):
    """A conversion that can't be done as asked: what was found, what was expected, what to do.

    `kept`: where what was done until then waits for the next run, if anything was.
    """

    kept: Path | None = None


def some(names: list[str]) -> str:
    """Return the first five names and the count of all, for a message."""
    shown = ", ".join(names[:5])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 5 else shown


def human(nbytes: float) -> str:
    """Return a byte count for a person: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
