"""Clients that are wrong, greedy, slow or gone: nobody else may notice."""
import array
import os
import resource
import shutil
import socket
import sys
import traceback
import unittest

import wire
from harness import DaemonCase, main, synth
from ring import RingClient

PROMPT = [1, 40, 41, 42, 43, 44]
STRANGER = 65533  # a uid without a name


class Frames(DaemonCase):
    def refused_stream(self, data):
        """The bytes end the connection, after an INVALID_REQUEST; others are served on."""
        with self.daemon.connect() as bad:
            try:
                bad.sock.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it did not wait for the rest
            bad.wait_end()
            errors = [e for e, _ in bad.answers.values()] + [p[0] for m, p in bad.notifications if m == "gqa.error"]
            self.assertEqual([e["name"] for e in errors], ["INVALID_REQUEST"])
        self.assertEqual(self.client.call("gqa.ping"), {})
        return errors[0]

    def test_an_announced_giant_is_refused_at_once(self):
        for head in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x94\x00\x01\xa4ping\xdb\xff\xff\xff\xff",
                     b"\xc6\x7f\xff\xff\xff"):
            with self.subTest(head):
                self.refused_stream(head)

    def test_a_frame_over_the_limit_is_refused(self):
        text = b"x" * (16 << 20)
        self.refused_stream(wire.pack([0, 1, "gqa.ping", {"text": text}]))

    def test_nesting_is_bounded(self):
        self.refused_stream(b"\x91" * 100000)
        self.refused_stream(b"\x94\x00\x01\xa8gqa.ping" + b"\x81\xa1x" * 20 + b"\xc0")

    def test_no_messagepack_and_no_message(self):
        self.refused_stream(b"\xc1" * 10)
        self.refused_stream(b"GET / HTTP/1.1\r\n\r\n")
        self.refused_stream(wire.pack({"jsonrpc": "2.0"}))
        self.refused_stream(wire.pack([9, 1, "gqa.ping", {}]))

    def test_a_fault_with_an_id_is_answered_to_that_id(self):
        with self.daemon.connect() as bad:
            bad.sock.sendall(wire.pack([0, 77, 5, {}]))
            bad.wait_end()
            self.assertEqual(bad.answers[77][0]["name"], "INVALID_REQUEST")

    def test_messages_may_come_byte_by_byte(self):
        with self.daemon.connect() as slow:
            for byte in wire.pack([0, 5, "gqa.hello", {"client": "slow"}]):
                slow.sock.sendall(bytes([byte]))
            self.assertEqual(slow.wait(5)["server"], "gqad")

    def test_a_long_message_keeps_its_place_in_the_order(self):
        with self.daemon.connect() as c:
            long = wire.pack([0, 1, "text.tokenize", {"model": "nobody", "text": b"x" * (4 << 20)}])
            c.sock.sendall(long + wire.pack([0, 2, "gqa.ping", {}]))
            with self.assertRaises(wire.Refused):
                c.wait(1)
            self.assertEqual(c.wait(2), {})

    def test_a_thousand_requests_in_one_write(self):
        with self.daemon.connect() as c:
            c.sock.sendall(b"".join(wire.pack([0, i, "gqa.ping", {}]) for i in range(1000, 2000)))
            for i in range(1000, 2000):
                self.assertEqual(c.wait(i), {})

    def test_descriptors_are_refused_with_the_connection(self):
        before = len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))
        for _ in range(5):
            with self.daemon.connect() as bad:
                with open(os.devnull) as f:
                    fds = array.array("i", [f.fileno()] * 20)
                    bad.sock.sendmsg([wire.pack([0, 1, "gqa.ping", {}])],
                                     [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                bad.wait_end()
                self.assertEqual(bad.answers, {})
        wire.wait_until(lambda: len(os.listdir(f"/proc/{self.daemon.process.pid}/fd")) <= before,
                        "no descriptor is left behind")

    def test_binary_fields_with_every_byte(self):
        self.refused("INVALID_PARAMS", "gqa.hello", {"client": "a\0b"}, "client")
        self.refused("INVALID_PARAMS", "gqa.hello", {"client": "x" * 256}, "client", "255")


class Vanishing(DaemonCase):
    flags = ("--parallel", "2", "--model", "tiny")

    def test_a_client_that_vanishes_frees_its_sequences(self):
        for _ in range(3):
            gone = [self.daemon.connect() for _ in range(4)]
            ids = [c.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 2000,
                                            "ignore_eos": True}) for c in gone]
            gone[0].wait_events(ids[0], 1)
            for c in gone:
                c.close()
            self.wait_idle()
        self.assertEqual(self.client.call("server.stats")["connections"], 1)

    def test_a_client_that_vanishes_while_its_model_loads(self):
        self.client.call("model.unload", {"model": "tiny"})
        with self.daemon.connect() as gone:
            gone.send("text.generate", {"model": "tiny", "tokens": PROMPT})
        r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=3, ignore_eos=True)
        self.assertEqual(r["n_generated"], 3)

    def test_a_client_that_vanishes_inside_of_a_message(self):
        for cut in (1, 3, 10, 100, 70000):
            with self.daemon.connect() as gone:
                gone.sock.sendall(wire.pack([0, 1, "text.tokenize", {"model": "tiny", "text": b"x" * 100000}])[:cut])
        self.assertEqual(self.client.call("gqa.ping"), {})


