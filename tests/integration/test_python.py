"""The Python module over libgqa (examples/python), and through it libgqa against the real daemon: killed and stopped in
every state that a client can be in, and started again."""
import asyncio
import os
import signal
import subprocess
import sys
import threading
import unittest
from array import array

PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "python")
sys.path.insert(0, PACKAGE)

import gqa  # noqa: E402
import gqa.aio  # noqa: E402
import wire  # noqa: E402
from harness import GQAD, SLOW, Daemon, DaemonCase, Folder, main, synth  # noqa: E402

LONG = {"n_predict": 60000, "temperature": 0, "ignore_eos": True}
GREEDY = {"n_predict": 12, "temperature": 0, "ignore_eos": True}
PROMPT = "Once upon a time"


class Calls(DaemonCase):
    def setUp(self):
        super().setUp()
        self.gqa = gqa.connect(self.daemon.socket)

    def tearDown(self):
        self.gqa.close()
        super().tearDown()

    def test_about_the_daemon(self):
        self.gqa.ping()
        self.assertEqual(self.gqa.server_info["server"], "gqad")
        self.assertEqual([m["name"] for m in self.gqa.models()], ["tiny"])
        self.assertIn("kv", self.gqa.stats())
        self.assertRegex(gqa.version(), r"^\d+\.\d+\.\d+$")
        self.assertTrue(self.gqa.connected)

    def test_an_empty_name_of_the_library_is_none(self):
        folder = os.path.dirname(os.environ["GQA_LIBRARY"])
        done = subprocess.run([sys.executable, "-c", "import gqa"], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "GQA_LIBRARY": "", "LD_LIBRARY_PATH": folder, "PYTHONPATH": PACKAGE})
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_text_to_tokens_and_back(self):
        ids = self.gqa.tokenize("tiny", PROMPT)
        self.assertEqual(ids, self.client.call("text.tokenize", {"model": "tiny", "text": PROMPT})["tokens"])
        self.assertEqual(self.gqa.detokenize("tiny", ids), self.gqa.detokenize("tiny", array("i", ids)))
        self.assertIn(PROMPT, self.gqa.detokenize("tiny", ids))
        self.assertEqual(self.gqa.tokenize("tiny", "", add_special=False), [])

    def test_a_generation_streams(self):
        generation = self.gqa.generate("tiny", PROMPT, **GREEDY)
        self.assertIsNone(generation.result)
        pieces = list(generation)
        tokens = [t for p in pieces for t in p.tokens]
        self.assertEqual(len(tokens), 12)
        self.assertEqual(generation.result["n_generated"], 12)
        self.assertGreater(len(pieces), 1)
        done = self.client.generate(model="tiny", prompt=PROMPT, **GREEDY)
        self.assertEqual((tokens, "".join(pieces)), (done["tokens"], done["text"]))
        self.assertEqual(list(generation), [], "its end stays its end")
        again = self.gqa.generate("tiny", tokens=self.gqa.tokenize("tiny", PROMPT), **GREEDY)
        self.assertEqual(again.read(), "".join(pieces))

    def test_a_second_call_while_one_streams(self):
        with self.gqa.generate("tiny", PROMPT, **GREEDY) as generation:
            first = next(generation)
            self.gqa.ping()
            self.assertEqual(len([t for p in [first, *generation] for t in p.tokens]), 12)

    def test_parameters_of_every_type(self):
        done = self.gqa.call("text.generate", {
            "model": "tiny", "prompt": PROMPT.encode(), "n_predict": 2, "temperature": 0.0, "stream": False, "seed": 2 ** 63,
            "logit_bias": {5: 100.0, 6: float("-inf")}, "stop": ["never said", "neither"], "repeat_last_n": -1, "grammar": None})
        self.assertEqual(done["tokens"], [5, 5])
        for bad, words in (({"n_predict": 2 ** 63}, "n_predict"), ({"temperature": "hot"}, "temperature"), ({"stop": [b"a\0b"]}, "stop")):
            with self.assertRaises((gqa.InvalidParams, ValueError)) as caught:
                self.gqa.generate("tiny", PROMPT, **bad).read()
            self.assertIn(words, str(caught.exception))
        with self.assertRaises(OverflowError):
            self.gqa.generate("tiny", PROMPT, seed=2 ** 64)

    def test_errors_are_exceptions(self):
        with self.assertRaises(gqa.NotFound) as caught:
            self.gqa.tokenize("absent", "x")
        self.assertEqual((caught.exception.name, caught.exception.code), ("NOT_FOUND", 6))
        with self.assertRaises(gqa.InvalidParams):
            self.gqa.call("text.tokenize", {"model": "tiny"})
        with self.assertRaises(gqa.Error) as caught:
            self.gqa.call("no.method")
        self.assertEqual(caught.exception.name, "METHOD_NOT_FOUND")
        with self.assertRaises(gqa.NotFound):
            gqa.connect("/nonexistent/gqad.sock")
        self.gqa.close()
        self.assertFalse(self.gqa.connected)
        with self.assertRaises(gqa.ConnectionLost):
            self.gqa.ping()

    def test_logits_are_a_view_of_floats(self):
        ids = self.gqa.tokenize("tiny", PROMPT)
        logits = self.gqa.logits("tiny", PROMPT)
        call_id = self.client.send("text.logits", {"model": "tiny", "prompt": PROMPT})
        result, events = self.client.wait(call_id), self.client.events[call_id]
        self.assertEqual((logits.format, logits.itemsize, logits.shape), ("f", 4, (len(ids), result["n_vocab"])))
        self.assertEqual(logits.tobytes(), b"".join(e["logits"]["data"] for e in events))
        last = self.gqa.logits("tiny", tokens=ids, first_row=len(ids) - 1)
        self.assertEqual(last.tobytes(), logits.tobytes()[-4 * result["n_vocab"]:])

    def test_vectors_are_a_view_of_floats(self):
        rows = self.gqa.embed("tiny", ["a cat", "a kitten", "the stock exchange"])
        self.assertEqual(rows.shape[0], 3)
        self.assertAlmostEqual(sum(x * x for x in rows.tolist()[0]), 1, places=4)
        self.assertEqual(self.gqa.embed("tiny", "a kitten").tolist(), rows.tolist()[1:2])

    def test_an_exception_in_an_event_ends_the_call_and_comes_out(self):
        class Enough(Exception):
            pass

        def on_event(event):
            raise Enough()
        with self.assertRaises(Enough):
            self.gqa.call("text.generate", {"model": "tiny", "prompt": PROMPT, **LONG, "n_predict": 100}, on_event=on_event)
        self.gqa.ping()
        self.wait_idle()


