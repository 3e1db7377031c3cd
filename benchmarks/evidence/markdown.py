"""Rows of Markdown tables."""

from __future__ import annotations

__all__ = ["head", "row", "signed"]


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def head(*cells: object) -> list[str]:
    return [row(*cells), row(*("---" for _ in cells))]


def signed(value: float) -> str:
    """Four decimals and a sign, with the minus of print."""
    return f"{value:+.4f}".replace("-", "−")
