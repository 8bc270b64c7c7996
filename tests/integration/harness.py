"""A real daemon with a small model, in a folder of its own, for one test class."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

import wire

GQAD = os.environ["GQAD_TEST_GQAD"]
SYNTH = os.environ["GQAD_TEST_SYNTH"]
READY_S = 60
SLOW = "n_layers=4,n_embd=512,n_ff=1024,n_ctx=65536"  # the shape of a model that is slow enough to be interrupted


def synth(path, shape="tiny", type="f32"):
    subprocess.run([SYNTH, "--shape", shape, "--type", type, "-o", path], check=True, stdout=subprocess.DEVNULL)


class Daemon:
    """Starts gqad and waits for its READY. folder holds socket, models, cache and log."""

    def __init__(self, folder, *flags, user=True, config=None, environment=None, prefix=(), models=True,
                 fds=(), listen=True, ready=True):
        self.folder = folder
        self.socket = os.path.join(folder, "s")
        self.log_path = os.path.join(folder, "log")
        command = [*prefix, GQAD] + (["--user"] if user else [])
        if listen:
            command += ["--socket", self.socket]
        command += ["--cache-dir", os.path.join(folder, "cache"), "-t", "1", "--kv-bytes", "256M"]
        if models:
            command += ["--models-dir", os.path.join(folder, "models")]
        path = os.path.join(folder, "gqad.conf")
        if config is not None or not os.path.exists(path):
            with open(path, "w") as f:
                f.write(config or "")
        command += ["--config", path, *flags]
        self.log = open(self.log_path, "ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, pass_fds=fds,
                                        stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
        if ready:
            line = self.process.stdout.readline()
            if line != b"READY\n":
                self.process.wait(READY_S)
                raise AssertionError(f"no READY but {line!r}, status {self.process.returncode}: {self.log_text()}")

    def log_text(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def connect(self):
        return wire.Client(self.socket)

    def stats(self):
        with self.connect() as c:
            return c.call("server.stats")

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, timeout_s=READY_S):
        status = self.process.wait(timeout_s)
        self.process.stdout.close()
        self.log.close()
        return status

    def stop(self):
        """The usual end; a sanitizer's report shows in the status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        status = self.wait()
        if status != 0:
            raise AssertionError(f"gqad ended with {status}: {self.log_text()}")

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


class Folder:
    """A temporary folder with models/tiny.gguf in it."""

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="gqad-test-")
        os.mkdir(os.path.join(self.path, "models"))
        synth(os.path.join(self.path, "models", "tiny.gguf"))

    def remove(self):
        shutil.rmtree(self.path)


class SharedDaemon(unittest.TestCase):
    """Tests that share one daemon; flags, config and what it is run by are the class's."""
    flags = ()
    prefix = ()
    config = ""

    @classmethod
    def make_models(cls, folder):
        """Puts more models into the daemon's folder of them, before it starts."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.make_models(os.path.join(cls.folder.path, "models"))
        cls.daemon = Daemon(cls.folder.path, *cls.flags, config=cls.config, prefix=cls.prefix)

    @classmethod
    def tearDownClass(cls):
        try:
            cls.daemon.stop()
        finally:
            cls.folder.remove()

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder.path, name)


class DaemonCase(SharedDaemon):
    """Each test with a connection of its own, `client`."""

    def setUp(self):
        self.client = self.daemon.connect()

    def tearDown(self):
        self.client.close()

    def refused(self, name, method, params, *words):
        """The call fails with that error, and its sentence holds the words."""
        with self.assertRaises(wire.Refused) as caught:
            self.client.call(method, params)
        self.assertEqual(caught.exception.name, name, caught.exception.message)
        for word in words:
            self.assertIn(word, caught.exception.message)
        return caught.exception

    def wait_idle(self):
        """Nothing runs, and every block of the cache is free again."""
        wire.wait_until(lambda: self.is_idle(), "the engine is idle and its blocks are free")

    def is_idle(self):
        stats = self.daemon.stats()
        return stats["num_requests_running"] == 0 and stats["num_requests_waiting"] == 0 and \
            stats["kv"]["blocks_used"] == 0


def main():
    program = unittest.main(exit=False, verbosity=1)
    result = program.result
    bad = len(result.failures) + len(result.errors)
    print(f"{'FAILED' if bad else 'ok'}: {result.testsRun} tests, {bad} failed, {len(result.skipped)} skipped")
    for _, why in result.skipped:
        print("SKIPPED:", why)
    sys.exit(1 if bad else 0)
