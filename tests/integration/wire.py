"""MessagePack and the daemon's messages, small and strict: a second opinion on ipc/codec.c."""
import os
import socket
import struct
import time

TIMEOUT_S = float(os.environ.get("GQAD_TEST_TIMEOUT_S", "20"))


def pack(value):
    if value is None:
        return b"\xc0"
    if value is True:
        return b"\xc3"
    if value is False:
        return b"\xc2"
    if isinstance(value, int):
        if 0 <= value < 128:
            return struct.pack("B", value)
        if -32 <= value < 0:
            return struct.pack("b", value)
        return b"\xcf" + struct.pack(">Q", value) if value >= 0 else b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogateescape")
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xdb" + struct.pack(">I", len(data))) + data
    if isinstance(value, (bytes, bytearray)):
        return b"\xc6" + struct.pack(">I", len(value)) + bytes(value)
    if isinstance(value, (list, tuple)):
        head = bytes([0x90 | len(value)]) if len(value) < 16 else b"\xdd" + struct.pack(">I", len(value))
        return head + b"".join(pack(v) for v in value)
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xdf" + struct.pack(">I", len(value))
        return head + b"".join(pack(k) + pack(v) for k, v in value.items())
    raise TypeError(type(value))


class More(Exception):
    """The buffer ends inside a value."""


class Reader:
    SCALARS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
               0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
    CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
    LENGTHS = {0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"),
               0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
               0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if self.at + n > len(self.data):
            raise More()
        self.at += n
        return bytes(self.data[self.at - n:self.at])

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self):
        b = self.take(1)[0]
        if b < 0x80:
            return b
        if b >= 0xE0:
            return b - 256
        if b < 0x90:
            return self.body("map", b & 15)
        if b < 0xA0:
            return self.body("array", b & 15)
        if b < 0xC0:
            return self.body("str", b & 31)
        if b in self.CONSTANTS:
            return self.CONSTANTS[b]
        if b in self.SCALARS:
            return self.number(self.SCALARS[b])
        kind, form = self.LENGTHS[b]
        return self.body(kind, self.number(form))

    def body(self, kind, n):
        if kind == "bin":
            return self.take(n)
        if kind == "str":
            return self.take(n).decode("utf-8")
        if kind == "array":
            return [self.value() for _ in range(n)]
        return {self.key(): self.value() for _ in range(n)}

    def key(self):
        """Tensors have binary keys, as msgpack-numpy writes them."""
        key = self.value()
        return key.decode() if isinstance(key, bytes) else key


class Refused(Exception):
    """The daemon answered with an error map."""

    def __init__(self, error):
        super().__init__(f"{error['name']}: {error['message']}")
        self.name, self.code, self.message, self.error = error["name"], error["code"], error["message"], error


class Client:
    def __init__(self, path=None, sock=None):
        self.sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if path:
            self.sock.connect(path)
        self.sock.settimeout(TIMEOUT_S)
        self.buffer = bytearray()
        self.next_id = 1
        self.notifications, self.answers, self.events = [], {}, {}

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, method, params=None, id=None):
        """Sends a request and returns its id."""
        if id is None:
            id, self.next_id = self.next_id, self.next_id + 1
        try:
            self.sock.sendall(pack([0, id, method, {} if params is None else params]))
        except (BrokenPipeError, ConnectionResetError):
            pass  # what the daemon said before it closed is still to be read
        return id

    def cancel(self, id):
        self.sock.sendall(pack([2, "$cancel", [id]]))

    def receive(self):
        """Takes one message in and files it. False at the end of the stream."""
        while not self.take_message(self.buffer):
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                return False
            self.buffer += data
        return True

    def take_message(self, buffer):
        """Files the first whole message of the buffer, if there is one."""
        if not buffer:
            return False
        reader = Reader(buffer)
        try:
            message = reader.value()
        except More:
            return False
        del buffer[:reader.at]
        if message[0] == 1:
            assert message[1] not in self.answers, "two answers to one call"
            self.answers[message[1]] = message[2:]
        elif message[1] == "gqa.event":
            id, seq, event = message[2]
            assert id not in self.answers, "an event after the answer"
            events = self.events.setdefault(id, [])
            assert seq == len(events), f"event {seq} came as number {len(events)}"
            events.append(event)
        else:
            self.notifications.append((message[1], message[2]))
        return True

    def wait(self, id):
        while id not in self.answers:
            if not self.receive():
                raise EOFError("the daemon closed the connection")
        error, result = self.answers.pop(id)
        if error is not None:
            raise Refused(error)
        return result

    def wait_events(self, id, count):
        while len(self.events.get(id, [])) < count:
            if not self.receive():
                raise EOFError("the daemon closed the connection")
        return self.events[id]

    def wait_end(self):
        """Reads until the daemon closes the connection."""
        while self.receive():
            pass

    def call(self, method, params=None):
        return self.wait(self.send(method, params))

    def generate(self, **params):
        """The result, with the events' text and tokens joined in."""
        id = self.send("text.generate", params)
        result = self.wait(id)
        events = self.events.pop(id, [])
        if params.get("stream", True):
            result["text"] = "".join(e["text"] for e in events)
            result["tokens"] = [t for e in events for t in e["tokens"]]
            result["logprobs"] = [p for e in events for p in e.get("logprobs", [])]
        return result


def wait_until(condition, what, timeout_s=TIMEOUT_S):
    """Polls something that has no event of its own; fails loudly."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"still not after {timeout_s} s: {what}")
        time.sleep(0.01)


def connect_when_listening(path):
    """A client of a socket whose listener is about to come: a socket's file is there before it listens."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return Client(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
