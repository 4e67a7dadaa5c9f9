"""All commands, and the entry point."""

import sys
from typing import Annotated

import typer

from vot_kernels.cli.ask import ask
from vot_kernels.cli.demo import demo
from vot_kernels.cli.encode import encode
from vot_kernels.cli.evaluate import eval_app
from vot_kernels.cli.info import info
from vot_kernels.cli.manners import one_sentence_errors
from vot_kernels.cli.options import HELP
from vot_kernels.cli.train import train_app

app = typer.Typer(
    no_args_is_help=True,
    context_settings=HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask questions about videos, encode them, and train and evaluate the models that do it.",
)
app.command()(ask)
app.command()(encode)
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")
app.command()(info)
app.command()(demo)


def _print_version(asked: bool) -> None:
    if asked:
        from vot_kernels import __version__

        print(f"vot-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `vot` command."""
    with one_sentence_errors():
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
