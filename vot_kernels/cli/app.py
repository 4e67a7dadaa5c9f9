"""All commands, and the entry point."""

import sys
from typing import Annotated

import typer

from vot_kernels.cli.ablate import ablate
from vot_kernels.cli.ask import ask
from vot_kernels.cli.data import data_app
from vot_kernels.cli.demo import demo
from vot_kernels.cli.encode import encode
from vot_kernels.cli.evaluate import eval_app
from vot_kernels.cli.info import info
from vot_kernels.cli.manners import one_sentence_errors
from vot_kernels.cli.options import HELP, examples
from vot_kernels.cli.train import train_app
from vot_kernels.cli.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    help="Ask questions about videos, encode them, and train and evaluate the models that do it.",
)
app.command(
    epilog=examples(
        'vot ask clip.mp4 "Which digit does the red digit hit first?" --candidates "the blue digit|the white digit"',
        'vot ask clips/ more.gif "What happens?" --json',
        'vot ask clip.mp4 "What happens?" --picture tracks.png --trace trace.json -v',
        "vot ask --batch questions.jsonl --out answers.jsonl",
    )
)(ask)
app.command(
    epilog=examples(
        "vot encode a.mp4 b.png --out embeddings.safetensors",
        "vot encode clips/ --num-frames 8 --out embeddings.safetensors",
    )
)(encode)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")
app.command(
    epilog=examples(
        "vot ablate --out ablations.json --dry-run",
        "vot ablate --only attention --only experts --out ablations.json --plot ablations.svg",
    )
)(ablate)
app.command(epilog=examples("vot info", "vot info --model base --json"))(info)
app.command(epilog=examples("vot tune", "vot tune --seconds 30 --dtype float16"))(tune)
app.command(epilog=examples("vot demo --out pictures", "vot demo --web --port 8000"))(demo)


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


def main(commands: typer.Typer = app) -> None:
    """Entry point of the `vot` command, or of some of its commands alone."""
    with one_sentence_errors():
        status = commands(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
