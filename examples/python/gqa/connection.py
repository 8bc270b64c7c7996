"""A connection to gqad, for programs that wait: calls, and generations that stream."""
import collections
import errno
from ctypes import byref, c_char_p, c_uint32, c_void_p, sizeof

from . import errors
from .library import (NEVER, SPAWN_QUIET, CallOptions, ConnectOptions, DoneFn, EventFn, GqaError, SpawnOptions, lib)
from .values import Params, floats, python, tensor_of

CLIENT = "python-gqa"


def _milliseconds(seconds):
    return 0 if seconds is None else min(max(1, round(seconds * 1000)), 2 ** 32 - 1)


class Pending:
    """A call that has not ended. on_event(value) and on_end() run inside Connection.process()."""

    def __init__(self, on_event=None, on_end=None):
        self.on_event, self.on_end = on_event, on_end
        self.id, self.ended, self.result, self.error = None, False, None, None

    def event(self, value):
        if self.on_event is not None and self.error is None:
            self.on_event(value)

    def end(self, status, value, details):
        self.ended = True
        if status < 0:
            self.error = self.error or errors.make(status, details)
        else:
            self.result = python(value)
        if self.on_end is not None:
            self.on_end()


class Piece(str):
    """What a step added to the text. Bytes that are no UTF-8 are surrogates, as os.fsdecode() makes them.
    tokens: the step's token ids; event: all that the daemon said of it."""
    tokens = ()
    event = None

    @classmethod
    def of(cls, event):
        text = event.get("text", "")
        piece = cls(text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text)
        piece.tokens, piece.event = event.get("tokens", []), event
        return piece


class Connection:
    """Made by connect() or spawn(). Belongs to one thread at a time."""

    def __init__(self, pointer):
        self._g = pointer
        self._pending = pending = {}

        # ctypes would print an exception that leaves these; it belongs to whoever waits for the call.
        def event(_, call_id, value):
            call = pending.get(call_id)
            try:
                if call is not None:
                    call.event(value)
            except BaseException as e:
                call.error = e
                lib.gqa_cancel(pointer, call_id)

        def done(_, call_id, status, value, details):
            call = pending.pop(call_id, None)
            try:
                if call is not None:
                    call.end(status, value, details.contents if details else None)
            except BaseException as e:
                call.error = e

        # Kept here, for C has no reference to them.
        self._event, self._done = EventFn(event), DoneFn(done)

    # ---- life ---------------------------------------------------------------------------------

    def close(self):
        """Ends what is pending (Cancelled) and closes. Closing twice is closing once."""
        if self._g is not None:
            g, self._g = self._g, None
            lib.gqa_close(g)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        self.close()

    @property
    def pointer(self):
        if self._g is None:
            raise errors.ConnectionLost(-errno.ENOTCONN, "the connection is closed")
        return self._g

    @property
    def connected(self):
        """False once the connection is lost or closed."""
        return self._g is not None and lib.gqa_is_connected(self._g)

    def reconnect(self, timeout=None):
        """Opens a lost connection again; waits for a daemon that is being restarted. Nothing is sent again."""
        details = GqaError()
        status = lib.gqa_reconnect(self.pointer, _milliseconds(timeout), byref(details))
        if status < 0:
            raise errors.make(status, details)

    @property
    def server_info(self):
        """The daemon's answer to hello."""
        return python(lib.gqa_server_info(self.pointer))

    # ---- the loop -----------------------------------------------------------------------------

    def fileno(self):
        return lib.gqa_fd(self.pointer)

    def process(self):
        """Does what can be done without waiting; true when that was something. Raises ConnectionLost once the
        connection is lost, after all pending calls have ended."""
        status = lib.gqa_process(self.pointer)
        if status < 0:
            raise errors.make(status, what="the connection is lost")
        return status > 0

    def turn(self):
        """Waits for something to do, and does it. Calls' deadlines make sure that it comes; Ctrl-C gets through."""
        if lib.gqa_process(self.pointer) == 0:
            lib.gqa_wait(self.pointer, NEVER)

    def finish(self, call):
        """Waits for the end of a call; its result. A call that nobody waits for any more is cancelled."""
        try:
            while not call.ended:
                self.turn()
        except BaseException:
            self.cancel(call)
            raise
        if call.error is not None:
            raise call.error
        return call.result

    # ---- calls --------------------------------------------------------------------------------

    def start(self, method, params, call, timeout=None, total=None):
        """Starts a call without waiting. timeout: the longest silence; total: of the whole call; seconds."""
        call_id = c_uint32()
        options = CallOptions(sizeof(CallOptions), _milliseconds(timeout), self._event, self._done, None,
                              _milliseconds(total))
        with Params(params) as p:
            status = lib.gqa_call_async(self.pointer, method.encode(), p, byref(options), byref(call_id))
        if status < 0:
            raise errors.make(status, what=method)
        call.id = call_id.value
        self._pending[call.id] = call
        return call

    def cancel(self, call):
        """Asks the daemon to stop a call; its end still comes."""
        if self._g is not None and not call.ended:
            lib.gqa_cancel(self._g, call.id)

    def call(self, method, params=None, *, timeout=None, total=None, on_event=None):
        """Any method of the protocol; the result as Python's values. on_event(value) sees each event."""
        call = Pending((lambda value: on_event(python(value))) if on_event else None)
        return self.finish(self.start(method, params or {}, call, timeout, total))

    def ping(self):
        self.call("gqa.ping")

    def stats(self):
        return self.call("server.stats")

    def models(self):
        return self.call("model.list")["models"]

    def load(self, model, *, timeout=None, on_event=None, **params):
        return self.call("model.load", {"model": model, **params}, timeout=timeout, on_event=on_event)

    def unload(self, model):
        self.call("model.unload", {"model": model})

    def tokenize(self, model, text, **params):
        return self.call("text.tokenize", {"model": model, "text": text, **params})["tokens"]

    def detokenize(self, model, tokens, **params):
        """str, or bytes where the text is no UTF-8."""
        return self.call("text.detokenize", {"model": model, "tokens": tokens, **params})["text"]

    def generate(self, model, prompt=None, *, timeout=None, total=None, **params):
        """Starts a generation; iterate over it for its text. prompt: text, or give tokens=[...]."""
        return Generation(self, {"model": model, "prompt": prompt, **params}, timeout, total)

    def logits(self, model, prompt=None, *, timeout=None, total=None, **params):
        """(rows, n_vocab) 32-bit floats as a memoryview, row i after token first_row + i."""
        rows = Rows("logits")
        call = self.start("text.logits", {"model": model, "prompt": prompt, **params}, Pending(rows.add), timeout, total)
        return rows.of(self.finish(call))

    def embed(self, model, inputs, *, timeout=None, total=None, **params):
        """(texts, n_dims) 32-bit floats as a memoryview; a row is a text's vector."""
        inputs = [inputs] if isinstance(inputs, (str, bytes)) else inputs
        return self.call("text.embed", {"model": model, "inputs": inputs, **params}, timeout=timeout,
                         total=total)["embeddings"]


