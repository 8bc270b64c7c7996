#!/usr/bin/env python3
"""Backends swapped while requests run, and steps that a backend fails."""
import os
import shutil
import struct
import unittest

import wire
from harness import Daemon, Folder, main

PLUGINS = os.environ["GQAD_TEST_PLUGINS"]
CPU = os.environ["GQAD_TEST_CPU"]
SWAPS = 1000 if os.environ.get("GQAD_TEST_LONG") else 60
# Backends differ in roundings. Two tokens whose logits are nearer than this are a tie: either may
# be chosen. Logits of the tiny model lie within +-4, and levels differ by 1e-5 of that.
TIE = 1e-3
N_STREAMS = 4


def prompt(i, n=40):
    return [3 + (7 * i + 11 * k) % 400 for k in range(n)]


class Backends(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.plugins = os.path.join(self.folder.path, "plugins")
        os.mkdir(self.plugins, 0o700)
        self.install(CPU, "cpu.so")
        self.daemon = Daemon(self.folder.path, "--plugin-dir", self.plugins)
        self.client = self.daemon.connect()
        self.client.call("model.load", {"model": "tiny", "cache_type_k": "f32", "cache_type_v": "f32"})

    def tearDown(self):
        self.client.close()
        try:
            self.daemon.stop()
        finally:
            self.folder.remove()

    def install(self, source, name):
        """As a package does it: another file under the name."""
        path = os.path.join(self.plugins, name)
        shutil.copyfile(source, path + ".new")
        os.chmod(path + ".new", 0o755)
        os.rename(path + ".new", path)

    def fixture(self, name):
        self.install(os.path.join(PLUGINS, name + ".so"), name + ".so")

    def use(self, backend, **more):
        return self.client.call("backend.use", {"backend": backend, **more})

    def entry(self, name):
        return next(b for b in self.client.call("backend.list")["backends"] if b["name"] == name)

    def start(self, client, i, n=400):
        return client.send("text.generate", {"model": "tiny", "tokens": prompt(i), "n_predict": n, "temperature": 0.0,
                                             "ignore_eos": True, "stream": True, "cache_prompt": False})

    def finish(self, client, id):
        """All tokens of a stream, as its events brought them."""
        result = client.wait(id)
        tokens = [t for e in client.events.get(id, []) for t in e.get("tokens", [])]
        self.assertEqual(result["n_generated"], len(tokens))
        return tokens

    def generate(self, i, n=400):
        return self.finish(self.client, self.start(self.client, i, n))

    def check_same(self, i, expected, got):
        """Equal, or from a tie on another text."""
        self.assertEqual(len(expected), len(got))
        at = next((k for k in range(len(got)) if expected[k] != got[k]), None)
        if at is None:
            return 0
        tokens = prompt(i) + expected[:at]
        id = self.client.send("text.logits", {"model": "tiny", "tokens": tokens, "first_row": len(tokens) - 1,
                                              "cache_prompt": False})
        self.client.wait(id)
        rows = b"".join(e["logits"]["data"] for e in self.client.events[id])
        logits = struct.unpack(f"<{len(rows) // 4}f", rows)
        self.assertLess(abs(logits[expected[at]] - logits[got[at]]), TIE, f"token {at} of stream {i}")
        return 1

    def test_a_use_is_told_and_undone(self):
        before = self.client.call("model.info", {"model": "tiny"})["backend"]
        told = self.use("cpu", isa="c")
        self.assertEqual((told["model"], told["program"], told["isa"]), ("tiny", "cpu:isa=c", "c"))
        self.assertGreater(told["prepare_ms"], 0)
        self.assertGreaterEqual(told["pause_ms"], 0)
        self.assertEqual(self.client.call("model.info", {"model": "tiny"})["backend"]["program"], "cpu:isa=c")
        self.use("cpu")
        after = self.client.call("model.info", {"model": "tiny"})["backend"]
        self.assertEqual((before["program"], before["isa"]), (after["program"], after["isa"]))

    def test_attention_alone(self):
        expected = self.generate(1, 100)
        self.fixture("good")
        told = self.use("good", attention_only=True)
        self.assertEqual((told["program"].split(":")[0], told["attention"]), ("cpu", "good"))
        self.assertEqual(self.entry("good")["users"], 1)
        self.check_same(1, expected, self.generate(1, 100))
        self.use("cpu")
        self.generate(2, 100)  # the old one is closed when the new one has shown that it works
        wire.wait_until(lambda: self.entry("good")["users"] == 0, "the old backend is closed")

    def test_a_refused_use_leaves_all_as_it_was(self):
        self.fixture("crash_probe")
        self.fixture("wrong")
        self.fixture("nan")
        self.fixture("good")
        before = self.client.call("model.info", {"model": "tiny"})["backend"]
        for params, name, words in (
                ({"backend": "none"}, "NOT_FOUND", ["no plugin is called 'none'"]),
                ({"backend": "crash_probe"}, "BACKEND", ["crashed with signal"]),
                ({"backend": "wrong", "attention_only": True}, "BACKEND", ["self-test", "wrong by"]),
                ({"backend": "nan", "attention_only": True}, "BACKEND", ["self-test", "wrong by"]),
                ({"backend": "good"}, "BACKEND", ["has attention only"]),
                ({"backend": "cpu", "isa": "slow"}, "BACKEND", ["isa=slow"]),
                ({"backend": "cpu", "model": "huge"}, "NOT_FOUND", ["'huge' is not loaded"])):
            with self.assertRaises(wire.Refused, msg=params) as caught:
                self.client.call("backend.use", params)
            self.assertEqual(caught.exception.name, name, caught.exception)
            for word in words:
                self.assertIn(word, caught.exception.message)
        self.assertEqual(self.client.call("model.info", {"model": "tiny"})["backend"], before)

    def test_types_that_a_backend_does_not_know_are_refused(self):
        self.fixture("good")
        self.client.call("model.load", {"model": "tiny", "name": "half", "cache_type_k": "f16"})
        with self.assertRaises(wire.Refused) as caught:
            self.use("good", attention_only=True, model="half")
        self.assertIn("float32 caches", caught.exception.message)
        with self.assertRaises(wire.Refused) as caught:
            self.use("cpu")
        self.assertIn("2 models are loaded", caught.exception.message)

    def test_what_the_best_backend_refuses_the_cpu_computes(self):
        expected = self.generate(1)
        self.fixture("picky")
        with self.assertRaises(wire.Refused) as caught:
            self.use("picky")
        self.assertIn("takes no op", caught.exception.message)
        self.assertTrue(self.entry("picky")["default"])
        with self.assertRaises(wire.Refused) as caught:  # who names it is not given another
            self.client.call("model.load", {"model": "tiny", "name": "named", "backend": "picky",
                                            "cache_type_k": "f32", "cache_type_v": "f32"})
        self.assertIn("takes no op", caught.exception.message)
        self.client.call("model.unload", {"model": "tiny"})
        self.client.call("model.load", {"model": "tiny", "cache_type_k": "f32", "cache_type_v": "f32"})
        self.assertEqual(self.client.call("model.info", {"model": "tiny"})["backend"]["program"].split(":")[0], "cpu")
        self.assertIn("takes no op", self.daemon.log_text())
        self.assertEqual(expected, self.generate(1))

    def test_a_replaced_file_is_picked_up(self):
        self.fixture("good")
        self.use("good", attention_only=True)
        version = self.entry("good")["version"]
        expected = self.generate(1, 50)
        self.install(os.path.join(PLUGINS, "good_2.so"), "good.so")
        self.check_same(1, expected, self.generate(1, 50))  # the old code is still there
        self.use("good", attention_only=True)
        self.assertNotEqual(self.entry("good")["version"], version)
        self.check_same(1, expected, self.generate(1, 50))

    def test_a_file_overwritten_in_place_hurts_nobody(self):
        self.fixture("good")
        self.use("good", attention_only=True)
        expected = self.generate(1, 50)
        with open(os.path.join(self.plugins, "good.so"), "r+b") as f:
            f.write(b"\0" * 65536)
        self.check_same(1, expected, self.generate(1, 50))
        with self.assertRaises(wire.Refused):
            self.use("good", attention_only=True)
        self.check_same(1, expected, self.generate(1, 50))

    def test_a_plugin_whose_threads_stay_is_never_unmapped(self):
        self.fixture("leaks_thread")
        self.use("leaks_thread", attention_only=True)
        expected = self.generate(1, 100)
        self.use("cpu")
        self.generate(1, 100)
        wire.wait_until(lambda: self.entry("leaks_thread")["users"] == 0, "it is closed")
        os.unlink(os.path.join(self.plugins, "leaks_thread.so"))
        self.use("cpu")  # looks at the folder: nobody has the file any more
        wire.wait_until(lambda: "it stays mapped" in self.daemon.log_text(), "the log tells")
        self.check_same(1, expected, self.generate(1, 100))

    def test_a_passed_test_is_remembered_between_starts(self):
        self.assertFalse(self.entry("cpu")["remembered"])
        expected = self.generate(1, 50)
        for environment, remembered in (({}, True), ({"GQAD_PLUGIN_VERDICTS": "off"}, False), ({}, True)):
            self.client.close()
            self.daemon.stop()
            self.daemon = Daemon(self.folder.path, "--plugin-dir", self.plugins, environment=environment)
            self.client = self.daemon.connect()
            self.assertEqual(self.entry("cpu")["remembered"], remembered)
            self.assertTrue(self.entry("cpu")["default"])
            self.client.call("model.load", {"model": "tiny", "cache_type_k": "f32", "cache_type_v": "f32"})
            self.assertEqual(self.generate(1, 50), expected)
        self.client.call("backend.selftest", {"backend": "cpu"})  # tests, whatever is remembered

    def test_a_selftest_tells_every_case(self):
        result = self.client.call("backend.selftest", {"backend": "cpu", "isa": "c"})
        self.assertGreater(len(result["cases"]), 10)
        self.assertEqual({c["verdict"] for c in result["cases"]}, {"ok"})
        self.assertTrue(all(c["error"] < 5e-4 for c in result["cases"]))

    def test_a_step_that_fails_is_repeated(self):
        expected = self.generate(1)
        self.fixture("late_error")
        self.use("late_error", attention_only=True)
        self.check_same(1, expected, self.generate(1))
        entry = self.entry("late_error")
        self.assertEqual(entry["faults"], 1)
        self.assertIn("Input/output error", entry["last_fault"])
        self.assertEqual(self.client.call("model.info", {"model": "tiny"})["backend"]["attention"], "late_error")
        self.assertIn("late_error", self.daemon.log_text())

    def test_a_backend_that_goes_on_failing_is_given_up(self):
        expected = [self.generate(i) for i in range(2)]
        self.fixture("late_nan")
        self.use("late_nan", attention_only=True)
        ids = [self.start(self.client, i) for i in range(2)]
        for i in range(2):
            self.check_same(i, expected[i], self.finish(self.client, ids[i]))
        self.assertEqual(self.entry("late_nan")["faults"], 3)
        self.assertIn("not numbers", self.entry("late_nan")["last_fault"])
        self.assertEqual(self.client.call("model.info", {"model": "tiny"})["backend"]["attention"].split(":")[0], "cpu")

    def test_a_required_backend_has_no_substitute(self):
        self.fixture("late_nan")
        self.use("late_nan", attention_only=True, require=True)
        id = self.start(self.client, 1)
        with self.assertRaises(wire.Refused) as caught:
            self.client.wait(id)
        self.assertEqual(caught.exception.name, "BACKEND")

    def test_blocks_of_one_backend_are_not_taken_for_another_s(self):
        def cached(i):
            return self.client.generate(model="tiny", tokens=prompt(i, 200), n_predict=1)["n_cached"]
        cached(1)
        self.assertGreater(cached(1), 0)
        self.fixture("good")
        self.use("good", attention_only=True)
        self.assertEqual(cached(1), 0)
        self.assertGreater(cached(1), 0)
        # One that has crossed a swap leaves nothing to either.
        id = self.client.send("text.generate", {"model": "tiny", "tokens": prompt(2), "n_predict": 400,
                                                "temperature": 0.0, "ignore_eos": True})
        while not self.client.events.get(id):
            self.client.receive()
        with self.daemon.connect() as other:
            other.call("backend.use", {"backend": "cpu"})
        crossed = prompt(2) + self.finish(self.client, id)
        again = self.client.generate(model="tiny", tokens=crossed[:300], n_predict=1)
        self.assertLess(again["n_cached"], 64)

    def shadow(self):
        return self.client.call("backend.list")["shadows"][0]

    def test_a_shadow_compares_and_touches_nothing(self):
        self.assertEqual(self.client.call("backend.list")["shadows"], [])
        expected = [self.generate(i, 150) for i in range(2)]
        self.fixture("good")
        self.use("good", attention_only=True, shadow=True, every=3)
        ids = [self.start(self.client, i, 150) for i in range(2)]
        self.assertEqual(expected, [self.finish(self.client, id) for id in ids])
        told = self.shadow()
        self.assertEqual((told["active"], told["attention"], told["every"], told["faults"]), (True, "good", 3, 0))
        self.assertGreater(told["steps"], 20)
        self.assertGreaterEqual(told["rows"], told["steps"])
        self.assertLess(told["abs_max"], TIE)
        self.assertLess(told["kl_max"], TIE)
        self.assertGreater(told["time_ratio"], 0)
        self.use("off", shadow=True)
        self.assertFalse(self.shadow()["active"])
        steps = self.shadow()["steps"]
        self.assertEqual(expected[0], self.generate(0, 150))
        self.assertEqual(self.shadow()["steps"], steps)
        wire.wait_until(lambda: self.entry("good")["users"] == 0, "the shadow is closed")

    def test_a_shadow_that_fails_ends_and_hurts_nobody(self):
        expected = self.generate(1)
        self.fixture("late_nan")
        self.use("late_nan", attention_only=True, shadow=True, every=1)
        self.assertEqual(self.generate(1), expected)
        told = self.shadow()
        self.assertEqual((told["active"], told["faults"]), (False, 3))
        self.assertIn("not numbers", told["last_fault"])
        self.assertGreater(told["steps"], 0)

    def leaks(self):
        proc = f"/proc/{self.daemon.process.pid}/"
        with open(proc + "maps") as f:
            maps = [line.split(maxsplit=5)[5].strip() for line in f if "memfd" in line or ".so" in line]
        return len(os.listdir(proc + "task")), len(os.listdir(proc + "fd")), len(maps)

    def test_swaps_under_load(self):
        """Streams of greedy tokens, and another backend every moment."""
        self.fixture("good")
        levels = self.entry("cpu")["isas"]
        choices = [{"backend": "cpu", "isa": level} for level in levels] + [{"backend": "good", "attention_only": True}]
        expected = [self.generate(i) for i in range(N_STREAMS)]
        for choice in choices:  # whatever is loaded once is loaded now
            self.use(**choice)
        self.use("cpu")
        self.generate(0)
        before = self.leaks()
        clients = [self.daemon.connect() for _ in range(N_STREAMS)]
        ids = [self.start(c, i) for i, c in enumerate(clients)]
        pauses, prepares, n_streams, n_ties = [], [], 0, 0
        for k in range(SWAPS):
            told = self.use(**choices[k % len(choices)])
            pauses.append(told["pause_ms"])
            prepares.append(told["prepare_ms"])
            for i, c in enumerate(clients):
                c.sock.setblocking(False)
                try:
                    while ids[i] not in c.answers and c.receive():
                        pass
                except BlockingIOError:
                    pass
                c.sock.settimeout(wire.TIMEOUT_S)
                if ids[i] in c.answers:
                    n_ties += self.check_same(i, expected[i], self.finish(c, ids[i]))
                    n_streams += 1
                    ids[i] = self.start(c, i)
        for i, c in enumerate(clients):
            n_ties += self.check_same(i, expected[i], self.finish(c, ids[i]))
            n_streams += 1
            c.close()
        self.use("cpu")
        self.generate(0)
        wire.wait_until(lambda: self.leaks() == before, f"threads, descriptors and mappings are {before} again")
        pauses.sort()
        prepares.sort()
        print(f"{SWAPS} swaps, {n_streams} streams, {n_ties} ties; pause ms: median {pauses[SWAPS // 2]:.3f}, "
              f"most {pauses[-1]:.3f}; preparation ms: median {prepares[SWAPS // 2]:.1f}, most {prepares[-1]:.1f}")
        self.assertEqual(self.entry("good")["faults"], 0)


if __name__ == "__main__":
    main()
