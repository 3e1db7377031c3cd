"""Events as they come: from a broker into the log, from there into every version that is served."""

from limaml.stream.dead_letters import DeadLetter, DeadLetters
from limaml.stream.decode import Decoded, Decoder
from limaml.stream.observer import BatchDone, Fresh, JsonLines, Observer, Observers
from limaml.stream.source import Event, Source, SourceDown
from limaml.stream.url import open_source
from limaml.stream.worker import Pace, Totals, Worker

__all__ = [
    "BatchDone",
    "DeadLetter",
    "DeadLetters",
    "Decoded",
    "Decoder",
    "Event",
    "Fresh",
    "JsonLines",
    "Observer",
    "Observers",
    "Pace",
    "Source",
    "SourceDown",
    "Totals",
    "Worker",
    "open_source",
]
