"""`limaml check-served`: recorded live requests, scored again offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from limaml.cli.console import say
from limaml.cli.workspace import Workspace
from limaml.errors import DataError
from limaml.serving.agreement import agreement_lines, check_served

__all__ = ["check_served_command"]


def check_served_command(
    records: Path,
    folder: Path,
    /,
    *,
    store: Annotated[str | None, Parameter(help="Path or URL of the store (default: the run folder's own).")] = None,
    tolerance: Annotated[float, Parameter(help="Largest difference of a score that is let through.")] = 1e-5,
) -> None:
    """Score recorded live requests again with the code that training uses, and compare.

    `limaml serve runs/mine --record runs/mine/served` writes the records. A difference above the tolerance is an error:
    the model is then served something else than it was trained on. Rows whose embedding was refreshed since they were
    answered are counted and left out.

    `limaml check-served runs/mine/served runs/mine`
    """
    with Workspace(folder).store(store) as opened:
        found = check_served(records, opened)
    say(agreement_lines(found))
    if found.worst > tolerance:
        raise DataError(
            f"Serving and training disagree by {found.worst:.2e}, above {tolerance:g}: {found.worst_where}. Look whether the "
            "server runs the version of limaml that this is, and another runtime or precision than torch in float32."
        )
    if not found.compared:
        raise DataError(
            "No row could be compared: every embedding was refreshed since, or every version is gone. Check sooner after "
            "recording, or keep more versions (limaml embed --keep)."
        )
