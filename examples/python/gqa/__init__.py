"""gqa: gqad, the inference daemon, from Python. A thin layer over libgqa with ctypes; nothing else is needed.

    import gqa
    with gqa.connect() as daemon:
        for piece in daemon.generate("tiny", "Once upon a time", n_predict=64):
            print(piece, end="", flush=True)

The rules are libgqa's (<gqa/client.h>, docs/client.md): a connection belongs to one thread at a time, every wait
has a deadline, nothing is ever sent a second time, and a lost connection comes back by reconnect() only.
gqa.aio has the same for asyncio. The library is found as the system finds libgqa.so.1, or where the
environment's GQA_LIBRARY says.
"""
from .connection import Connection, Generation, Piece, connect, spawn
from .errors import Busy, Cancelled, ConnectionLost, Error, InvalidParams, NotFound, Timeout
from .library import version

__all__ = ["Busy", "Cancelled", "Connection", "ConnectionLost", "Error", "Generation", "InvalidParams", "NotFound",
           "Piece", "Timeout", "connect", "spawn", "version"]
