#!/usr/bin/env python3
"""The cuda plugin in the real daemon: without a GPU it says so and nothing else changes; on the emulated one
a model computes what it computes on the cpu."""
import ctypes
import os
import shutil
import struct
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "integration"))

from harness import Daemon, Folder, main, synth  # noqa: E402

CPU = os.environ["GQAD_TEST_CPU"]
CUDA = os.environ["GQAD_TEST_CUDA"]
GQA = os.environ["GQAD_TEST_GQA"]
EMULATED = os.environ.get("GQAD_TEST_EMULATED", "")
PROMPT = [3 + (7 * k) % 400 for k in range(70)]
# What leaves tokens of PROMPT out, in every way that there is.
POLICIES = (
    {"kv_policy": "window", "kv_sinks": 4, "kv_recent": 40},
    {"kv_policy": "window", "kv_sinks": 4, "kv_recent": 40, "kv_positions": "cache"},
    {"kv_policy": "snapkv", "kv_budget": 40, "kv_window": 8},
    {"kv_policy": "snapstream", "kv_sinks": 4, "kv_recent": 24, "kv_topk": 8, "kv_window": 8},
)
# Activations that differ by a rounding may become the next integer: relative to the largest logit.
TOLERANCE = 2e-2


class Plugins(unittest.TestCase):
    environment = {}

    def setUp(self):
        self.folder = Folder()
        self.plugins = os.path.join(self.folder.path, "plugins")
        os.mkdir(self.plugins, 0o700)
        for source in (CPU, CUDA):
            to = os.path.join(self.plugins, os.path.basename(source))
            shutil.copyfile(source, to)
            os.chmod(to, 0o755)
        self.daemon = Daemon(self.folder.path, "--plugin-dir", self.plugins, environment=self.environment)
        self.client = self.daemon.connect()

    def tearDown(self):
        self.client.close()
        try:
            self.daemon.stop()
        finally:
            self.folder.remove()

    def entry(self, name):
        return next(b for b in self.client.call("backend.list")["backends"] if b["name"] == name)


class WithoutGpu(Plugins):
    def has_driver(self):
        try:
            ctypes.CDLL("libcuda.so.1")
            return True
        except OSError:
            return False

    def test_the_list_says_why(self):
        if self.has_driver():
            self.skipTest("SKIPPED: this machine has a CUDA driver")
        cuda = self.entry("cuda")
        self.assertFalse(cuda["usable"])
        self.assertIn("libcuda.so.1 is not there", cuda["reason"])
        self.client.call("model.load", {"model": "tiny"})  # on the cpu, as ever
        self.assertTrue(self.entry("cpu")["usable"])


@unittest.skipUnless(EMULATED, "no emulated GPU in this build")
class WithoutDevice(Plugins):
    environment = {"LD_LIBRARY_PATH": EMULATED, "EMULATED_CUDA": "error"}

    def test_the_list_has_the_driver_s_words(self):
        cuda = self.entry("cuda")
        self.assertFalse(cuda["usable"])
        self.assertIn("no CUDA-capable device is detected", cuda["reason"])


