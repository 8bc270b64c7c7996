#!/usr/bin/env python3
"""The cuda plugin in the real daemon: without a GPU it says so and nothing else changes; on the emulated one
a model computes what it computes on the cpu."""
import ctypes
import os
import shutil
import struct
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "integration"))

from harness import Daemon, Folder, main, synth  # noqa: E402

CPU = os.environ["GQAD_TEST_CPU"]
CUDA = os.environ["GQAD_TEST_CUDA"]
EMULATED = os.environ.get("GQAD_TEST_EMULATED", "")
PROMPT = [3 + (7 * k) % 400 for k in range(70)]
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


# Whole steps of a model take the emulated GPU long.
@unittest.skipUnless(EMULATED and os.environ.get("GQAD_TEST_LONG"), "SKIPPED: GQAD_TEST_LONG=1, and an emulated GPU")
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


if __name__ == "__main__":
    main()