class Slow(DaemonCase):
    flags = ("--parallel", "4", "--model", "tiny")
    config = "reader_timeout_ms = 1500\n"

    def test_a_slow_reader_does_not_hold_the_others_and_is_cut(self):
        with self.daemon.connect() as slow:
            slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(4):
                slow.send("text.logits", {"model": "tiny", "tokens": [5] * 2000})
            other = self.client.generate(model="tiny", tokens=PROMPT, n_predict=50, ignore_eos=True)
            self.assertEqual(other["n_generated"], 50)
            wire.wait_until(lambda: self.client.call("server.stats")["connections"] == 1, "the slow reader is cut")
        self.wait_idle()

    def test_a_reader_that_pauses_gets_everything(self):
        with self.daemon.connect() as c:
            c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            # One write: a client that only writes while its answers wait is what the timeout is for.
            c.sock.sendall(b"".join(wire.pack([0, i, "gqa.api_info", {}]) for i in range(1000, 1200)))
            answers = [c.wait(i) for i in range(1000, 1200)]
            self.assertEqual(answers, [answers[0]] * 200)
            id = c.send("text.logits", {"model": "tiny", "tokens": [5] * 2000})
            c.wait(id)
            self.assertEqual(sum(e["logits"]["shape"][0] for e in c.events[id]), 2000)


class Paused(DaemonCase):
    flags = ("--parallel", "4", "--model", "tiny")
    config = "paused_timeout_ms = 50\n"

    def test_a_paused_request_gives_its_place_and_blocks_back(self):
        # 32 MB of logits each: the engine pauses them long before their end.
        synth(os.path.join(self.folder.path, "models", "wide.gguf"), "tiny,n_vocab=4096")
        self.client.call("model.load", {"model": "wide"})
        before = self.client.call("server.stats")["requests_total"]
        with self.daemon.connect() as slow:
            slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            ids = [slow.send("text.logits", {"model": "wide", "tokens": [5] * 2000}) for _ in range(4)]
            other = self.client.generate(model="tiny", tokens=PROMPT, n_predict=20, ignore_eos=True)
            self.assertEqual(other["n_generated"], 20)
            wire.wait_until(lambda: self.client.call("server.stats")["requests_total"] == before + 5, "all have begun")
            self.wait_idle()  # while the slow reader is still connected
            for id in ids:
                with self.assertRaises(wire.Refused) as caught:
                    slow.wait(id)
                self.assertEqual(caught.exception.name, "DEADLINE")
                self.assertIn("paused_timeout_ms", caught.exception.message)
            self.assertEqual(slow.call("gqa.ping"), {})


