"""The command `limaml`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version

from cyclopts import App, CycloptsError
from rich.logging import RichHandler

from limaml.cli.check_served import check_served_command
from limaml.cli.compare import compare_command
from limaml.cli.console import errors
from limaml.cli.data import data_app
from limaml.cli.dead_letters import dead_letters_app
from limaml.cli.demo import demo_command
from limaml.cli.embed import embed_command
from limaml.cli.export import export_command
from limaml.cli.log import log_app
from limaml.cli.plan import plan_command
from limaml.cli.recommend import recommend_command
from limaml.cli.refresh import refresh_command
from limaml.cli.replay import replay_command
from limaml.cli.rollout import rollout_command
from limaml.cli.score import score_command
from limaml.cli.serve import serve_command
from limaml.cli.store import store_app
from limaml.cli.stream import stream_command
from limaml.cli.train import train_command
from limaml.cli.tune import tune_command
from limaml.cli.windows import windows_app
from limaml.errors import LimamlError

__all__ = ["app", "main"]


def _version() -> str:
    try:
        return version("limaml")
    except PackageNotFoundError:
        return "not installed"


app = App(
    name="limaml",
    version=_version,
    help="""Personalise any deep PyTorch recommender for each member by meta-learning.

A first look at your own table needs no config:

`limaml compare ratings.parquet --task user_id --row item_id --time timestamp --label "rating >= 4" --out runs/look`

Then: train → embed → score or recommend → refresh. `limaml demo` shows it all on MovieLens-100K.
`--debug` behind any command shows the traceback of an error.""",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
app.command(data_app)
app.command(compare_command, name="compare")
app.command(replay_command, name="replay")
app.command(tune_command, name="tune")
app.command(train_command, name="train")
app.command(embed_command, name="embed")
app.command(refresh_command, name="refresh")
app.command(stream_command, name="stream")
app.command(dead_letters_app)
app.command(rollout_command, name="rollout")
app.command(score_command, name="score")
app.command(serve_command, name="serve")
app.command(recommend_command, name="recommend")
app.command(export_command, name="export")
app.command(check_served_command, name="check-served")
app.command(store_app)
app.command(windows_app)
app.command(log_app)
app.command(plan_command, name="plan")
app.command(demo_command, name="demo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0, with 2 for what the user can set right, or with 130 if interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)])
    try:
        app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except (LimamlError, CycloptsError) as problem:
        if debug:
            raise
        errors.print(str(problem), style="red", markup=False, highlight=False)
        if isinstance(problem, CycloptsError):
            errors.print("Type 'limaml --help', or '--help' behind a command, for what there is.", highlight=False)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as problem:
        if debug or problem.filename is None:
            raise
        errors.print(
            f"{problem.filename}: {problem.strerror}. Check the path, its permissions and the space left.",
            style="red",
            markup=False,
            highlight=False,
        )
        sys.exit(2)
    except BrokenProcessPool as problem:
        if debug:
            raise
        errors.print(
            f"A worker process died ({problem}), most likely for lack of memory. Use fewer at a time (--workers 1), or fewer "
            "tasks (--max-tasks).",
            style="red",
            markup=False,
            highlight=False,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("Interrupted. What was written so far is kept; the same command goes on where it can.")
        sys.exit(130)
