"""A line between a client and a server on loopback, which is cut, goes dead without a word, and is mended."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Wire:
    """Passes on to `target` what comes to `port`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._flows = threading.Event()  # not set: nothing moves in either direction
        self._flows.set()
        self._lock = threading.Lock()
        self._broken = self._ended = False
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Every connection is reset, and new ones are, at once."""
        with self._lock:
            self._broken = True
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def die(self) -> None:
        """Connections stay open and new ones are taken, but nothing gets through."""
        self._flows.clear()

    def mend(self) -> None:
        with self._lock:
            self._broken = False
        self._flows.set()

    def close(self) -> None:
        self._ended = True
        self._flows.set()
        self.cut()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()  # wakes who waits for one
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._open):
            end.close()

    def _accept(self) -> None:
        while not self._ended:
            near, _ = self._listener.accept()
            with self._lock:
                try:
                    far = None if self._broken else socket.create_connection(("127.0.0.1", self._target), 5)
                except OSError:
                    far = None
                if far is None:
                    near.close()
                    continue
                self._open += [near, far]
                pair = [threading.Thread(target=self._pass, args=ends) for ends in ((near, far), (far, near))]
                self._threads += pair
            for thread in pair:
                thread.start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                self._flows.wait()
                target.sendall(part)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire(target: int) -> Iterator[Wire]:
    opened = Wire(target)
    try:
        yield opened
    finally:
        opened.close()
