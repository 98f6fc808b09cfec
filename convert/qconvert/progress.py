"""What a person sees while a conversion runs: a bar on a terminal, lines in a log if asked."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import click

from qconvert.errors import human
from qconvert.pipeline import Progress

# seconds between two lines of a log
_PAUSE = 30.0


@contextmanager
def progress_bar(*, verbose: bool, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield what to call with the progress; shows bytes, rate and time left on stderr."""
    if quiet or not (verbose or sys.stderr.isatty()):
        yield lambda progress: None
        return
    if not sys.stderr.isatty():
        yield progress_lines(pause=_PAUSE)
        return
    # rich takes a tenth of a second to import: only where somebody looks
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda progress: bar.update(task, completed=sum(progress.done), total=progress.total)


def progress_lines(
    *, pause: float, clock: Callable[[], float] = monotonic
) -> Callable[[Progress], None]:
    """Return what prints a line on stderr when it is called `pause` seconds after the last one."""
    started = last = clock()

    def watch(progress: Progress) -> None:
        nonlocal last
        now = clock()
        if now - last < pause:
            return
        last = now
        done = sum(progress.done)
        rate = done / (now - started)
        left = f", {(progress.total - done) / rate:.0f} s left" if rate else ""
        click.echo(
            f"converting: {human(done)} of {human(progress.total)}, {human(rate)}/s{left}", err=True
        )

    return watch
