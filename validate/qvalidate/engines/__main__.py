"""One checkpoint, one engine, the outcome as JSON; needs no installation, only PYTHONPATH."""

import sys
from pathlib import Path

import click

from qvalidate.engines import ENGINES, EngineRequest, Thresholds, get
from qvalidate.engines.serve import ServeRequest, serve_check

_LIMITS = Thresholds()


@click.command()
@click.argument("engine", type=click.Choice(ENGINES))
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--reference", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--level", type=click.Choice(["load", "generate", "compare"]))
@click.option("--python", metavar="PATH", help="The engine's interpreter.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds, for each start.")
@click.option("--kernels", type=click.Choice(["native", "reference"]), default="native")
@click.option("--serve", is_flag=True, help="Start the engine's OpenAI server, and ask it.")
@click.option("--max-kl", default=_LIMITS.max_kl, show_default=True)
@click.option("--min-top1", default=_LIMITS.min_top1, show_default=True)
@click.option("--max-relative-error", default=_LIMITS.max_relative_error, show_default=True)
def main(
    engine: str,
    checkpoint: Path,
    reference: Path | None,
    level: str | None,
    python: str | None,
    timeout: float,
    kernels: str,
    serve: bool,
    max_kl: float,
    min_top1: float,
    max_relative_error: float,
) -> None:
    """Load CHECKPOINT in ENGINE, and with --reference compare it with its source, or serve it.

    Exit status: 0 passed, 1 not passed, 2 misuse.

    Example: python -m qvalidate.engines vllm out --reference in --python vllm-env/bin/python
    """
    if serve:
        served = serve_check(
            ServeRequest(engine=engine, checkpoint=checkpoint, python=python, timeout_s=timeout)
        )
        click.echo(served.model_dump_json(indent=2))
        sys.exit(0 if served.verdict == "passed" else 1)
    fields: dict[str, object] = {
        "checkpoint": checkpoint,
        "reference": reference,
        "python": python,
        "level": level or ("compare" if reference else "generate"),
        "timeout_s": timeout,
        "kernels": kernels,
        "thresholds": Thresholds(
            max_kl=max_kl, min_top1=min_top1, max_relative_error=max_relative_error
        ),
    }
    request = EngineRequest.model_validate(fields)
    outcome = get(engine).run(request)
    click.echo(outcome.model_dump_json(indent=2))
    sys.exit(0 if outcome.verdict == "passed" else 1)


if __name__ == "__main__":
    main()
