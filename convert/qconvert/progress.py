"""What a person sees while a conversion runs: a bar on a terminal, nothing anywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qconvert.pipeline import Progress


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield what to call with the progress; draws bytes, rate and time left on stderr."""
    if quiet or not sys.stderr.isatty():
        yield lambda progress: None
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