class Ends(unittest.TestCase):
    """Cancelling, deadlines, deaths: with a model that is slow enough to be caught at work."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        synth(os.path.join(cls.folder.path, "models", "slow.gguf"), SLOW)

    @classmethod
    def tearDownClass(cls):
        cls.folder.remove()

    def setUp(self):
        self.daemon = Daemon(self.folder.path)
        self.gqa = gqa.connect(self.daemon.socket)

    def tearDown(self):
        self.gqa.close()
        if self.daemon.process.returncode is None:
            self.daemon.signal(signal.SIGCONT)
            self.daemon.stop()

    def restart(self):
        self.daemon = Daemon(self.folder.path)

    def long(self, **more):
        """A generation that would take minutes, at its first piece."""
        generation = self.gqa.generate("slow", PROMPT, **LONG, **more)
        next(generation)
        return generation

    def assert_idle(self):
        wire.wait_until(lambda: self.daemon.stats()["num_requests_running"] == 0, "the generation has ended")

    def assert_lost(self, call, words="connection lost"):
        with self.assertRaises(gqa.ConnectionLost) as caught:
            call()
        self.assertIn(words, str(caught.exception))
        self.assertFalse(self.gqa.connected)
        with self.assertRaises(gqa.ConnectionLost):
            self.gqa.ping()

    # ---- cancelling ---------------------------------------------------------------------------

    def test_leaving_a_loop_cancels(self):
        for _ in self.gqa.generate("slow", PROMPT, **LONG):
            break
        self.gqa.ping()
        self.assert_idle()

    def test_close_cancels_and_waits(self):
        with self.long() as generation:
            pass
        self.assertEqual(generation.result["finish"], "cancelled")
        self.assertEqual(list(generation), [])

    def test_cancel_keeps_what_was_made(self):
        generation = self.long()
        generation.cancel()
        rest = list(generation)
        self.assertEqual(generation.result["finish"], "cancelled")
        self.assertEqual(generation.result["n_generated"], 1 + sum(len(p.tokens) for p in rest))

    def test_an_interrupt_comes_through_and_cancels(self):
        def interrupt(*_):
            raise KeyboardInterrupt
        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with self.assertRaises(KeyboardInterrupt):
                self.gqa.call("text.generate", {"model": "slow", "prompt": PROMPT, **LONG})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        self.gqa.ping()
        self.assert_idle()

    def test_the_example(self):
        story = subprocess.Popen([sys.executable, os.path.join(PACKAGE, "story.py"), "slow", PROMPT], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, env={**os.environ, "GQA_SOCKET": self.daemon.socket})
        out, err = story.communicate(timeout=60)
        self.assertEqual((story.returncode, err), (0, b""))
        self.assertRegex(out, rb"\n\[(length|eos): \d+ tokens, \d+ in the prompt\]\n$")

    # ---- deadlines ----------------------------------------------------------------------------

    def test_a_limit_for_the_whole_call(self):
        with self.assertRaises(gqa.Timeout) as caught:
            self.gqa.generate("slow", PROMPT, total=0.1, **LONG).read()
        self.assertIn("not finished within 100 ms", str(caught.exception))
        self.gqa.ping()
        self.assert_idle()

    def test_a_stopped_daemon_is_met_by_deadlines(self):
        generation = self.long(timeout=0.3)
        self.daemon.signal(signal.SIGSTOP)
        with self.assertRaises(gqa.Timeout):
            generation.read()
        with self.assertRaises(gqa.Timeout):
            self.gqa.call("gqa.ping", timeout=0.05)
        with self.assertRaises(gqa.Timeout):
            gqa.connect(self.daemon.socket, timeout=0.05)
        self.daemon.signal(signal.SIGCONT)
        self.gqa.ping()
        self.assertTrue(self.gqa.connected)
        self.assert_idle()

    # ---- SIGKILL, in each state ---------------------------------------------------------------

    def test_killed_while_idle(self):
        self.daemon.kill()
        self.assert_lost(self.gqa.ping)

    def test_killed_while_streaming(self):
        generation = self.long()
        self.daemon.kill()
        self.assert_lost(generation.read, "text.generate: connection lost")

    def test_killed_with_a_call_unread(self):
        self.daemon.signal(signal.SIGSTOP)
        generation = self.gqa.generate("slow", PROMPT, **LONG)
        self.daemon.kill()
        self.assert_lost(generation.read)

    def test_killed_with_output_queued(self):
        self.daemon.signal(signal.SIGSTOP)
        generation = self.gqa.generate("slow", "x" * (8 << 20), **LONG)
        self.daemon.kill()
        self.assert_lost(generation.read)

    def test_killed_in_the_middle_of_a_large_answer(self):
        ids = self.gqa.tokenize("slow", PROMPT) * 2000  # would take minutes
        killer = Killer(self.daemon)
        self.assert_lost(lambda: self.gqa.call("text.logits", {"model": "slow", "tokens": ids}, on_event=killer))
        self.assertTrue(killer.done)

    def test_killed_before_hello_is_answered(self):
        self.daemon.signal(signal.SIGSTOP)
        caught = []

        def connect():
            try:
                gqa.connect(self.daemon.socket).close()
            except gqa.Error as e:
                caught.append(e)
        thread = threading.Thread(target=connect)
        thread.start()
        wire.wait_until(lambda: waits_in_poll(thread), "the client waits for the answer to hello")
        self.daemon.kill()
        thread.join(60)
        self.assertIsInstance(caught[0], gqa.ConnectionLost)
        self.assertIn("gqa.hello: connection lost", str(caught[0]))

    def test_killed_while_a_thread_waits(self):
        generation, caught = self.long(), []

        def read():
            try:
                generation.read()
            except gqa.Error as e:
                caught.append(e)
        self.daemon.signal(signal.SIGSTOP)
        thread = threading.Thread(target=read)
        thread.start()
        wire.wait_until(lambda: waits_in_poll(thread), "the client waits in gqa_wait()")
        self.daemon.kill()
        thread.join(60)
        self.assertIsInstance(caught[0], gqa.ConnectionLost)

    # ---- and back -----------------------------------------------------------------------------

    def test_reconnects_and_repeats_nothing(self):
        generation, fd = self.long(), self.gqa.fileno()
        self.daemon.kill()
        self.assert_lost(generation.read)
        self.assertEqual(self.gqa.fileno(), fd)
        with self.assertRaises(gqa.ConnectionLost):
            self.gqa.reconnect(timeout=0.05)
        self.restart()
        self.gqa.reconnect()
        self.gqa.ping()
        stats = self.daemon.stats()
        self.assertEqual((stats["requests_total"], stats["num_requests_running"]), (0, 0), "no generation was sent again")
        self.assertEqual(len(self.gqa.generate("slow", PROMPT, **GREEDY).read()) > 0, True)

    def test_reconnect_waits_for_a_daemon_that_starts(self):
        self.daemon.kill()
        self.assert_lost(self.gqa.ping)
        os.unlink(self.daemon.socket)
        starter = threading.Timer(0.1, self.restart)
        starter.start()
        self.gqa.reconnect(timeout=60)
        starter.join()
        self.gqa.ping()

    def test_a_private_daemon_ends_with_its_connection(self):
        models = os.path.join(self.folder.path, "models")
        cache = os.path.join(self.folder.path, "own")
        with gqa.spawn("-t", 1, program=GQAD, models_dir=models, cache_dir=cache, quiet=True) as own:
            self.assertEqual(len(own.tokenize("tiny", PROMPT)), len(self.gqa.tokenize("tiny", PROMPT)))

    # ---- asyncio ------------------------------------------------------------------------------

    def test_asyncio(self):
        async def tell(daemon, **more):
            return "".join([piece async for piece in daemon.generate("slow", PROMPT, **{**GREEDY, **more})])

        async def run():
            async with gqa.aio.connect(self.daemon.socket) as daemon:
                a, b, ids = await asyncio.gather(tell(daemon), tell(daemon), daemon.tokenize("slow", PROMPT))
                self.assertEqual(a, b)
                self.assertEqual(ids, self.gqa.tokenize("slow", PROMPT))
                with self.assertRaises(gqa.NotFound):
                    await daemon.tokenize("absent", "x")
                with self.assertRaises(gqa.Timeout):
                    await daemon.call("text.generate", {"model": "slow", "prompt": PROMPT, **LONG}, total=0.1)
                await self.cancels(daemon)
                generation = daemon.generate("slow", PROMPT, **LONG)
                await generation.__anext__()
                self.daemon.kill()
                with self.assertRaises(gqa.ConnectionLost):
                    async for _ in generation:
                        pass
                self.assertFalse(daemon.connected)
                self.restart()
                daemon.reconnect()
                await daemon.ping()
        asyncio.run(run())

    async def cancels(self, daemon):
        task = asyncio.create_task(daemon.call("text.generate", {"model": "slow", "prompt": PROMPT, **LONG}))
        await daemon.ping()
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        async with daemon.generate("slow", PROMPT, **LONG) as generation:
            await generation.__anext__()
        self.assertEqual(generation.result["finish"], "cancelled")
        async for _ in daemon.generate("slow", PROMPT, **LONG):
            break
        while (await daemon.call("server.stats"))["num_requests_running"] > 0:
            await asyncio.sleep(0.01)


class Killer:
    """Kills the daemon at the first event of an answer."""

    def __init__(self, daemon):
        self.daemon, self.done = daemon, False

    def __call__(self, event):
        if not self.done:
            self.done = True
            self.daemon.kill()


def waits_in_poll(thread):
    """The thread is inside a poll: the kernel knows."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/wchan") as f:
            name = f.read()
        with open(f"/proc/self/task/{thread.native_id}/syscall") as f:
            number = f.read().split()[0]
    except (OSError, IndexError):
        return False
    return "poll" in name or number == "271"  # ppoll on x86-64


if __name__ == "__main__":
    main()
