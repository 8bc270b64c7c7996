"""Rings in shared memory: the same calls, the same answers; what a client does to what it shares harms it alone."""
import fcntl
import os
import random
import select
import signal
import socket
import struct
import time
import unittest

import ring
import wire
from harness import Daemon, DaemonCase, Folder, main

PROMPT = [1, 40, 41, 42, 43, 44]
SO_PEEK_OFF = 42
REOPENINGS = 400
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1, 2, 4


class Peeking:
    """A socket from which nothing is ever taken; with SO_PEEK_OFF, so that each look goes on."""

    def __init__(self, sock):
        self.sock = sock

    def recv(self, n):
        return self.sock.recv(n, socket.MSG_PEEK)

    def recvmsg(self, room, ancillary, flags):
        return self.sock.recvmsg(room, ancillary, flags | socket.MSG_PEEK)

    def __getattr__(self, name):
        return getattr(self.sock, name)


class RingCase(DaemonCase):
    def connect_ring(self, **sizes):
        return ring.RingClient(self.daemon.socket, **sizes)

    def setUp(self):
        super().setUp()
        if "--model" in self.flags:  # the cache opens its files with the first request
            self.client.generate(model="tiny", tokens=PROMPT, n_predict=70, ignore_eos=True)

    def fds(self):
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def shared_kib(self):
        """Of the daemon's memory, what lies in memfds."""
        with open(f"/proc/{self.daemon.process.pid}/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("RssShmem"))

    def user(self):
        (user,) = self.client.call("server.stats")["users"]
        return user

    def baseline(self):
        """Once earlier tests' connections and their memory are gone, which their end does not wait for."""
        wire.wait_until(lambda: (self.user()["connections"], self.user()["ring_bytes"]) == (1, 0),
                        "only one connection is left, and no rings")
        return self.now_held()

    def now_held(self):
        return self.fds(), self.user()["ring_bytes"], self.user()["fds"]

    def back_to(self, before):
        wire.wait_until(lambda: self.now_held() == before, f"{before} descriptors, ring bytes and quota again")
        self.assertEqual(self.client.call("gqa.ping"), {})


class Calls(RingCase):
    flags = ("--model", "tiny", "--parallel", "4")

    def test_every_call_is_answered_as_over_the_socket(self):
        with self.connect_ring() as c:
            for method, params in [("gqa.hello", {}), ("gqa.ping", {}), ("gqa.api_info", {}), ("model.list", {}),
                                   ("model.info", {"model": "tiny"}), ("backend.list", {}),
                                   ("text.tokenize", {"model": "tiny", "text": "Once upon a time"}),
                                   ("text.detokenize", {"model": "tiny", "tokens": PROMPT}),
                                   ("text.embed", {"model": "tiny", "tokens": PROMPT, "pooling": "mean"})]:
                with self.subTest(method):
                    self.assertEqual(c.call(method, params), self.client.call(method, params))
            params = {"model": "tiny", "tokens": PROMPT, "n_predict": 30, "ignore_eos": True, "temperature": 0}
            self.assertEqual(c.generate(**params)["tokens"], self.client.generate(**params)["tokens"])
            for name, method, params in [("METHOD_NOT_FOUND", "no.such", {}), ("INVALID_PARAMS", "text.tokenize", {}),
                                         ("NOT_FOUND", "model.info", {"model": "nobody"})]:
                with self.assertRaises(wire.Refused) as caught:
                    c.call(method, params)
                self.assertEqual(caught.exception.name, name)

    def test_rows_are_the_same_bytes(self):
        rows = []
        for c in (self.client, self.connect_ring(), self.connect_ring(ring_bytes=4096)):
            id = c.send("text.logits", {"model": "tiny", "tokens": list(range(3, 103))})
            c.wait(id)
            data = c.data if c is not self.client else lambda tensor: tensor["data"]
            rows.append(b"".join(data(e["logits"]) for e in c.events.pop(id)))
            if c is not self.client:
                c.close()
        self.assertEqual(len(rows[0]), 100 * self.client.call("model.info", {"model": "tiny"})["n_vocab"] * 4)
        self.assertEqual(rows[0], rows[1])
        self.assertEqual(rows[0], rows[2])

    def test_streams_cancel_and_many_at_once(self):
        with self.connect_ring() as c:
            ids = [c.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 2000, "ignore_eos": True})
                   for _ in range(3)]
            pings = [c.send("gqa.ping") for _ in range(200)]
            for id in ids:
                c.wait_events(id, 2)
                c.cancel(id)
            for id in ids:
                self.assertEqual(c.wait(id)["finish"], "cancelled")
            for id in pings:
                self.assertEqual(c.wait(id), {})

    def test_a_cancel_goes_the_way_of_its_request(self):
        """By the socket too, while the ring is busy."""
        with self.connect_ring() as c:
            params = {"model": "tiny", "tokens": PROMPT, "n_predict": 100000, "ignore_eos": True}
            for id in range(1000, 1020):
                c.sock.sendall(wire.pack([0, id, "text.generate", params]) + wire.pack([2, "$cancel", [id]]))
                self.assertEqual(c.call("gqa.ping"), {})
                self.assertEqual(c.wait(id)["finish"], "cancelled")

    def test_messages_longer_than_the_ring(self):
        text = "".join(random.Random(1).choice("abcdefg ") for _ in range(60000))
        with self.connect_ring(ring_bytes=4096) as c:
            mine = c.call("text.tokenize", {"model": "tiny", "text": text})
            self.assertEqual(mine, self.client.call("text.tokenize", {"model": "tiny", "text": text}))

    def test_both_ways_are_open_while_the_ring_is(self):
        with self.connect_ring() as c:
            c.sock.sendall(wire.pack([0, 1000, "gqa.ping", {}]))
            self.assertEqual(c.wait(1000), {})  # the answer comes by the ring

    def test_closing_and_opening_again(self):
        before = self.baseline()
        with self.connect_ring() as c:
            for i in range(5):
                # The connection and its doorbell; the memfds are the client's alone once it has them.
                wire.wait_until(lambda: (self.fds(), self.user()["fds"]) == (before[0] + 2, before[2] + 2),
                                "two descriptors more")
                self.assertEqual(self.user()["ring_bytes"], before[1] + c.about["ring_bytes"] * 2 + 4096 +
                                 c.about["in_bytes"] + c.about["out_bytes"])
                self.assertEqual(c.call("gqa.ping"), {})
                self.assertEqual(c.close_ring(), {})
                self.assertEqual(c.call("gqa.ping"), {})
                wire.wait_until(lambda: self.user()["ring_bytes"] == before[1], "its memory is given back")
                c.open_ring(ring_bytes=4096 << i)
        self.back_to(before)

    def test_opening_again_as_soon_as_the_last_answer_is_taken(self):
        before = self.baseline()
        small = {"ring_bytes": 4096, "in_bytes": 4096, "out_bytes": 4096}
        with self.connect_ring(**small) as c:
            for _ in range(REOPENINGS):
                c.close_ring()
                c.open_ring(**small)
            self.assertEqual(c.call("gqa.ping"), {})
        self.back_to(before)

    def test_closed_rings_go_although_the_client_says_no_more(self):
        before = self.baseline()
        with self.connect_ring() as c:
            for i in range(REOPENINGS // 4):
                c.close_ring()
                wire.wait_until(lambda: self.user()["ring_bytes"] == before[1], f"round {i}: memory is given back")
                c.open_ring()
        self.back_to(before)

    def test_a_thousand_answers_wait_in_order_across_the_changes(self):
        with self.daemon.connect() as plain:
            c = ring.RingClient.__new__(ring.RingClient)
            wire.Client.__init__(c, sock=plain.sock)
            c.fds, c.shared, c.ring_buffer = [], None, bytearray()
            c.sock.sendall(b"".join(wire.pack([0, i, "gqa.ping", {}]) for i in range(1000, 1500)))
            c.open_ring()
            last = [c.send("gqa.ping") for _ in range(500)]
            closing = c.send("ring.close")
            for id in [*range(1000, 1500), *last, closing]:
                self.assertEqual(c.wait(id), {})
            c.forget_ring()
            self.assertEqual(c.call("gqa.ping"), {})


class Area(RingCase):
    """Tensors and prompts beside the rings, named by handle."""
    flags = ("--model", "tiny")

    def logits(self, c, tokens):
        id = c.send("text.logits", {"model": "tiny", "tokens": tokens})
        c.wait(id)
        return [e["logits"] for e in c.events.pop(id)]

    def test_tensors_lie_there_until_they_are_given_back(self):
        tokens = list(range(3, 203))
        whole = b"".join(t["data"] for t in self.logits(self.client, tokens))
        with self.connect_ring(out_bytes=len(whole) * 3 // 2 + 8192) as c:
            for round in range(6):
                tensors = self.logits(c, tokens)
                self.assertEqual(b"".join(c.data(t) for t in tensors), whole)
                by_handle = [t for t in tensors if isinstance(t["data"], dict)]
                if round != 1:  # in which the first one's are still held, and there is no room for all
                    self.assertEqual(len(by_handle), len(tensors))
                else:
                    self.assertLess(len(by_handle), len(tensors))
                if round > 0:
                    c.give(*tensors, *held)
                held = tensors if round == 0 else []

    def test_what_is_given_back_wrongly_harms_nobody(self):
        with self.connect_ring() as c:
            c.put(wire.pack([2, "$give", [0, 1, 64, 1 << 40, 0xFFFFFFFFFFFFFFFF, -1, "x", None]]))
            c.put(wire.pack([2, "$give", []]))
            tensors = self.logits(c, PROMPT * 10)
            c.give(*tensors)
            c.give(*tensors)
            self.assertEqual(b"".join(c.data(t) for t in self.logits(c, PROMPT * 10)),
                             b"".join(t["data"] for t in self.logits(self.client, PROMPT * 10)))
        self.client.sock.sendall(wire.pack([2, "$give", [0]]))
        self.assertEqual(self.client.call("gqa.ping"), {})

    def test_prompts_by_handle(self):
        with self.connect_ring() as c:
            c.area[64:64 + 4 * len(PROMPT)] = struct.pack(f"<{len(PROMPT)}i", *PROMPT)
            params = {"model": "tiny", "n_predict": 10, "ignore_eos": True, "temperature": 0}
            want = self.client.generate(tokens=PROMPT, **params)["tokens"]
            self.assertEqual(c.generate(tokens={"ring": 64, "bytes": 4 * len(PROMPT)}, **params)["tokens"], want)
            text = b"Once upon a time"
            c.area[4096:4096 + len(text)] = text
            self.assertEqual(c.call("text.tokenize", {"model": "tiny", "text": {"ring": 4096, "bytes": len(text)}}),
                             self.client.call("text.tokenize", {"model": "tiny", "text": text}))

    def test_token_ids_may_be_binary(self):
        params = {"model": "tiny", "n_predict": 10, "ignore_eos": True, "temperature": 0}
        packed = struct.pack(f"<{len(PROMPT)}i", *PROMPT)
        self.assertEqual(self.client.generate(tokens=packed, **params)["tokens"],
                         self.client.generate(tokens=PROMPT, **params)["tokens"])
        for bad, word in ((packed[:-1], "4 bytes"), (struct.pack("<i", -1), "token id")):
            self.refused("INVALID_PARAMS", "text.detokenize", {"model": "tiny", "tokens": bad}, "tokens", word)

    def test_handles_that_lead_outside(self):
        with self.connect_ring(in_bytes=4096) as c:
            for first, n in ((4096, 4), (0, 4100), (4093, 4), (1 << 63, 1 << 63), (0xFFFFFFFFFFFFFFFC, 8)):
                with self.assertRaises(wire.Refused) as caught:
                    c.call("text.detokenize", {"model": "tiny", "tokens": {"ring": first, "bytes": n}})
                self.assertEqual(caught.exception.name, "INVALID_PARAMS")
                for word in ("tokens", str(first), str(n), "4096"):
                    self.assertIn(word, caught.exception.message)
            self.assertEqual(c.call("gqa.ping"), {})
        self.refused("INVALID_PARAMS", "text.detokenize", {"model": "tiny", "tokens": {"ring": 0, "bytes": 4}},
                     "tokens", "no rings")


class Refusals(RingCase):
    config = "max_ring_bytes_per_user = 1M\n"

    def test_sizes_are_checked(self):
        self.refused("INVALID_PARAMS", "ring.open", {"ring_bytes": 5000}, "ring_bytes", "power of two")
        self.refused("INVALID_PARAMS", "ring.open", {"ring_bytes": 2048}, "ring_bytes", "4096")
        self.refused("INVALID_PARAMS", "ring.open", {"in_bytes": 1 << 31}, "in_bytes")
        self.refused("INVALID_PARAMS", "ring.open", {"out_bytes": 1}, "out_bytes")
        self.refused("NOT_FOUND", "ring.close", {}, "no rings")

    def test_one_user_has_so_much_of_it(self):
        before = self.baseline()
        e = self.refused("BUSY", "ring.open", {"out_bytes": 1 << 20}, "max_ring_bytes_per_user", "1048576")
        self.assertGreater(e.error["retry_after_ms"], 0)
        self.assertEqual(self.client.call("gqa.hello")["limits"]["ring_bytes_per_user"], 1 << 20)
        half = {"ring_bytes": 4096, "in_bytes": 4096, "out_bytes": 400 << 10}
        with self.connect_ring(**half), self.connect_ring(**half):
            with self.assertRaises(wire.Refused):
                self.connect_ring(**half)
        self.back_to(before)
        self.connect_ring(**half).close()

    def test_a_connection_has_one(self):
        with self.connect_ring(ring_bytes=4096, in_bytes=4096, out_bytes=4096) as c:
            with self.assertRaises(wire.Refused) as caught:
                c.call("ring.open")
            self.assertEqual(caught.exception.name, "EXISTS")


    def test_descriptors_that_nobody_receives(self):
        """Looking at them is not enough: in flight they count against the whole daemon."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(self.daemon.socket)
            sock.settimeout(wire.TIMEOUT_S)
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
            small = {"ring_bytes": 4096, "in_bytes": 4096, "out_bytes": 4096}
            c = ring.RingClient(sock=Peeking(sock), **small)
            with self.assertRaises(wire.Refused) as caught:
                for _ in range(8):
                    c.close_ring()
                    c.open_ring(**small)
            self.assertEqual(caught.exception.name, "BUSY")
            self.assertIn("received first", caught.exception.message)
            self.assertEqual(c.call("gqa.ping"), {})
            while select.select([sock], [], [], 0)[0]:
                _, fds = ring.receive_fds(sock, 4096)
                for fd in fds:
                    os.close(fd)
            c.open_ring(**small)
            c.forget_ring()


class Memory(RingCase):
    def test_the_daemon_makes_and_seals_it(self):
        with self.connect_ring() as c:
            for fd in c.fds[:2]:
                self.assertEqual(fcntl.fcntl(fd, 1034) & 7, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)  # F_GET_SEALS
                for bytes in (0, 4096, 1 << 30):
                    with self.assertRaises(PermissionError):
                        os.ftruncate(fd, bytes)
            self.assertEqual(c.call("gqa.ping"), {})

    def test_memory_goes_back_although_the_client_keeps_it(self):
        before, kib = self.baseline(), self.shared_kib()
        with self.connect_ring(out_bytes=8 << 20, in_bytes=8 << 20) as c:
            c.area[:] = b"\xff" * len(c.area)
            fds = [os.dup(fd) for fd in c.fds]
        self.back_to(before)
        try:
            self.assertEqual(os.stat(fds[1]).st_blocks, 0)
            self.assertEqual(os.stat(fds[0]).st_blocks, 0)
            self.assertLess(self.shared_kib(), kib + 1024)
        finally:
            for fd in fds:
                os.close(fd)

    def test_a_client_killed_with_its_ring_open(self):
        before = self.baseline()
        for i in range(8):
            pid = os.fork()
            if pid == 0:
                try:
                    c = self.connect_ring()
                    for _ in range(20 * i):
                        c.send("gqa.ping")
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(pid, 0)
        self.back_to(before)


class Hostile(RingCase):
    """A client may do to the shared bytes what it likes: it is cut, or ignored, and nobody else notices."""
    flags = ("--model", "tiny")
    config = "reader_timeout_ms = 1500\n"

    def cut(self, harm, what):
        before = self.baseline()
        with self.connect_ring() as c:
            self.assertEqual(c.call("gqa.ping"), {})
            harm(c)
            c.ring_doorbell()
            c.sock.settimeout(wire.TIMEOUT_S)
            while c.sock.recv(4096):
                pass
        self.back_to(before)
        self.assertIn(what, self.daemon.log_text())

    def test_indices_that_cannot_be(self):
        for value in (4, 1 << 20, 0x80000000, 0xFFFFFFF8):
            self.cut(lambda c: c.set_word(ring.SUB_TAIL, c.tail + value), "submission ring is nonsense")

        def head(c):  # far ahead of all that can have been put when it is looked at
            c.set_word(ring.COMP_HEAD, c.head + 0x80000000)
            c.put(wire.pack([0, 9, "gqa.api_info", {}]) * 40)
        self.cut(head, "completion ring's head is nonsense")

    def test_records_that_cannot_be(self):
        for n, left in ((0, 0), (1 << 20, 0), (64, 0xFFFFFFFF), (0xFFFFFFFF, 0), (200, 0)):
            def harm(c):
                c.write(c.tail, struct.pack("II", n, left) + bytes(64))
                c.set_word(ring.SUB_TAIL, c.tail + 72)
            self.cut(harm, "submission ring is nonsense")

    def test_bytes_that_are_no_message(self):
        with self.connect_ring() as c:
            c.put(b"\xc1" * 10)
            while c.receive():
                pass
            self.assertEqual([p[0]["name"] for m, p in c.notifications if m == "gqa.error"], ["INVALID_REQUEST"])

    def test_a_reader_that_takes_nothing_is_cut(self):
        before = self.baseline()
        with self.connect_ring(ring_bytes=4096) as c:
            c.sock.settimeout(wire.TIMEOUT_S)
            message = wire.pack([0, 5, "gqa.api_info", {}])
            for at in range(40):
                c.write(c.tail, struct.pack("II", len(message), 0) + message)
                c.tail += 8 + (len(message) + 7) // 8 * 8
            c.set_word(ring.SUB_TAIL, c.tail)
            c.ring_doorbell()
            self.assertEqual(self.client.call("gqa.ping"), {})
            self.assertEqual(c.sock.recv(1), b"")
        self.back_to(before)
        self.assertIn("did not read its answers", self.daemon.log_text())

    def test_a_doorbell_that_rings_for_nothing(self):
        """It is not listened to for a moment: the loop sleeps, and whoever rings waits for the next tick."""
        turns = lambda: self.client.call("server.stats")["loop"]["turns_total"]
        with self.connect_ring() as c:
            before, start = turns(), time.monotonic()
            for _ in range(20000):
                os.eventfd_write(c.doorbell, 1)
            self.assertLess(turns() - before, 400 * (time.monotonic() - start + 2))
            self.assertEqual(c.call("gqa.ping"), {})
            for _ in range(200):  # with something in the ring it may ring as it likes
                os.eventfd_write(c.doorbell, 1)
                self.assertEqual(c.call("gqa.ping"), {})

    def test_a_doorbell_that_would_block_its_reader(self):
        """O_NONBLOCK is the client's to clear, and the count to fill or to drain."""
        with self.connect_ring() as c:
            flags = fcntl.fcntl(c.doorbell, fcntl.F_GETFL)
            fcntl.fcntl(c.doorbell, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
            for _ in range(200):
                os.eventfd_write(c.doorbell, 0xFFFFFFFFFFFFFFFE - 1)
                self.assertEqual(self.client.call("gqa.ping"), {})
            self.assertEqual(c.call("gqa.ping"), {})

    def test_a_stopped_client(self):
        before = self.baseline()
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                c = self.connect_ring(ring_bytes=4096)
                c.send("gqa.api_info")  # many times what the ring holds
                os.write(tell, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.read(ready, 1)
        os.kill(pid, signal.SIGSTOP)
        try:
            r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=50, ignore_eos=True)
            self.assertEqual(r["n_generated"], 50)
            self.back_to(before)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ready)
            os.close(tell)


class Ends(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.daemon = Daemon(self.folder.path)

    def tearDown(self):
        self.daemon.kill()
        self.folder.remove()

    def test_the_daemon_drains_and_the_last_answers_are_taken(self):
        with ring.RingClient(self.daemon.socket) as c:
            id = c.send("server.drain", {"timeout_ms": 1000})
            self.assertEqual(c.wait(id), {})
            while c.receive():
                pass
        self.assertEqual(self.daemon.wait(), 0)

    def test_the_daemon_is_killed(self):
        with ring.RingClient(self.daemon.socket) as c:
            self.daemon.kill()
            c.send("gqa.ping")
            self.assertFalse(c.receive())


if __name__ == "__main__":
    main()
