"""tools/train: what gqa-convert makes goes into torch and, trained further, back into the daemon, number for number.

Needs Debian's python3-torch, python3-numpy and python3-regex, which are not among the packages of a build.
"""
import json
import os
import random
import subprocess
import sys
import unittest
from array import array

import checkpoints
from cli import ToolCase, read_f32
from harness import main

CONVERT = os.environ["GQAD_TEST_CONVERT"]
MODELS = os.environ["GQAD_TEST_MODELS"]
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tools", "train")
LONG = os.environ.get("GQAD_TEST_LONG")
LOGIT_ERROR = 1e-3  # float16 weights, float32 arithmetic and cache, against torch's float32
WINDOW, N_VOCAB = 512, 2048
LIMIT_S = 200


def python_with_torch():
    """An interpreter that finds all modules: this one, or the system's where this is another."""
    probe = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'numpy', 'regex'))))"
    for python in (sys.executable, "/usr/bin/python3"):
        if os.path.exists(python) and subprocess.run([python, "-c", probe]).returncode == 0:
            return python
    return None


PYTHON = python_with_torch()


@unittest.skipUnless(PYTHON, "uptraining: no python3-torch, python3-numpy, python3-regex here")
class Uptrain(ToolCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        draw = random.Random(3)
        for split, n_windows in (("train", 24), ("heldout", 2)):
            ids = array("H", (draw.choice((17, 300, 1000, draw.randrange(N_VOCAB)))
                              for _ in range(n_windows * WINDOW + 1)))
            if sys.byteorder == "big":
                ids.byteswap()
            with open(cls.path(split + ".u16"), "wb") as f:
                ids.tofile(f)
        cls.grouped = cls.path("grouped.gguf")
        subprocess.run([CONVERT, "--quiet", "--kv-heads", "2", os.path.join(MODELS, "demo-mha.gguf"), cls.grouped],
                       check=True, capture_output=True, timeout=LIMIT_S)

    def start(self, program, *arguments, **environment):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen([PYTHON, os.path.join(TRAIN, program), *map(str, arguments)], env=environment,
                                cwd=self.folder.path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def end(self, process):
        out, _ = process.communicate(timeout=LIMIT_S)
        self.assertEqual(process.returncode, 0, out.decode(errors="replace")[-4000:])

    def run_python(self, *arguments):
        self.end(self.start(*arguments))

    def uptrain(self, name, *more, **environment):
        """Four steps of two rows, after a base of 40 that read the same data before."""
        return self.start("uptrain.py", "--from", self.grouped, "--base-steps", 40, "--alpha", 0.1, "--build",
                          self.folder.path, "--threads", 1, "--batch-windows", 2, "--eval-every", 2,
                          "--eval-windows", 1, "--no-start", "--out", self.path(name + ".pt"), "--curve",
                          self.path(name + ".jsonl"), *more, **environment)

    def curve(self, name):
        with open(self.path(name + ".jsonl")) as f:
            return [json.loads(line) for line in f]

    def tensors(self, path):
        return checkpoints.read_gguf(path)[1]

    def assert_daemon_agrees(self, name):
        """gqad's logits of NAME.gguf are those that export.py let torch compute; returns them."""
        with open(self.path(name + ".expected.json")) as f:
            expected = json.load(f)["logits"]
        truth = read_f32(self.path(expected["file"]))
        self.gqa("load", self.path(name + ".gguf"), "--name", name, "-ctk", "f32", "-ctv", "f32")
        found = self.logits(name, expected["tokens"])
        self.assertEqual(len(found), len(truth))
        self.assertGreater(max(map(abs, truth)), 1)
        self.assertLess(max(abs(a - b) for a, b in zip(truth, found)), LOGIT_ERROR)
        return truth

    def test_converted_model_survives_torch(self):
        self.run_python("export.py", self.grouped, self.path("again.gguf"), "--logits", "--tokenizer", self.grouped)
        self.assertEqual(self.tensors(self.path("again.gguf")), self.tensors(self.grouped))
        self.assert_daemon_agrees("again")

    def test_uptrained_model_runs_in_the_daemon(self):
        self.end(self.uptrain("trained", "--gguf", self.path("direct.gguf")))
        curve = self.curve("trained")
        self.assertEqual([(r["step"], r["windows"]) for r in curve], [(42, 1), (44, 1), (44, 2)])
        self.assertEqual(curve[-1]["tokens"], (40 * 8 + 4 * 2) * WINDOW)
        self.assertLess(curve[1]["train"], curve[0]["train"] - 0.1)
        self.run_python("export.py", self.path("trained.pt"), self.path("trained.gguf"), "--logits", "--tokenizer",
                        self.grouped)
        trained = self.tensors(self.path("trained.gguf"))
        self.assertEqual(self.tensors(self.path("direct.gguf")), trained)
        self.assertNotEqual(self.tensors(self.grouped)["blk.0.attn_k.weight"], trained["blk.0.attn_k.weight"])
        self.assert_daemon_agrees("trained")

    @unittest.skipUnless(LONG, "uptraining by two processes and resumed: GQAD_TEST_LONG is not set")
    def test_shared_and_resumed_runs_are_the_same_run(self):
        """Two processes see the same batches, so only the order of sums differs; a resumed run repeats its losses."""
        self.end(self.uptrain("alone", "--float32"))
        alone = self.curve("alone")
        meet = "file://" + self.path("meet")
        both = [self.uptrain("both", "--float32", "--rendezvous", meet, RANK=str(rank), WORLD_SIZE="2",
                             GLOO_SOCKET_IFNAME="lo") for rank in (0, 1)]
        for process in both:
            self.end(process)
        for a, b in zip(alone, self.curve("both"), strict=True):
            self.assertAlmostEqual(a["heldout"], b["heldout"], delta=2e-3)
            self.assertAlmostEqual(a["train"], b["train"], delta=2e-3)
        # Stopped after its first checkpoint, with a row of the curve that the checkpoint does not have yet.
        self.end(self.uptrain("whole"))
        first = self.uptrain("halved", "--stop-at", 42)
        self.end(first)
        with open(self.path("halved.jsonl"), "a") as f:
            f.write(json.dumps({**self.curve("whole")[1], "heldout": 99}) + "\n")
        self.end(self.uptrain("halved", "--resume"))
        bare = [{k: v for k, v in r.items() if k != "seconds"} for r in self.curve("halved")]
        self.assertEqual(bare, [{k: v for k, v in r.items() if k != "seconds"} for r in self.curve("whole")])
        refused = self.uptrain("halved", "--resume", "--seed", 2)
        out, _ = refused.communicate(timeout=LIMIT_S)
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn(b"another run", out)


if __name__ == "__main__":
    main()
