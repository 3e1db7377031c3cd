"""Larger public data sets, read from the files that their publishers offer."""

from limaml.interactions.published.convert import PUBLISHED, convert
from limaml.interactions.published.files import Files, Published, Tables

__all__ = ["PUBLISHED", "Files", "Published", "Tables", "convert"]
