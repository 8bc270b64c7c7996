"""The task pool: users take turns, who leaves takes along what waits, and the end waits for what runs.

What holds the pool's threads are self-tests of a plugin that go on when the test lets go of a lock, so that who is
served and who is not does not depend on time."""
import fcntl
import os
import shutil
import signal
import unittest

import wire
from harness import Daemon, Folder, main
from ring import RingClient
from test_hostile import STRANGER, as_stranger

PLUGINS = os.environ["GQAD_TEST_PLUGINS"]
CPU = os.environ["GQAD_TEST_CPU"]
IS_ROOT = os.geteuid() == 0
N_ALONE = 3  # threads that a user has while no other one waits
QUOTAS = ("connections", "fds", "calls", "queued_requests", "queued_tokens", "sequences", "input_bytes", "ring_bytes")
needs_root = unittest.skipUnless(IS_ROOT, "needs root to become somebody else: turns of two users were NOT tested")


def encode(client):
    """A text that is encoded on the pool."""
    return client.send("text.tokenize", {"model": "tiny", "text": "x" * 5000})


def take_apart(client):
    """A message that is taken apart there."""
    return client.send("text.detokenize", {"model": "tiny", "tokens": [5] * 5000})


class Pool(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        plugins = os.path.join(self.folder.path, "plugins")
        os.mkdir(plugins, 0o700)
        for source in (CPU, os.path.join(PLUGINS, "counted.so")):
            shutil.copy(source, plugins)
        witness = os.path.join(self.folder.path, "witness")
        self.gate = open(witness, "ab")
        self.daemon = Daemon(self.folder.path, "--plugin-dir", plugins, "--model", "tiny", user=not IS_ROOT,
                             config="drain_timeout_ms = 50\n", environment={"GQAD_TEST_WITNESS": witness})
        os.chmod(self.daemon.socket, 0o666)
        os.chmod(self.folder.path, 0o711)
        self.n_before = os.path.getsize(witness)
        fcntl.flock(self.gate, fcntl.LOCK_EX)

    def tearDown(self):
        self.let_go()
        try:
            self.daemon.stop()
        finally:
            self.daemon.kill()
            self.gate.close()
            self.folder.remove()

    def let_go(self):
        fcntl.flock(self.gate, fcntl.LOCK_UN)

    def n_begun(self):
        return os.path.getsize(self.gate.name) - self.n_before

    def hold(self, client, n=N_ALONE):
        """Self-tests, as many of which begin as may."""
        ids = [client.send("backend.selftest", {"backend": "counted"}) for _ in range(n)]
        wire.wait_until(lambda: self.n_begun() == N_ALONE, "they hold the threads that one user may have")
        return ids

    def held(self, uid=os.geteuid()):
        """What the user holds, as nothing but the question sees it."""
        (user,) = [u for u in self.daemon.stats()["users"] if u["uid"] == uid]
        return {name: user[name] for name in QUOTAS}

    def wait_calls(self, n):
        wire.wait_until(lambda: self.held()["calls"] == n + 1, f"{n} calls are open")

    def refused(self, client, id, name):
        with self.assertRaises(wire.Refused) as caught:
            client.wait(id)
        self.assertEqual(caught.exception.name, name, caught.exception.message)

    def served_to_stranger(self, n):
        """Another user asks for n things at once, and gets them."""
        def action():
            with wire.Client("s") as c:
                for id in [encode(c) for _ in range(n)]:
                    c.wait(id)
            return 0
        self.assertEqual(as_stranger(self.folder.path, action), 0)

    @needs_root
    def test_users_take_turns(self):
        with self.daemon.connect() as c:
            ids = self.hold(c, 12)
            self.served_to_stranger(20)
            self.assertEqual(self.n_begun(), N_ALONE)  # and none of them has ended
            self.assertEqual(self.held()["calls"], 12 + 1)
            self.let_go()
            for id in ids:
                c.wait(id)
        self.assertEqual(self.n_begun(), 12)

    def test_who_is_gone_keeps_nothing_waiting(self):
        before = self.held()
        pid = os.fork()
        if pid == 0:
            c, other = self.daemon.connect(), self.daemon.connect()
            for _ in range(12):
                c.send("backend.selftest", {"backend": "counted"})
            for _ in range(12):
                encode(c)
            take_apart(other)
            signal.pause()
        try:
            wire.wait_until(lambda: self.n_begun() == N_ALONE, "some run")
            wire.wait_until(lambda: self.held()["connections"] == before["connections"] + 2, "it is connected")
            self.wait_calls(24)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.wait_calls(N_ALONE)  # of which nobody will hear either, but they run
        if IS_ROOT:
            self.served_to_stranger(1)
        self.assertEqual(self.n_begun(), N_ALONE)
        self.let_go()
        wire.wait_until(lambda: self.held() == before, f"all is given back: {before}")
        self.assertEqual(self.n_begun(), N_ALONE)

    def test_a_cancel_takes_back_what_waits(self):
        with self.daemon.connect() as c:
            ids = self.hold(c)
            waits = encode(c)
            c.cancel(waits)
            self.refused(c, waits, "CANCELLED")
            self.let_go()
            for id in ids:
                c.wait(id)

    @needs_root
    def test_the_memory_of_rings_is_given_back_in_its_users_turn(self):
        before = self.held()
        with self.daemon.connect() as c:
            self.hold(c)
            RingClient(self.daemon.socket).close()
            wire.wait_until(lambda: self.held()["connections"] == before["connections"] + 1, "its client has left")
            self.served_to_stranger(1)
            self.assertGreater(self.held()["ring_bytes"], 0)
            self.let_go()
            wire.wait_until(lambda: self.held()["ring_bytes"] == 0, "it is given back")

    @needs_root
    def test_a_large_message_is_freed_in_its_users_turn(self):
        before = self.held()["input_bytes"]
        with self.daemon.connect() as c:
            self.hold(c)
            unknown = c.send("text.tokenize", {"model": "unknown", "text": "x" * (3 << 20)})
            self.refused(c, unknown, "NOT_FOUND")
            self.served_to_stranger(1)  # by the thread that is left, after whatever could have come before
            self.assertGreater(self.held()["input_bytes"], before + (2 << 20))
            self.let_go()
            wire.wait_until(lambda: self.held()["input_bytes"] < before + (1 << 20), "it is given back")

    def test_the_end_waits_for_what_runs_only(self):
        with self.daemon.connect() as c, self.daemon.connect() as other:
            running = self.hold(c)
            waiting = [encode(c) for _ in range(5)]
            self.wait_calls(len(running) + len(waiting))
            before = self.held()["input_bytes"]
            unread = take_apart(other)
            wire.wait_until(lambda: self.held()["input_bytes"] > before, "the long message waits to be taken apart")
            self.daemon.signal(signal.SIGTERM)
            for id in waiting:
                self.refused(c, id, "DRAINING")
            self.refused(other, unread, "DRAINING")
            self.assertEqual(self.n_begun(), N_ALONE)
            self.let_go()
            for id in running:
                self.refused(c, id, "DRAINING")
        self.assertEqual(self.daemon.wait(), 0, self.daemon.log_text())
        self.assertNotIn("did not end when they were cancelled", self.daemon.log_text())

    def test_tasks_that_run_beyond_the_end(self):
        with self.daemon.connect() as c, RingClient(self.daemon.socket):
            self.hold(c)
            self.daemon.signal(signal.SIGTERM)
            c.wait_end()
            self.assertEqual(c.answers, {})
            self.assertIsNone(self.daemon.process.poll())  # it waits for them, with all that they use
            self.let_go()
            self.assertEqual(self.daemon.wait(), 0, self.daemon.log_text())
        self.assertIn("3 calls did not end when they were cancelled", self.daemon.log_text())

    def test_the_end_does_not_wait_for_a_task_for_ever(self):
        with self.daemon.connect() as c:
            self.hold(c)
            self.daemon.signal(signal.SIGTERM)
            c.wait_end()
            self.assertEqual(self.daemon.wait(), 0, self.daemon.log_text())  # and nothing has let go of them
        self.assertIn("3 tasks have not ended within 10 s", self.daemon.log_text())


if __name__ == "__main__":
    main()
