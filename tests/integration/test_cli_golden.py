"""gqa against what other engines computed: golden models, and the bundled model by torch."""
import json
import os
import re
import unittest

from cli import ToolCase, mean_kl, read_f32, write_json
from harness import main

GOLDEN = os.environ.get("GQAD_TEST_GOLDEN", "")
MODELS = os.environ["GQAD_TEST_MODELS"]
KL_F16_CACHE = 3e-6  # float32 arithmetic, K and V in float16
KL_F32_CACHE = 1e-8
MARGIN = 0.01        # a greedy choice that leads by less may fall either way
DEMO_LOGIT_ERROR = 1e-3  # float16 weights, float32 arithmetic and cache, against torch's float32


class Case(ToolCase):
    needs = without = ""  # a path without which nothing can be tested, and what to say then

    @classmethod
    def setUpClass(cls):
        if not os.path.exists(cls.needs):
            raise unittest.SkipTest(cls.without)
        super().setUpClass()

    def greedy(self, model, n, *prompt):
        return self.gqa("run", "-m", model, "-n", n, "--temperature", 0, "--json", *prompt).json


class GoldenModels(Case):
    needs = os.path.join(GOLDEN, "models") if GOLDEN else ""
    without = "no golden data"

    def read(self, name, file):
        with open(os.path.join(GOLDEN, "models", name, file)) as f:
            return json.load(f)

    def golden_path(self, name, file):
        return os.path.join(GOLDEN, "models", name, file)

    def test_logits_and_greedy_ids(self):
        for name in ("llama-gqa", "qwen3", "llama-mha", "qwen2", "gemma3", "granite", "phi3"):
            with self.subTest(name):
                model = self.golden_path(name, "model.gguf")
                sequence = next(s for s in self.read(name, "tokens.json")["seqs"] if s["name"] == "a")
                truth = read_f32(self.golden_path(name, sequence["logits"]))
                n_vocab = len(truth) // len(sequence["ids"])
                found = self.logits(model, sequence["ids"], "--name", name)
                self.assertEqual(len(found), len(truth))
                self.assertLess(mean_kl(truth, found, n_vocab), KL_F16_CACHE)
                want = self.read(name, "greedy.json")["ids"]
                file = write_json(self.path("a.json"), sequence["ids"])
                r = self.greedy(name, len(want), "--tokens", file, "--ignore-eos")
                self.assertEqual(r["tokens"], want)
                self.assertEqual((r["n_prompt"], r["finish"]), (len(sequence["ids"]), "length"))

    def test_a_float32_cache_is_as_exact_as_it_says(self):
        for name in ("llama-gqa", "qwen3"):
            sequence = self.read(name, "tokens.json")["seqs"][0]
            truth = read_f32(self.golden_path(name, sequence["logits"]))
            found = self.logits(self.golden_path(name, "model.gguf"), sequence["ids"], "--name", name + "-f32",
                                "-ctk", "f32", "-ctv", "f32")
            self.assertLess(mean_kl(truth, found, len(truth) // len(sequence["ids"])), KL_F32_CACHE)

    def test_texts_to_ids_and_back(self):
        with open(os.path.join(GOLDEN, "tokenizers", "tiny.json")) as f:
            data = json.load(f)
        self.gqa("load", self.golden_path("llama-gqa", "model.gguf"), "--name", "texts")
        for text, ids in zip(data["texts"], data["ids"]):
            with self.subTest(text):
                found = self.gqa("tokenize", "-m", "texts", "--no-special", "--no-parse-special", "--json", "--", text)
                self.assertEqual(found.json, ids)
                back = self.gqa("detokenize", "-m", "texts", "--no-special", "-f", "-", input=found.out)
                self.assertEqual(back.out, text.encode())

    def test_control_tokens_count_unless_told_otherwise(self):
        self.gqa("load", self.golden_path("llama-gqa", "model.gguf"), "--name", "control")
        ids = self.gqa("tokenize", "-m", "control", "--no-special", "--json", "<s>").json
        self.assertEqual(ids, [1])
        plain = self.gqa("tokenize", "-m", "control", "--no-special", "--no-parse-special", "--json", "<s>").json
        self.assertNotIn(1, plain)


class Demo(Case):
    needs = os.path.join(MODELS, "demo.gguf")
    without = "no models/demo.gguf"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.expected = {}
        for name in ("demo", "demo-mha"):
            with open(os.path.join(MODELS, name + ".expected.json")) as f:
                cls.expected[name] = json.load(f)
            cls.gqa("load", os.path.join(MODELS, name + ".gguf"), "-ctk", "f32", "-ctv", "f32")

    def test_greedy_ids_are_torchs(self):
        for name, expected in self.expected.items():
            for case in expected["prompts"]:
                with self.subTest(name, prompt=case["prompt"]):
                    ids = self.gqa("tokenize", "-m", name, "--json", case["prompt"]).json
                    self.assertEqual(ids, case["prompt_tokens"])
                    want = case["greedy_tokens"]
                    clear = next((i for i, m in enumerate(case["margins"]) if m <= MARGIN), len(want))
                    if expected["eos"] in want:
                        clear = min(clear, want.index(expected["eos"]))
                    self.assertGreater(clear, 4, "the reference says too little")
                    r = self.greedy(name, len(want), case["prompt"])
                    self.assertEqual(r["tokens"][:clear], want[:clear])
                    if clear < len(want) and want[clear] == expected["eos"]:
                        self.assertEqual(r["finish"], "eos")
                    self.assertTrue(case["greedy_text"].startswith(r["text"][:clear]))

    def test_logits_are_torchs(self):
        for name, expected in self.expected.items():
            if "logits" not in expected:
                continue
            n_rows, n_vocab = expected["logits"]["shape"]
            truth = read_f32(os.path.join(MODELS, expected["logits"]["file"]))
            found = self.logits(name, expected["logits"]["tokens"])
            self.assertEqual((len(found), len(truth)), (n_rows * n_vocab,) * 2)
            error = max(abs(a - b) for a, b in zip(truth, found))
            self.assertLess(error, DEMO_LOGIT_ERROR)

    def test_odd_texts(self):
        for name, expected in self.expected.items():
            for case in expected["tokenize"]:
                with self.subTest(name, text=case["text"]):
                    found = self.gqa("tokenize", "-m", name, "--no-special", "--no-parse-special", "--json", "--",
                                     case["text"])
                    self.assertEqual(found.json, case["ids"])
                    back = self.gqa("detokenize", "-m", name, "--no-special", "-f", "-", input=found.out)
                    self.assertEqual(back.out, case["text"].encode())

    def test_it_writes_in_the_manner_of_package_descriptions(self):
        text = self.gqa("run", "-m", "demo", "-n", 60, "--temperature", 0, "Package: libpng-dev\nSection:").text
        self.assertTrue(re.search(r"\nDescription: ", text), text)


if __name__ == "__main__":
    main()
