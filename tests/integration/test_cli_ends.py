"""Ctrl-C, deaths on either side, and what --spawn leaves behind: nothing but packed weights."""
import json
import os
import re
import signal
import subprocess
import unittest

import wire
from cli import TIMEOUT_S, Outcome, Tool, assert_one_line, environment
from harness import SLOW, Daemon, Folder, main, synth

EXAMPLES = os.environ["GQAD_TEST_EXAMPLES"]
# With SLOW, a generation that would take minutes.
LONG = ("run", "-n", 60000, "--temperature", 0, "--ignore-eos", "--stream", "json", "Once upon a time")


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.model = os.path.join(cls.folder.path, "models", "slow.gguf")
        synth(cls.model, SLOW, "f32")

    @classmethod
    def tearDownClass(cls):
        cls.folder.remove()

    def begin(self, tool, *more):
        """A long generation whose first step has come."""
        process = tool.start(LONG[0], "-m", self.model, *LONG[1:], *more)
        self.addCleanup(self.put_away, process)
        first = process.stdout.readline()
        self.assertTrue(first, process.stderr.read() if not first else "")
        self.assertIn("tokens", json.loads(first))
        return process

    @staticmethod
    def put_away(process):
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)

    @staticmethod
    def end(process):
        out, err = process.communicate(timeout=TIMEOUT_S)
        return Outcome([str(a) for a in process.args[1:]], process.returncode, out, err.decode())


class WithDaemon(Case):
    def setUp(self):
        self.daemon = Daemon(self.folder.path)
        self.gqa = Tool(self.folder.path, "--socket", self.daemon.socket)

    def tearDown(self):
        self.doCleanups()
        if self.daemon.process.returncode is None:
            self.daemon.stop()

    def running(self):
        return self.daemon.stats()["num_requests_running"]

    def test_an_interrupt_cancels_and_the_daemon_goes_on(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            process = self.begin(self.gqa)
            self.assertEqual(self.running(), 1)
            process.send_signal(number)
            done = self.end(process)
            self.assertEqual((done.status, done.err), (130, ""))
            last = done.lines[-1]
            self.assertEqual(last["finish"], "cancelled")
            self.assertLess(last["n_generated"], 60000)
            self.assertEqual(len(last["tokens"]), last["n_generated"])
            self.assertEqual(self.running(), 0)
        self.assertEqual(self.gqa("run", "-m", "tiny", "-n", 2, "--ignore-eos", "--json", "x").json["n_generated"], 2)

    def test_a_killed_client_frees_its_sequence(self):
        process = self.begin(self.gqa)
        self.assertEqual(self.running(), 1)
        process.kill()
        wire.wait_until(lambda: self.running() == 0, "the killed client's request has ended")
        wire.wait_until(lambda: self.daemon.stats()["kv"]["blocks_used"] == 0, "its blocks are free")

    def test_a_reader_that_has_seen_enough_ends_the_generation(self):
        process = self.begin(self.gqa)
        process.stdout.close()
        wire.wait_until(lambda: process.poll() is not None, "gqa ended when nobody read its output", TIMEOUT_S)
        self.assertNotEqual(process.returncode, 0)
        wire.wait_until(lambda: self.running() == 0, "its request has ended")
        process.stdout = open(os.devnull, "rb")

    def test_a_killed_daemon_is_told_in_one_line(self):
        process = self.begin(self.gqa)
        self.daemon.kill()
        done = self.end(process)
        self.assertEqual(done.status, 69, str(done))
        assert_one_line(done)
        self.gqa("ping", status=69)

    def test_stop_lets_the_daemon_end(self):
        self.gqa("stop")
        self.assertEqual(self.daemon.wait(), 0, self.daemon.log_text())
        self.gqa("ping", status=69)

    def test_the_examples_run(self):
        env = {**environment(self.folder.path), "GQA_SOCKET": self.daemon.socket}

        def run(name, *arguments):
            return subprocess.run([os.path.join(EXAMPLES, "example-" + name), *arguments], capture_output=True, env=env,
                                  stdin=subprocess.DEVNULL, timeout=TIMEOUT_S)
        done = run("generate", "tiny", "Once upon a time")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(b"prompt tokens cached", done.stderr)
        done = run("generate", "absent", "x")
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"'absent'", done.stderr)

    def example(self, name, *arguments):
        """An example that goes on; what it prints comes as lines."""
        env = {**environment(self.folder.path), "GQA_SOCKET": self.daemon.socket}
        process = subprocess.Popen([os.path.join(EXAMPLES, "example-" + name), *arguments], env=env,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(self.put_away, process)
        return process

    def test_the_examples_with_a_loop_of_their_own(self):
        for name in ("async_poll", "async_epoll", "async_uv"):
            with self.subTest(name):
                process = self.example(name, "slow", "Once upon a time", "60000")
                self.assertTrue(process.stdout.read(1), "the generation streams")
                process.stdin.write(b"a second call, meanwhile\n")
                process.stdin.flush()
                read_until(process.stdout, rb"\n\[that line is \d+ tokens\]\n")
                process.send_signal(signal.SIGINT)
                done = self.end(process)
                self.assertEqual((done.status, done.err), (0, ""), str(done))
                self.assertRegex(done.out, rb"\n\[ended: cancelled\]\n$")

    def test_the_examples_with_a_loop_tell_that_the_daemon_is_lost(self):
        for name in ("async_poll", "async_epoll", "async_uv"):
            with self.subTest(name):
                process = self.example(name, "slow", "Once upon a time", "60000")
                self.assertTrue(process.stdout.read(1))
                self.daemon.kill()
                done = self.end(process)
                self.assertEqual(done.status, 1, str(done))
                self.assertIn("text.generate: connection lost", done.err)
                self.daemon = Daemon(self.folder.path)

    def test_the_example_that_comes_back(self):
        process = self.example("reconnect")
        self.assertEqual(process.stdout.readline(), b"0 tokens\n")
        self.daemon.kill()
        self.assertIn(b"connection lost", process.stderr.readline())
        self.daemon = Daemon(self.folder.path)
        self.assertEqual(process.stderr.readline(), b"reconnect: connected again\n")
        read_until(process.stdout, rb"0 tokens\n")


def read_until(stream, pattern):
    """Reads what comes until it holds the pattern; the harness ends a test that waits for ever."""
    text = b""
    while not re.search(pattern, text):
        more = stream.read1(4096)
        if not more:
            raise AssertionError(f"no {pattern!r} in {text!r}")
        text += more
    return text


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(p) for p in f.read().split()]