@unittest.skipUnless(EMULATED, "no emulated GPU in this build")
class OnEmulatedGpu(Plugins):
    environment = {"LD_LIBRARY_PATH": EMULATED}

    def generate(self, n):
        return self.client.generate(model="q4", tokens=PROMPT, n_predict=n, temperature=0, ignore_eos=True)["tokens"]

    def logits(self):
        """Of the prompt's last token, computed anew."""
        id = self.client.send("text.logits", {"model": "q4", "tokens": PROMPT, "first_row": len(PROMPT) - 1,
                                              "cache_prompt": False})
        self.client.wait(id)
        rows = b"".join(e["logits"]["data"] for e in self.client.events[id])
        return struct.unpack(f"<{len(rows) // 4}f", rows)

    def use(self, name):
        self.client.call("backend.use", {"backend": name})

    def test_a_model_computes_the_same_and_goes_on_elsewhere(self):
        synth(os.path.join(self.folder.path, "models", "q4.gguf"), type="q4_0")
        self.assertTrue(self.entry("cuda")["usable"], self.entry("cuda"))
        self.client.call("model.load", {"model": "q4", "backend": "cuda"})
        tokens, on_cuda = self.generate(8), self.logits()
        self.assertEqual(tokens, self.generate(8))  # from blocks in the cache: the same bits
        self.use("cpu")
        on_cpu = self.logits()
        worst = max(abs(a - b) for a, b in zip(on_cuda, on_cpu))
        self.assertLess(worst, TOLERANCE * max(abs(a) for a in on_cpu))
        self.use("cuda")
        self.assertEqual(on_cuda, self.logits())
        self.assertEqual(tokens, self.generate(8))
        self.assertIn("cuda", self.client.call("model.info", {"model": "q4"})["backend"]["program"])
        self.assertNotIn("a step failed", self.daemon.log_text())

    def greedy(self, n, **policy):
        return self.client.generate(model="f16", tokens=PROMPT, n_predict=n, temperature=0, ignore_eos=True,
                                    cache_prompt=False, **policy)

    def swapped(self, policy):
        """Tokens of a stream that begins on cuda, goes on on the cpu, and ends on cuda."""
        id = self.client.send("text.generate", {"model": "f16", "tokens": PROMPT, "n_predict": 100000,
                                                "temperature": 0, "ignore_eos": True, "cache_prompt": False, **policy})
        with self.daemon.connect() as other:
            for name, n_more in (("cpu", 5), ("cuda", 5), (None, 3)):
                self.client.wait_events(id, len(self.client.events.get(id, ())) + n_more)
                if name is not None:
                    other.call("backend.use", {"backend": name})
        self.client.cancel(id)
        self.client.wait(id)
        return [t for e in self.client.events[id] for t in e["tokens"]]

    def test_streams_that_keep_less_go_on_elsewhere(self):
        synth(os.path.join(self.folder.path, "models", "f16.gguf"), type="f16")
        self.client.call("model.load", {"model": "f16", "backend": "cuda"})
        for policy in POLICIES:
            on_cuda = self.greedy(6, kv_kept=True, **policy)
            self.assertGreater(on_cuda["kv"]["n_dropped"], 0, policy)
            tokens = self.swapped(policy)
            self.use("cpu")
            on_cpu = self.greedy(len(tokens), kv_kept=True, **policy)
            self.use("cuda")
            self.assertEqual(on_cuda["kv"]["kept"], on_cpu["kv"]["kept"], policy)
            self.assertEqual(on_cuda["tokens"], on_cpu["tokens"][:6], policy)
            self.assertEqual(tokens, on_cpu["tokens"], policy)
        self.assertNotIn("a step failed", self.daemon.log_text())

    def test_times_are_counted_from_the_first_reading_on(self):
        synth(os.path.join(self.folder.path, "models", "q4.gguf"), type="q4_0")
        self.client.call("model.load", {"model": "q4", "backend": "cuda"})
        self.generate(4)
        self.assertEqual(self.client.call("model.ops", {"model": "q4"})["ops"], [])
        self.generate(4)
        ops = {op["kind"]: op for op in self.client.call("model.ops", {"model": "q4"})["ops"]}
        self.assertLess({"embed", "norm", "linear", "rope", "attention"}, set(ops))
        self.assertTrue(all(op["calls"] > 0 and op["ns"] > 0 for op in ops.values()), ops)
        bench = subprocess.run([GQA, "bench", "-m", "q4", "-p", "16", "-n", "4", "-r", "1", "--ops"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"GQA_SOCKET": self.daemon.socket})
        self.assertEqual(bench.returncode, 0, bench.stdout)
        self.assertIn("| attention ", bench.stdout)


if __name__ == "__main__":
    main()
