"""The command line: one short function per verb; heavy imports happen inside, so that `--help` is instant."""

import os
import sys
from typing import NoReturn

import typer

from safepatch.errors import SafepatchError, printable

app = typer.Typer(
    help="Train, merge, apply and measure safety patches for text-to-image models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

LESS = "take a smaller --dtype, size or batch; of train see --dry-run"


def say(*lines: str, err: bool = False) -> None:
    """Print lines that may quote what files say: whatever a terminal would obey in them is escaped."""
    typer.echo("\n".join(map(printable, lines)), err=err)


def main() -> None:
    """Run the command line; an error a user can act on is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns about torchvision, which is not needed
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # no bars in log files
    try:
        app()
    except SafepatchError as error:
        _end(str(error))
    except RuntimeError as error:
        if "out of memory" not in str(error):  # as torch says it, whatever the device
            raise
        _end(f"no memory is left ({str(error).splitlines()[0][:120]}); {LESS}")


def _end(message: str) -> NoReturn:
    say(f"error: {message}", err=True)
    sys.exit(2)


from safepatch.cli import (  # noqa: E402 -- each adds its verbs to `app`
    apply,  # noqa: F401
    artifact,  # noqa: F401
    detector,  # noqa: F401
    doctor,  # noqa: F401
    evaluate,  # noqa: F401
    exchange,  # noqa: F401
    guard,  # noqa: F401
    hosting,  # noqa: F401
    hub,  # noqa: F401
    studio,  # noqa: F401
    study,  # noqa: F401
    train,  # noqa: F401
)
