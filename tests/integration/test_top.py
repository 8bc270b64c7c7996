"""gqa top and gqa info --watch: pages for programs, and the screen on a terminal of its own."""
import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import unittest

import wire
from cli import GQA, TIMEOUT_S, Tool, environment
from harness import DaemonCase, main

PROMPT = [1, 40, 41, 42, 43, 44]
REQUEST = {"model": "tiny", "tokens": PROMPT, "n_predict": 100000, "ignore_eos": True, "temperature": 0}
SEQUENCE = re.compile(rb"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()][0-9A-B]|[=>])|[\x0e\x0f]")


class Top(DaemonCase):
    # A small buffer of answers that nobody reads keeps requests open for as long as a test looks.
    flags = ("--model", "tiny", "--parallel", "4")

    def setUp(self):
        super().setUp()
        self.gqa = Tool(self.folder.path, "--socket", self.daemon.socket)

    def test_a_page_tells_what_the_daemon_tells(self):
        self.client.generate(model="tiny", tokens=PROMPT, n_predict=5, ignore_eos=True)
        page = self.gqa("top", "-b", "-n", 1).text
        for word in ("gqad 0.1.0", "sequences", "first token", "cache", "MODEL", "tiny", "loaded", "USER", "KIND"):
            self.assertIn(word, page)
        self.assertRegex(page, r"tokens +[0-9.]+ generated/s +[0-9.]+ prompt/s +\(since the start\)")
        self.assertEqual(page.count("USER"), 2)
        pages = self.gqa("top", "-b", "-n", 3, "-d", "0.1").text
        self.assertEqual(pages.count("gqad 0.1.0"), 3)
        self.assertEqual(pages.count("(since the start)"), 1)

    def test_pages_as_json_are_what_the_calls_tell(self):
        lines = self.gqa("top", "-b", "-n", 2, "-d", "0.1", "--json").lines
        self.assertEqual(len(lines), 2)
        for line in lines:
            self.assertEqual(set(line), {"stats", "requests", "kv", "models"})
            self.assertEqual([m["name"] for m in line["models"]], ["tiny"])
            self.assertIn("time_to_first_token_seconds", line["stats"]["latency"])

    def test_an_open_request_is_on_the_page(self):
        with self.daemon.connect() as c:
            id = c.send("text.generate", {**REQUEST, "n_predict": 2000})
            c.wait_events(id, 1)
            page = self.gqa("top", "-b", "-n", 1).text
            table = page[page.index("KIND"):].splitlines()
            self.assertEqual(len(table), 2)
            self.assertRegex(table[1], r" tiny +generate +(decode|paused) +0 +6 +0 +\d+ +[0-9.]+s$")
            c.cancel(id)
            c.wait(id)

    def test_wrong_usage(self):
        self.assertIn("-b", self.gqa("top", status=64).err)  # its output is a pipe here
        self.gqa("top", "-b", "-n", 0, status=64)
        self.gqa("top", "-b", "-d", "soon", status=64)
        self.gqa("info", "--watch=never", status=64)

    def test_info_is_watched(self):
        lines = self.gqa("info", "--watch=0.1", "--count", 3, "--json").lines
        self.assertEqual(len(lines), 3)
        uptimes = [line["stats"]["uptime_s"] for line in lines]
        self.assertEqual(uptimes, sorted(set(uptimes)))
        self.assertEqual(self.gqa("info", "--watch=0.1", "-c", 2).text.count("uptime_s"), 2)


class Terminal:
    """gqa top on a pseudoterminal, read as it draws."""

    def __init__(self, folder, socket, rows, columns, *arguments):
        self.process = None
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen([GQA, "--socket", socket, "top", *arguments], stdin=slave, stdout=slave,
                                        stderr=slave, cwd=folder, start_new_session=True,
                                        env={**environment(folder), "TERM": "xterm"})
        self.slave, self.seen = slave, b""

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if self.process:
            self.process.send_signal(signal.SIGWINCH)  # it is no controlling terminal, whose kernel would

    def type(self, keys):
        os.write(self.master, keys)

    def wait_for(self, what):
        """Reads until the text has been drawn since the last call; returns what was."""
        end = time.monotonic() + TIMEOUT_S
        while what not in SEQUENCE.sub(b" ", self.seen):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise AssertionError(f"{what!r} was not drawn: {self.seen[-3000:]!r}")
            try:
                self.seen += os.read(self.master, 65536)
            except OSError as e:
                if e.errno != errno.EIO:
                    raise
                raise AssertionError(f"it ended before {what!r}: {self.seen[-3000:]!r}")
        seen, self.seen = self.seen, b""
        return seen

    def wait(self):
        """Its status; the terminal must be what it was."""
        end = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        status = self.process.wait(1)
        after = termios.tcgetattr(self.slave)
        assert after[:4] == self.before[:4], "the terminal's modes were not put back"
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def has_curses():
    """Whether this gqa was built with a screen."""
    return b"without ncurses" not in open(GQA, "rb").read()


@unittest.skipUnless(has_curses(), "gqa was built without ncurses: its screen was NOT tested")
class Screen(DaemonCase):
    flags = ("--model", "tiny")

    def start(self, rows, columns, *arguments):
        t = Terminal(self.folder.path, self.daemon.socket, rows, columns, *arguments)
        self.addCleanup(t.close)
        return t

    def test_it_draws_sorts_resizes_and_ends(self):
        t = self.start(24, 80, "-d", "0.2")
        t.wait_for(b"[age]")
        t.type(b"g\x0c")  # ^L: all of it, not only what is new
        t.wait_for(b"[generated]")
        t.type(b"u\x0c")
        t.wait_for(b"[user]")
        t.resize(40, 120)
        self.assertIn(b"gqad 0.1.0", SEQUENCE.sub(b" ", t.wait_for(b"AGE")))  # all of it is drawn anew
        t.resize(5, 20)
        t.wait_for(b"gqad 0.1.0")
        t.type(b"q")
        self.assertEqual(t.wait(), 0)

    def test_everything_important_fits_80_columns(self):
        page = SEQUENCE.sub(b" ", self.start(24, 80).wait_for(b"[age]"))
        for word in (b"sequences", b"generated/s", b"first token", b"next token", b"cache", b"store", b"MODEL", b"tiny",
                     b"USER", b"REFUSED", b"KIND", b"AGE"):
            self.assertIn(word, page)

    def test_it_ends_by_keys_and_signals(self):
        for end in (lambda t: t.type(b"\x03"), lambda t: t.process.send_signal(signal.SIGTERM)):
            t = self.start(24, 80)
            t.wait_for(b"[age]")
            end(t)
            self.assertIn(t.wait(), (0, 130))

    def test_the_end_of_the_daemon_is_told_on_a_sane_terminal(self):
        t = self.start(24, 80, "-d", "0.2")
        t.wait_for(b"[age]")
        self.client.call("server.drain", {"timeout_ms": 0})
        t.wait_for(b"gqa: ")
        self.assertEqual(t.wait(), 69)
        self.daemon.wait()
        type(self).daemon = type(self.daemon)(self.folder.path, *self.flags)


if __name__ == "__main__":
    main()