class Unread(DaemonCase):
    flags = ("--parallel", "2", "--model", "tiny")
    config = "max_output_bytes_per_user = 4M\n"
    N_CALLS, N_ROWS = 24, 700  # 11 MB each, of which one alone is let make 8 ahead of its reader

    def resident_bytes(self):
        with open(f"/proc/{self.daemon.process.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def test_rows_that_nobody_reads_are_bounded_for_all_calls_together(self):
        synth(os.path.join(self.folder.path, "models", "wide.gguf"), "tiny,n_vocab=4096")
        self.client.call("model.load", {"model": "wide"})
        long = {"model": "tiny", "tokens": PROMPT, "n_predict": 1900, "ignore_eos": True}
        first, clock = self.client.send("text.generate", long), self.client.send("text.generate", long)
        self.client.wait_events(clock, 1)
        with self.daemon.connect() as c:
            ids = [c.send("text.logits", {"model": "wide", "tokens": [5 + i] * self.N_ROWS})
                   for i in range(self.N_CALLS)]
            wire.wait_until(lambda: self.daemon.stats()["num_requests_waiting"] == self.N_CALLS, "all wait for a place")
            before = self.resident_bytes()
            self.client.cancel(first)
            self.client.wait(clock)  # steps in which they could have made all that they may
            self.assertLess(self.resident_bytes() - before, 64 << 20)
            for id in ids:
                c.wait(id)
                self.assertEqual(sum(e["logits"]["shape"][0] for e in c.events.pop(id)), self.N_ROWS)
        self.wait_idle()


class Limits(DaemonCase):
    config = ("handshake_timeout_ms = 300\nmax_connections_per_user = 20\nmax_calls_per_connection = 5\n"
              "parallel = 1\nqueue_size = 2\n")

    def setUp(self):
        super().setUp()
        self.client.call("gqa.ping")

    def test_silent_connections_are_closed(self):
        with self.daemon.connect() as silent:
            self.assertEqual(silent.sock.recv(1), b"")

    def test_one_user_has_so_many_connections(self):
        held = []
        try:
            with self.assertRaises(EOFError):
                for _ in range(30):
                    held.append(self.daemon.connect())
                    held[-1].call("gqa.ping")
            self.assertEqual(len(held), 20)  # the last is the refused one; self.client is the first
            refusal = held[-1].notifications[0][1][0]
            self.assertEqual(refusal["name"], "BUSY")
            self.assertIn("max_connections_per_user", refusal["message"])
            self.assertGreater(refusal["retry_after_ms"], 0)
        finally:
            for c in held:
                c.close()
        wire.wait_until(lambda: self.client.call("server.stats")["connections"] == 1, "all have left")

    def test_full_queues_answer_busy(self):
        self.client.call("model.load", {"model": "tiny"})
        params = {"model": "tiny", "tokens": PROMPT, "n_predict": 1500, "ignore_eos": True}
        with self.daemon.connect() as c:
            running = c.send("text.generate", params)
            c.wait_events(running, 1)
            others = [c.send("text.generate", params) for _ in range(7)]
            busy = 0
            for id in others[::-1][:4]:
                with self.assertRaises(wire.Refused) as caught:
                    c.wait(id)
                self.assertEqual(caught.exception.name, "BUSY")
                self.assertGreater(caught.exception.error["retry_after_ms"], 0)
                busy += 1
            self.assertEqual(busy, 4)
        self.wait_idle()


class Quotas(DaemonCase):
    flags = ("--model", "tiny", "--parallel", "1")
    config = "max_queued_tokens_per_user = 100\nmax_sequences_per_user = 4\n"

    def user(self):
        (user,) = self.client.call("server.stats")["users"]
        return user

    def test_a_quota_is_named_by_its_refusal_and_shown(self):
        limits = self.client.call("gqa.hello")["limits"]
        self.assertEqual((limits["queued_tokens_per_user"], limits["sequences_per_user"]), (100, 4))
        before = self.user()
        e = self.refused("BUSY", "text.generate", {"model": "tiny", "tokens": [1] * 101}, "has 0 tokens",
                         "101", "100", "max_queued_tokens_per_user", f"uid {os.geteuid()}")
        self.assertGreater(e.error["retry_after_ms"], 0)
        after = self.user()
        self.assertEqual(after["refused"], before["refused"] + 1)
        self.assertEqual(after["uid"], os.geteuid())
        self.assertEqual((after["connections"], after["fds"], after["calls"]), (1, 1, 1))
        self.refused("BUSY", "text.embed", {"model": "tiny", "inputs": ["a"] * 5, "pooling": "mean"},
                     "5 more", "max_sequences_per_user")
        self.client.generate(model="tiny", tokens=[1] * 100, n_predict=1)
        self.assertEqual((self.user()["queued_tokens"], self.user()["sequences"]), (0, 0))

    def test_waiting_tokens_count_until_they_are_computed(self):
        params = {"model": "tiny", "tokens": [1] * 40, "n_predict": 2000, "ignore_eos": True}
        with self.daemon.connect() as c:
            running = c.send("text.generate", params)
            c.wait_events(running, 1)
            waiting = [c.send("text.generate", params) for _ in range(3)]
            with self.assertRaises(wire.Refused) as caught:
                c.wait(waiting[2])
            self.assertEqual(caught.exception.name, "BUSY")
            user = self.user()
            self.assertEqual((user["queued_tokens"], user["queued_requests"], user["sequences"]), (80, 2, 3))
        self.wait_idle()
        wire.wait_until(lambda: self.user()["sequences"] == 0, "nothing is held for who is gone")

    def test_limits_change_with_a_reload(self):
        path = os.path.join(self.folder.path, "gqad.conf")
        with open(path) as f:
            text = f.read()
        try:
            with open(path, "a") as f:
                f.write("max_queued_tokens_per_user = 7\n")
            self.client.call("server.reload")
            self.refused("BUSY", "text.generate", {"model": "tiny", "tokens": [1] * 8}, "is 7 ")
        finally:
            with open(path, "w") as f:
                f.write(text)
            self.client.call("server.reload")

    def test_the_loops_turns_are_measured(self):
        loop = self.client.call("server.stats")["loop"]
        self.assertGreater(loop["turns_total"], 0)
        self.assertGreaterEqual(loop["turn_ms_max"], loop["turn_ms_mean"])
        self.assertGreater(loop["turn_cpu_ms_max"], 0)


class Incoming(DaemonCase):
    """What clients send is in a quota as long as the daemon holds it."""
    flags = ("--model", "tiny")
    config = "max_input_bytes_per_user = 1M\n"
    LONG = wire.pack([0, 1, "text.tokenize", {"model": "tiny", "text": "x" * 700000}])

    def user(self):
        (user,) = self.client.call("server.stats")["users"]
        return user

    def test_unfinished_messages_hold_no_more_than_the_quota(self):
        peers = [self.daemon.connect() for _ in range(6)]
        try:
            for c in peers:
                c.sock.sendall(self.LONG[:-1])
            refused = []
            for c in peers[1:]:
                with self.assertRaises(wire.Refused) as caught:
                    c.wait(1)
                self.assertEqual(caught.exception.name, "BUSY")
                self.assertIn("max_input_bytes_per_user", caught.exception.message)
                self.assertGreater(caught.exception.error["retry_after_ms"], 0)
                refused.append(c)
            self.assertGreaterEqual(self.user()["input_bytes"], 700000)
            self.assertLessEqual(self.user()["input_bytes"], 1 << 20)
            self.assertLess(self.user()["strikes"], 100)  # less than one for a broken protocol
            for c in refused:  # the message is over, and the connection as good as before
                c.sock.sendall(self.LONG[-1:])
                self.assertEqual(c.call("gqa.ping"), {})
            peers[0].sock.sendall(self.LONG[-1:])
            self.assertGreater(len(peers[0].wait(1)["tokens"]), 0)
            wire.wait_until(lambda: self.user()["input_bytes"] == 0, "what was taken is given back")
            refused[0].sock.sendall(self.LONG)
            self.assertGreater(len(refused[0].wait(1)["tokens"]), 0)
        finally:
            for c in peers:
                c.close()

    def test_whoever_leaves_inside_of_a_message_gives_its_bytes_back(self):
        with self.daemon.connect() as gone:
            gone.sock.sendall(self.LONG[:-1])
            wire.wait_until(lambda: self.user()["input_bytes"] > 0, "its bytes are held")
        wire.wait_until(lambda: self.user()["input_bytes"] == 0, "they are given back")

    def test_values_count_with_what_they_take(self):
        with self.daemon.connect() as c:
            c.sock.sendall(wire.pack([0, 1, "gqa.ping", {"x": [0] * 60000}]) + wire.pack([0, 2, "gqa.ping", {}]))
            with self.assertRaises(wire.Refused) as caught:
                c.wait(1)
            self.assertEqual(caught.exception.name, "BUSY")
            self.assertEqual(c.wait(2), {})
            c.sock.sendall(wire.pack([2, "$give", [0] * 60000]))  # nothing that could be answered
            c.wait_end()
            self.assertEqual([p[0]["name"] for m, p in c.notifications if m == "gqa.error"], ["BUSY"])


class Dribbling(DaemonCase):
    config = "reader_timeout_ms = 300\n"

    def test_a_message_that_comes_byte_by_byte_for_ever_is_cut(self):
        with self.daemon.connect() as slow:
            slow.sock.sendall(wire.pack([0, 1, "gqa.ping", {"x": "x" * 100000}])[:100])
            slow.sock.setblocking(False)

            def is_cut():
                try:
                    slow.sock.sendall(b"x")
                    return slow.sock.recv(1) == b""
                except BlockingIOError:
                    return False
                except (BrokenPipeError, ConnectionResetError):
                    return True
            wire.wait_until(is_cut, "it is cut, though it never was silent")
        self.assertIn("a message came too slowly", self.daemon.log_text())


class Lines(DaemonCase):
    """What clients do again and again is not logged again and again."""
    config = "handshake_timeout_ms = 100\n"

    @classmethod
    def make_models(cls, folder):
        with open(os.path.join(folder, "broken.gguf"), "wb") as f:
            f.write(b"GGUF" + b"\xff" * 100)

    def count(self, text):
        return self.daemon.log_text().count(text)

    def test_a_refused_model_is_a_line(self):
        for _ in range(5):
            with self.assertRaises(wire.Refused):
                self.client.call("text.generate", {"model": "broken", "prompt": "x"})
        self.assertEqual(self.count("model 'broken' was not loaded"), 1)

    def test_a_purge_of_nothing_is_none(self):
        for _ in range(3):
            self.assertEqual(self.client.call("kv.purge")["bytes"], 0)
        self.assertEqual(self.count("purged"), 0)

    def test_silent_connections_are_a_few_lines(self):
        self.client.call("gqa.ping")
        silent = [self.daemon.connect() for _ in range(40)]
        for c in silent:
            c.wait_end()
            c.close()
        self.assertIn(self.count("no message within the handshake's time"), range(1, 17))


class Descriptors(DaemonCase):
    """The daemon runs out of descriptors, says so, and recovers."""
    config = "max_connections_per_user = 5000\n"

    def test_running_out_and_recovering(self):
        pid = self.daemon.process.pid
        in_use = len(os.listdir(f"/proc/{pid}/fd"))
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + 10, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        held = []
        try:
            for _ in range(40):
                held.append(self.daemon.connect())
            refused = held[-1]
            refused.wait_end()
            self.assertEqual(refused.notifications[0][1][0]["name"], "BUSY")
            self.assertEqual(self.client.call("gqa.ping"), {})
            self.assertEqual(self.daemon.log_text().count("no descriptors left"), 1)  # of dozens
        finally:
            for c in held:
                c.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
        wire.wait_until(lambda: self.client.call("server.stats")["connections"] == 1, "all have left")
        with self.daemon.connect() as c:
            self.assertEqual(c.call("gqa.ping"), {})


SETPRIV = shutil.which("setpriv")


@unittest.skipIf(os.geteuid() == 0 and SETPRIV is None,
                 "no setpriv here: too many descriptors in flight were NOT provoked")
class InFlight(DaemonCase):
    """The kernel bounds the descriptors of a user that lie unread in sockets, but for the privileged."""
    if os.geteuid() == 0:
        prefix = (SETPRIV, "--inh-caps=-all", "--bounding-set=-sys_admin,-sys_resource")

    def limit_descriptors(self):
        """As few as the daemon gets on with."""
        pid = self.daemon.process.pid
        limit = len(os.listdir(f"/proc/{pid}/fd")) + 10
        self.assertLess(limit, 250)  # so many go into one message
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        self.addCleanup(resource.prlimit, pid, resource.RLIMIT_NOFILE, old)
        return limit

    def test_rings_whose_descriptors_the_kernel_refuses(self):
        limit = self.limit_descriptors()
        RingClient(self.daemon.socket).close()
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull) as f:
            socket.send_fds(ours, [b"x"], [f.fileno()] * (limit + 1))
            with self.assertRaisesRegex(EOFError, "closed the connection"):
                RingClient(self.daemon.socket)
            self.assertIn("its answers cannot be sent (Too many references", self.daemon.log_text())
            self.assertEqual(self.client.call("gqa.ping"), {})
        with RingClient(self.daemon.socket) as c:
            self.assertEqual(c.call("gqa.ping"), {})
        wire.wait_until(lambda: self.held() == {"connections": 1, "fds": 1, "ring_bytes": 0}, "all is given back")

    def held(self):
        (user,) = self.client.call("server.stats")["users"]
        return {name: user[name] for name in ("connections", "fds", "ring_bytes")}


def as_stranger(folder, action, groups=()):
    """Runs action() in a child of another uid, and returns its status. Its folder is the current one, so
    that the path to the socket need not be open to it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.chdir(folder)
            os.setgroups(groups)
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            status = action()
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@unittest.skipUnless(os.geteuid() == 0, "needs root to become somebody else")
class Strangers(DaemonCase):
    def test_a_private_daemon_serves_its_own_user_only(self):
        folder = self.folder.path
        os.chmod(os.path.join(folder, "s"), 0o666)  # the mode alone must not be what protects
        os.chmod(folder, 0o711)

        def action():
            with wire.Client("s") as c:
                c.send("gqa.ping")
                c.wait_end()
                return 0 if not c.answers and c.notifications[0][1][0]["name"] == "ACCESS_DENIED" else 1
        self.assertEqual(as_stranger(folder, action), 0)


if __name__ == "__main__":
    main()
