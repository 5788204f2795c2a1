"""The command line: ``medsam-lora COMMAND``.

Exit codes: 0 done; 1 some cases failed, the others are done; 2 unusable input; 70 a fault of the program itself;
130 interrupted. An error is one line on standard error, a traceback with ``--debug``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medsam_lora import __version__
from medsam_lora.commands import (
    about,
    adapting,
    comparing,
    data,
    diagnosing,
    exporting,
    learning,
    pretraining,
    reporting,
    whole,
)
from medsam_lora.errors import MedsamLoraError
from medsam_lora.messages import say_messages
from medsam_lora.progress import SILENCE

UNUSABLE_INPUT = 2
PROGRAM_FAULT = 70  # EX_SOFTWARE of sysexits.h; 1 would claim that the other cases are done
INTERRUPTED = 130

GLOBAL_FLAGS = ("--debug", "--quiet", "-q")


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        # Versions of typer differ in what an interrupt exits with.
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo(str(stop) or "interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Adapt the Segment Anything Model to brain-tumour MRI, and find out whether it helped.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help costs more time than all else that --help does
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("info")(about.info)
app.command("methods")(about.methods)
app.add_typer(data.manifest_app, name="manifest")
app.command("verify")(data.verify)
app.command("prepare")(data.prepare)
app.command("train")(learning.train)
app.command("predict")(learning.predict)
app.command("evaluate")(learning.evaluate)
app.command("compare")(comparing.compare)
app.command("check-submission")(learning.check_submission)
app.command("report")(reporting.report)
app.command("run")(whole.run)
app.command("sweep")(whole.sweep)
app.command("demo")(whole.demo)
app.command("doctor")(diagnosing.doctor)
app.command("pretrain")(pretraining.pretrain)
app.add_typer(adapting.adapter_app, name="adapter")
app.command("export")(exporting.export)
app.add_typer(about.weights_app, name="weights")
app.command("config")(about.show_config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of ``sys.argv[1:]``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # People write --debug behind the sub-command, where it helps; typer takes it only before.
    flags = [word for word in given if word in GLOBAL_FLAGS]
    words = flags + [word for word in given if word not in GLOBAL_FLAGS]
    try:
        app(args=words, prog_name="medsam-lora")
    except (MedsamLoraError, OSError) as error:
        _stop(f"error: {error}", UNUSABLE_INPUT, "--debug" in flags)
    except Exception as error:
        hint = "run it again with --debug to see where, and please report it"
        _stop(f"internal error: {type(error).__name__}: {error} ({hint})", PROGRAM_FAULT, "--debug" in flags)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medsam-lora {__version__}")
        raise typer.Exit(0)


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only, no progress.")] = False,
) -> None:
    if quiet:
        os.environ[SILENCE] = "1"
    say_messages(logging.WARNING if quiet else logging.INFO)


def _stop(line: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    # One line, whatever the message holds: scripts read the last line of standard error.
    typer.echo(" ".join(line.split()), err=True)
    sys.exit(code)