def is_alive(pid):
    """A zombie has ended: whoever inherited it reaps it or does not."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Spawn(Case):
    def setUp(self):
        self.home = os.path.join(self.folder.path, "home")
        os.mkdir(self.home, 0o700)
        self.gqa = Tool(self.home, "--spawn", "-t", 1)

    def tearDown(self):
        self.doCleanups()
        for folder, _, files in os.walk(self.home):
            self.assertTrue(all(self.is_shared(folder, f) for f in files), (folder, files))
        subprocess.run(["rm", "-r", self.home], check=True)

    def is_shared(self, folder, name):
        """Of the user's cache: what speeds up the next start, and tells nothing of prompts."""
        place = os.path.relpath(folder, os.path.join(self.home, "gqad"))
        return ((place == "." and name == "digests") or (place == "weights" and name.endswith(".packed")) or
                (place == "verdicts" and name.endswith(".verdict")))

    def assert_no_files(self):
        """No socket, no temporary folder; HOME, TMPDIR and the XDG folders are all this one."""
        self.assertLessEqual(set(os.listdir(self.home)), {"gqad"})
        cache = os.path.join(self.home, "gqad")
        self.assertLessEqual(set(os.listdir(cache)) if os.path.isdir(cache) else set(),
                             {"digests", "weights", "verdicts"})

    def test_a_command_leaves_nothing(self):
        r = self.gqa("run", "-m", self.model, "-n", 3, "--ignore-eos", "--json", "x").json
        self.assertEqual(r["n_generated"], 3)
        self.assert_no_files()

    def test_names_are_looked_up_where_told(self):
        models = os.path.join(self.folder.path, "models")
        listed = self.gqa("--models-dir", models, "list", "--json").json["models"]
        self.assertEqual({m["name"] for m in listed}, {"tiny", "slow"})
        self.gqa("--models-dir", models, "run", "-m", "tiny", "-n", 1, "x")
        self.gqa("run", "-m", "tiny", "-n", 1, "x", status=1)

    def test_relative_paths_and_a_failure(self):
        os.symlink(self.model, os.path.join(self.home, "m.gguf"))
        self.gqa("tokenize", "-m", "m.gguf", "x")
        os.unlink(os.path.join(self.home, "m.gguf"))
        self.gqa("tokenize", "-m", "m.gguf", "x", status=1)
        self.assert_no_files()

    def test_the_daemon_ends_with_a_killed_client(self):
        process = self.begin(self.gqa)
        daemon, = children(process.pid)
        self.assertTrue(is_alive(daemon))
        process.kill()
        wire.wait_until(lambda: not is_alive(daemon), "the spawned daemon has ended")
        self.assert_no_files()

    def test_an_interrupt_reaches_the_request_and_not_the_daemon_first(self):
        process = self.begin(self.gqa)
        daemon, = children(process.pid)
        process.send_signal(signal.SIGINT)
        done = self.end(process)
        self.assertEqual((done.status, done.err), (130, ""))
        self.assertEqual(done.lines[-1]["finish"], "cancelled")
        self.assertFalse(is_alive(daemon))
        self.assert_no_files()

    def test_a_killed_daemon_is_told_in_one_line(self):
        process = self.begin(self.gqa)
        daemon, = children(process.pid)
        os.kill(daemon, signal.SIGKILL)
        done = self.end(process)
        self.assertEqual(done.status, 69, str(done))
        assert_one_line(done)
        self.assert_no_files()

    def test_a_daemon_that_cannot_start_is_told(self):
        process = self.gqa.start("ping", "--cache-dir", "/proc/absent")
        done = self.end(process)
        self.assertEqual(done.status, 69, str(done))
        self.assertIn("gqa: connect: ", done.err)


if __name__ == "__main__":
    main()
