"""gqa for asyncio: the same calls, awaited, on the connection's own descriptor. No thread is needed.

    daemon = gqa.aio.connect()
    async for piece in daemon.generate("tiny", "Once upon a time"):
        print(piece, end="", flush=True)

Connecting itself waits (for a local socket: microseconds), as gqa.connect() does. Cancelling the task that awaits a call
cancels the call.
"""
import asyncio
import select
import time

from . import connection as sync
from .errors import Error
from .library import NEVER, lib
from .values import python


class Connection:
    """Belongs to the loop that runs when it is made."""

    def __init__(self, inner):
        self._inner, self._loop, self._timer = inner, asyncio.get_running_loop(), None
        self._fd, self._writes = inner.fileno(), False
        self._loop.add_reader(self._fd, self._pump)

    # ---- the loop ---------------------------------------------------------------------------------

    def _unwatch(self):
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._fd, self._writes = None, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pump(self):
        try:
            while self._inner.process():
                pass
        except Error:
            self._unwatch()  # all calls have ended and know why
            return
        self._rearm()

    def _rearm(self):
        """What to be woken for: asked anew after everything that may have changed it."""
        g = self._inner.pointer
        writes = bool(lib.gqa_events(g) & select.POLLOUT)
        if writes and not self._writes:
            self._loop.add_writer(self._fd, self._pump)
        elif self._writes and not writes:
            self._loop.remove_writer(self._fd)
        self._writes = writes
        if self._timer is not None:
            self._timer.cancel()
        due = lib.gqa_timeout_usec(g)
        wait = max(0, due / 1e6 - time.monotonic())
        self._timer = None if due == NEVER else self._loop.call_later(wait, self._pump)

    # ---- life -------------------------------------------------------------------------------------

    @property
    def connected(self):
        return self._inner.connected

    def reconnect(self, timeout=None):
        """As gqa.Connection.reconnect(); waits. Only useful once the connection is lost."""
        self._unwatch()
        self._inner.reconnect(timeout)
        self._fd = self._inner.fileno()
        self._loop.add_reader(self._fd, self._pump)
        self._rearm()

    def close(self):
        self._unwatch()
        self._inner.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.close()

    # ---- calls ------------------------------------------------------------------------------------

    def start(self, method, params, call, timeout=None, total=None):
        self._inner.start(method, params, call, timeout, total)
        self._rearm()
        return call

    def cancel(self, call):
        self._inner.cancel(call)
        if self._fd is not None and self._inner.connected:
            self._rearm()

    async def call(self, method, params=None, *, timeout=None, total=None, on_event=None):
        """As gqa.Connection.call()."""
        ended = self._loop.create_future()
        call = sync.Pending((lambda value: on_event(python(value))) if on_event else None,
                            lambda: ended.cancelled() or ended.set_result(None))
        self.start(method, params or {}, call, timeout, total)
        try:
            await ended
        except asyncio.CancelledError:
            self.cancel(call)
            raise
        if call.error is not None:
            raise call.error
        return call.result

    async def ping(self):
        await self.call("gqa.ping")

    async def tokenize(self, model, text, **params):
        return (await self.call("text.tokenize", {"model": model, "text": text, **params}))["tokens"]

    async def detokenize(self, model, tokens, **params):
        return (await self.call("text.detokenize", {"model": model, "tokens": tokens, **params}))["text"]

    async def embed(self, model, inputs, *, timeout=None, total=None, **params):
        inputs = [inputs] if isinstance(inputs, (str, bytes)) else inputs
        return (await self.call("text.embed", {"model": model, "inputs": inputs, **params}, timeout=timeout,
                                total=total))["embeddings"]

    def generate(self, model, prompt=None, *, timeout=None, total=None, **params):
        """Starts a generation; iterate over it with async for."""
        return Generation(self, {"model": model, "prompt": prompt, **params}, timeout, total)


class Generation:
    """As gqa.Generation, with async for and async with. aclose() cancels it."""

    def __init__(self, connection, params, timeout, total):
        queue = asyncio.Queue()
        self._connection, self._queue = connection, queue
        self._call = connection.start("text.generate", params,
                                      sync.Pending(lambda value: queue.put_nowait(sync.Piece.of(python(value))),
                                                   lambda: queue.put_nowait(None)), timeout, total)

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await self._queue.get()
        if piece is not None:
            return piece
        self._queue.put_nowait(None)  # asked again, it says the same
        if self._call.error is not None:
            raise self._call.error
        raise StopAsyncIteration

    @property
    def result(self):
        return self._call.result

    def cancel(self):
        self._connection.cancel(self._call)

    async def aclose(self):
        """Cancels and waits for the end."""
        self.cancel()
        while await self._queue.get() is not None:
            pass
        self._queue.put_nowait(None)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.aclose()

    def __del__(self):
        if hasattr(self, "_call"):
            self._connection.cancel(self._call)


def connect(socket=None, *, client=sync.CLIENT, timeout=None):
    """As gqa.connect(); from inside a running loop."""
    return Connection(sync.connect(socket, client=client, timeout=timeout))