class Rows:
    """Collects the tensors of a call's events below one another."""

    def __init__(self, key):
        self.key, self.data = key.encode(), bytearray()

    def add(self, value):
        tensor = tensor_of(lib.gqa_value_get(value, self.key))
        if tensor is not None:
            self.data += tensor[1]

    def of(self, result):
        n_columns = result["n_vocab"]
        return floats(self.data, (len(self.data) // (4 * n_columns), n_columns))


class Generation:
    """A generation that runs. Iterating waits for the next Piece; result is the daemon's last word once it has ended.
    close(), the end of a with block, and being forgotten cancel it."""

    def __init__(self, connection, params, timeout, total):
        # The connection knows the call and its pieces, not this object: it can be forgotten while it runs.
        pieces = collections.deque()
        self._connection, self._pieces, self._closed = connection, pieces, False
        self._call = Pending(lambda value: pieces.append(Piece.of(python(value))))
        connection.start("text.generate", params, self._call, timeout, total)

    def __iter__(self):
        return self

    def __next__(self):
        while not self._pieces and not self._call.ended:
            self._connection.turn()
        if self._pieces:
            return self._pieces.popleft()
        if self._call.error is not None and not self._closed:
            raise self._call.error
        raise StopIteration

    @property
    def result(self):
        """{finish, n_prompt, n_generated, ...}, or None before the end."""
        return self._call.result

    def read(self):
        """The rest of the text."""
        return "".join(self)

    def cancel(self):
        """Asks for the end without waiting; what was made until then can still be iterated over."""
        self._connection.cancel(self._call)

    def close(self):
        """Cancels and waits for the end, some steps at most."""
        self._closed = True
        self.cancel()
        while not self._call.ended and self._connection.connected:
            self._connection.turn()
        self._pieces.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if hasattr(self, "_call") and self._call.id is not None:
            self._closed = True
            self.cancel()


# ---- connecting ------------------------------------------------------------------------------------------------------

def connect(socket=None, *, client=CLIENT, timeout=None):
    """Connects to the daemon: socket, else GQA_SOCKET, else the usual places. timeout: of connecting and of quick
    calls; 30 s."""
    options = ConnectOptions(struct_size=sizeof(ConnectOptions), socket=socket.encode() if socket else None,
                             client=client.encode(), timeout_ms=_milliseconds(timeout))
    return _made(lib.gqa_connect, options)


def spawn(*arguments, program=None, cache_dir=None, models_dir=None, quiet=False, client=CLIENT, timeout=None):
    """Starts a private daemon, which lives as long as the connection. arguments: more of gqad's."""
    texts = (c_char_p * (len(arguments) + 1))(*[str(a).encode() for a in arguments], None)
    options = SpawnOptions(sizeof(SpawnOptions), *[p.encode() if p else None for p in (program, cache_dir, models_dir)],
                           texts, client.encode(), SPAWN_QUIET if quiet else 0, _milliseconds(timeout))
    return _made(lib.gqa_spawn, options)


def _made(function, options):
    pointer, details = c_void_p(), GqaError()
    status = function(byref(options), byref(pointer), byref(details))
    if status < 0:
        raise errors.make(status, details)
    return Connection(pointer)
