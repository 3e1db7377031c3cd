"""Meta embeddings: generated, published as a version, refreshed for the tasks that were touched."""

from limaml.embeddings.generate import Generated, generate
from limaml.embeddings.publish import publish
from limaml.embeddings.recursive import update
from limaml.embeddings.refresh import Refreshed, refresh

__all__ = ["Generated", "Refreshed", "generate", "publish", "refresh", "update"]
