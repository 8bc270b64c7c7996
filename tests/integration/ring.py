"""Rings in shared memory, the client's end: a second opinion on ipc/ring.c and daemon/peer_ring.c.

The layout is docs/protocol.md's. Everything is done in the plainest way: the doorbell is always rung, and the
daemon is asked to wake by a message on the socket."""
import mmap
import os
import select
import socket
import struct
import time

import wire

CONTROL = 4096
SUB_TAIL, SUB_HEAD, COMP_TAIL, COMP_HEAD, DAEMON_WAIT, CLIENT_WAIT, CLIENT_BELL = range(128, 1024, 128)
WAIT_NOTHING, WAIT_FUTEX, WAIT_MESSAGE, WAIT_ROOM = 0, 1, 2, 4
RECORD_MAX = 64 << 10
MASK = 0xFFFFFFFF


def receive_fds(sock, room=1 << 16, n_fds=8):
    """One recvmsg: (data, fds)."""
    data, ancillary, flags, _ = sock.recvmsg(room, socket.CMSG_SPACE(4 * n_fds), socket.MSG_CMSG_CLOEXEC)
    fds = []
    for level, kind, payload in ancillary:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds += struct.unpack(f"{len(payload) // 4}i", payload)
    assert not flags & socket.MSG_CTRUNC
    return data, fds


class RingClient(wire.Client):
    """A client whose messages travel in rings from open_ring() to close_ring()."""

    def __init__(self, path=None, sock=None, **sizes):
        super().__init__(path, sock)
        self.fds, self.shared = [], None
        self.ring_buffer = bytearray()
        try:
            self.open_ring(**sizes)
        except BaseException:
            self.close()
            raise

    # ---- opening and closing

    def open_ring(self, **sizes):
        """The answer to ring.open; raises wire.Refused."""
        id, self.next_id = self.next_id, self.next_id + 1
        self.sock.sendall(wire.pack([0, id, "ring.open", sizes]))
        fds = []
        while id not in self.answers:
            data, more = receive_fds(self.sock)
            fds += more
            if not data:
                raise EOFError("the daemon closed the connection")
            self.buffer += data
            while self.take_message(self.buffer):
                pass
        error, result = self.answers.pop(id)
        if error is not None:
            assert fds == [], "an error brings no descriptors"
            raise wire.Refused(error)
        self.fds, self.about, self.size = fds, result, result["ring_bytes"]
        ring_fd, data_fd, self.doorbell = fds
        self.shared = mmap.mmap(ring_fd, CONTROL + 2 * self.size)
        self.area = mmap.mmap(data_fd, result["in_bytes"] + result["out_bytes"])
        self.tail = self.head = 0
        self.left = 0
        return result

    def close_ring(self):
        result = self.call("ring.close")
        self.forget_ring()
        return result

    def forget_ring(self):
        if self.shared:
            self.shared.close()
            self.area.close()
            self.shared = None
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def close(self):
        super().close()
        self.forget_ring()

    # ---- words

    def word(self, offset):
        return struct.unpack_from("I", self.shared, offset)[0]

    def set_word(self, offset, value):
        struct.pack_into("I", self.shared, offset, value & MASK)

    def ring_doorbell(self):
        os.eventfd_write(self.doorbell, 1)

    # ---- the two ends

    def put(self, data):
        """All of data, as records, waiting for room as often as it takes."""
        done, end = 0, time.monotonic() + wire.TIMEOUT_S
        while done < len(data):
            room = self.size - ((self.tail - self.word(SUB_HEAD)) & MASK) - 8
            n = min(room, RECORD_MAX, len(data) - done)
            if n < min(len(data) - done, self.size // 8):
                if time.monotonic() > end:
                    raise TimeoutError("no room in the submission ring")
                self.pump(0.001)  # what the daemon sends must be taken, lest both wait
                continue
            self.write(self.tail, struct.pack("II", n, len(data) - done - n) + data[done:done + n])
            self.tail = (self.tail + 8 + (n + 7) // 8 * 8) & MASK
            done += n
            self.set_word(SUB_TAIL, self.tail)
            self.ring_doorbell()

    def write(self, at, data):
        place = at % self.size
        first = data[:self.size - place]
        self.shared[CONTROL + place:CONTROL + place + len(first)] = first
        self.shared[CONTROL:CONTROL + len(data) - len(first)] = data[len(first):]

    def read(self, at, n):
        place, base = at % self.size, CONTROL + self.size
        first = self.shared[base + place:base + min(place + n, self.size)]
        return first + self.shared[base:base + n - len(first)]

    def take_records(self):
        """What is in the completion ring now, into the buffer. True when something was."""
        tail = self.word(COMP_TAIL)
        some = tail != self.head
        while self.head != tail:
            n, left = struct.unpack("II", self.read(self.head, 8))
            if self.word(0) == 0:
                return False  # the daemon has ended the connection and taken the memory back
            assert 0 < n <= RECORD_MAX and (self.left == 0 or n + left == self.left), (n, left, self.left)
            self.ring_buffer += self.read((self.head + 8) & MASK, n)
            self.head = (self.head + 8 + (n + 7) // 8 * 8) & MASK
            self.left = left
        if some:
            self.set_word(COMP_HEAD, self.head)
            if self.word(DAEMON_WAIT) & WAIT_ROOM:
                self.ring_doorbell()
        return some

    def pump(self, timeout_s):
        """Waits for something and takes it. False when the daemon has closed the connection."""
        if self.take_records():
            return True
        self.set_word(CLIENT_WAIT, WAIT_MESSAGE)
        if self.take_records():
            return True
        if select.select([self.sock], [], [], timeout_s)[0]:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return False
            self.buffer += data
        return True

    # ---- the data area: the client's part, then the daemon's

    def data(self, tensor):
        """A tensor's bytes, wherever they are."""
        handle = tensor["data"]
        if not isinstance(handle, dict):
            return handle
        first, n = handle["ring"], handle["bytes"]
        assert self.about["in_bytes"] <= first and first + n <= len(self.area), handle
        return self.area[first:first + n]

    def give(self, *tensors):
        offsets = [t["data"]["ring"] for t in tensors if isinstance(t["data"], dict)]
        if offsets:
            self.put(wire.pack([2, "$give", offsets]))

    # ---- what wire.Client does with it

    def send(self, method, params=None, id=None):
        if not self.shared:
            return super().send(method, params, id)
        if id is None:
            id, self.next_id = self.next_id, self.next_id + 1
        self.put(wire.pack([0, id, method, {} if params is None else params]))
        return id

    def cancel(self, id):
        self.put(wire.pack([2, "$cancel", [id]]))

    def receive(self):
        end = time.monotonic() + wire.TIMEOUT_S
        if not self.shared:
            return super().receive()
        while True:
            if self.left == 0 and self.take_message(self.ring_buffer):
                return True
            while self.take_message(self.buffer):
                name = self.notifications.pop()[0]
                assert name == "gqa.wake", f"{name} came by the socket"
            if time.monotonic() > end:
                raise TimeoutError("nothing was heard")
            if not self.pump(0.05):
                return False
