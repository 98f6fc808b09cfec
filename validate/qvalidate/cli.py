"""The qvalidate command. `qvalidate CKPT ...` is `qvalidate check CKPT ...`."""

import click

from qvalidate import __version__, explain
from qvalidate.cli_check import check
from qvalidate.fix.cli import fix
from qvalidate.matrix.cli import matrix, support
from qvalidate.reports.schema import schema_text


class _CheckByDefault(click.Group):
    """A group that takes a first word which is no command for the checkpoint of `check`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {*self.commands, "-h", "--help", "--version"}
        if args and args[0] not in own:
            args = ["check", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            # 1 would say that something was found
            ctx.exit(130)


@click.group(
    cls=_CheckByDefault,
    context_settings={"help_option_names": ["-h", "--help"]},
    options_metavar="",
    subcommand_metavar="CKPT [OPTIONS] | COMMAND [ARGS]...",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Prove that a quantized checkpoint deploys. `qvalidate check --help` lists the options.

    \b
    $ qvalidate my-model-fp8 --engine vllm --reference my-model
    vllm: predicted: loads
    vllm: observed: passed, level compare [0.33.0, NVIDIA H200]
    """


main.add_command(check)
main.add_command(fix)
main.add_command(matrix)
main.add_command(support)


@main.command(name="explain")
@click.argument("rule_id", metavar="ID")
def explain_command(rule_id: str) -> None:
    """Say what the rule ID is about, whom it concerns and how it is known.

    \b
    $ qvalidate explain missing-tensor
    """
    try:
        click.echo(explain.explain(rule_id))
    except explain.UnknownRuleError as error:
        raise click.UsageError(str(error)) from None


@main.command()
@click.option("--markdown", is_flag=True, help="The whole catalogue as a page.")
def rules(markdown: bool) -> None:
    """List the rules.

    \b
    $ qvalidate rules --markdown > docs/rules.md
    """
    click.echo(explain.markdown() if markdown else "\n".join(explain.listing()), nl=not markdown)


@main.command()
def schema() -> None:
    """Print the JSON Schema of what `--format json` writes.

    \b
    $ qvalidate schema > qvalidate-result.schema.json
    """
    click.echo(schema_text(), nl=False)
