"""What the command line shows: sentences, tables, and progress (bars on a terminal, plain lines elsewhere)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from limaml.evaluate.compare import JobProgress
from limaml.meta.outer import Progress as Training

__all__ = ["amount", "comparing", "console", "counting", "errors", "heading", "say", "training"]

console = Console(soft_wrap=True, width=None if Console().is_terminal else 120)
errors = Console(stderr=True, soft_wrap=True)


def heading(text: str) -> None:
    """Begin a part of a command's output."""
    console.print(f"\n{text}", style="bold", markup=False, highlight=False)


def say(lines: Sequence[str]) -> None:
    """Print sentences, one a line."""
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False)


def amount(size: float) -> str:
    """A number of bytes for people: `17.7 KiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[news]}"),
        console=console,
        transient=True,
    )


def _news(state: Training) -> str:
    valid = "" if state.valid_loss is None else f", validation {state.valid_loss:.4f}"
    return f"epoch {state.epoch}, loss {state.loss:.4f}{valid}"


@contextmanager
def comparing() -> Iterator[Callable[[JobProgress], None]]:
    """Progress of a comparison: all jobs, and each one that is running."""
    if not console.is_terminal:
        started = time.monotonic()

        def line(state: JobProgress) -> None:
            if state.finished is not None:
                console.print(
                    f"  {state.done:>3} of {state.total}  {time.monotonic() - started:5.0f} s  {state.finished}",
                    highlight=False,
                )

        yield line
        return
    with _bars() as bars:
        overall = bars.add_task("all trainings", total=None, news="")
        running: dict[str, TaskID] = {}

        def show(state: JobProgress) -> None:
            bars.update(overall, completed=state.done, total=state.total)
            for name, news in state.running.items():
                if name not in running:
                    running[name] = bars.add_task(f"  {name}", total=None, news="")
                done = (news.epoch - 1) * news.steps + news.step
                bars.update(running[name], completed=done, total=news.epochs * news.steps, news=_news(news))
            for name in [name for name in running if name not in state.running]:
                bars.remove_task(running.pop(name))

        yield show


@contextmanager
def training() -> Iterator[Callable[[str, Training], None]]:
    """Progress of one training: epochs, loss, tasks per second, time left."""
    started = time.monotonic()
    epoch_began = [0.0, 0.0]  # epoch, when it began
    if not console.is_terminal:

        def line(part: str, news: Training) -> None:
            if news.step == news.steps:
                console.print(
                    f"  {part}: epoch {news.epoch} of at most {news.epochs}, loss {news.loss:.4f}, {news.tasks} tasks, "
                    f"{time.monotonic() - started:.0f} s",
                    highlight=False,
                )

        yield line
        return
    with _bars() as bars:
        shown: dict[str, TaskID] = {}

        def show(part: str, news: Training) -> None:
            if part not in shown:
                shown[part] = bars.add_task(part, total=news.epochs * news.steps, news="")
            if epoch_began[0] != news.epoch or news.step == 1:
                epoch_began[:] = [news.epoch, time.monotonic()]
            rate = news.tasks / max(time.monotonic() - epoch_began[1], 1e-3)
            done = (news.epoch - 1) * news.steps + news.step
            bars.update(
                shown[part],
                completed=done,
                total=news.epochs * news.steps,
                news=f"{_news(news)}, {rate:,.0f} tasks/s",
            )

        yield show


@contextmanager
def counting(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of something that is counted: called with (name, done, total)."""
    if not console.is_terminal:
        yield lambda _name, _done, _total: None
        return
    with _bars() as bars:
        shown: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in shown:
                shown[name] = bars.add_task(f"{what} {name}", total=total, news="")
            bars.update(shown[name], completed=done, total=total)

        yield show
