"""Events as they come: from a broker into the log, from there into every version that is served."""

from limaml.stream.source import Event, Source, SourceDown
from limaml.stream.url import open_source

__all__ = ["Event", "Source", "SourceDown", "open_source"]
