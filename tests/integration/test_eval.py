"""gqa embed and gqa eval: what users read, against what is computed here from the wire's other figures; and
every figure at every level of the cpu backend.

Levels differ in the order in which float32 products are summed, in fused multiply-adds and in the polynomial of
exp(): relative 2^-24 each, grown over a few hundred terms and a handful of layers, and now and then to a place of
f16 where K and V are stored. Where weights are quantised, activations are rounded to 8 bits in groups of 32: a
difference in the last place that falls on a boundary moves a value by a 127th of its group's largest, so figures
scatter as quantisation itself does, only less. Bounds are five to ten times what was seen between c and avx2; a
wrong kernel is off by far more."""
import json
import math
import os
import random
import struct
import subprocess
import unittest
from collections import namedtuple

from cli import ToolCase, log_softmax, mean_kl, read_f32, rows_of, write_json
from harness import main, synth

MODELS = os.environ["GQAD_TEST_MODELS"]
Bound = namedtuple("Bound", "logit kl token relative cosine")
# Largest difference of a logit (they reach 16); mean KL in nats; log-probability per token; perplexities and bits
# per byte, relative; how far vectors of length 1 turn.
FLOATS = Bound(logit=2e-3, kl=1e-9, token=2e-4, relative=5e-5, cosine=1e-6)
INT8 = Bound(logit=0.4, kl=4e-4, token=0.05, relative=6e-3, cosine=5e-5)


def flat(x):
    return x if isinstance(x, list) else [x]


class Case(ToolCase):
    @classmethod
    def make_models(cls, folder):
        os.symlink(os.path.join(MODELS, "demo.gguf"), os.path.join(folder, "demo.gguf"))
        for type in ("q4_0", "q8_0", "q4_k_m"):
            synth(os.path.join(folder, type + ".gguf"), "n_embd=256,n_ff=512,n_layers=3,n_vocab=600", type)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with open(os.path.join(MODELS, "demo.expected.json")) as f:
            cls.expected = json.load(f)

    def write_lines(self, name, objects):
        with open(self.path(name), "w") as f:
            f.writelines(json.dumps(o) + "\n" for o in objects)
        return self.path(name)

    def tokens(self, text, model="demo"):
        return self.gqa("tokenize", "-m", model, "--no-parse-special", "--json", text).json

    def logprobs(self, ids, model="demo"):
        """The log-probability of each token after those before it, from the logits; the first has none."""
        info = self.gqa("show", model, "--json").json
        rows = rows_of(self.logits(model, ids), info["n_vocab"])
        return [log_softmax(row)[next] for row, next in zip(rows, ids[1:])]


class Embed(Case):
    TEXTS = ["a library", "a shared library", "games"]

    def test_lines_objects_and_files_hold_the_same_vectors(self):
        told = self.gqa("embed", "-m", "demo", "--json", *self.TEXTS).json
        self.assertEqual(set(told), {"pooling", "n_dims", "n_prompt", "n_tokens", "embeddings"})
        self.assertEqual((told["pooling"], len(told["embeddings"]), sum(told["n_tokens"])), ("last", 3, told["n_prompt"]))
        lines = [[float(w) for w in line.split()] for line in self.gqa("embed", "-m", "demo", *self.TEXTS).text.splitlines()]
        out = self.path("v.f32")
        self.gqa("embed", "-m", "demo", "-o", out, *self.TEXTS)
        rows = rows_of(read_f32(out), told["n_dims"])
        for line, row, of_object in zip(lines, rows, told["embeddings"]):
            self.assertEqual(list(row), [struct_f32(x) for x in line])
            for x, y in zip(row, of_object):
                self.assertAlmostEqual(x, y, places=7)
        piped = self.gqa("embed", "-m", "demo", "-o", "-", *self.TEXTS)
        with open(out, "rb") as f:
            self.assertEqual(piped.out, f.read())

    def test_texts_come_from_anywhere(self):
        want = self.gqa("embed", "-m", "demo", *self.TEXTS).out
        with open(self.path("lines.txt"), "w") as f:
            f.write("\n".join(self.TEXTS))
        self.assertEqual(self.gqa("embed", "-m", "demo", "--lines", self.path("lines.txt")).out, want)
        one = want.splitlines(True)[0]
        self.assertEqual(self.gqa("embed", "-m", "demo", input=self.TEXTS[0].encode()).out, one)
        ids = write_json(self.path("ids.json"), self.tokens(self.TEXTS[0]))
        self.assertEqual(self.gqa("embed", "-m", "demo", "--tokens", ids).out, one)
        self.refused("embed", "-m", "demo", "x", "--tokens", ids, words=["only one"], status=64)

    def test_more_texts_than_a_call_holds(self):
        texts = [f"text {i}" for i in range(600)]
        with open(self.path("many.txt"), "w") as f:
            f.write("\n".join(texts) + "\n")
        lines = self.gqa("embed", "-m", "demo", "--n-dims", 8, "--lines", self.path("many.txt")).text.splitlines()
        self.assertEqual(len(lines), 600)
        for i in (0, 255, 256, 599):
            self.assertEqual(self.gqa("embed", "-m", "demo", "--n-dims", 8, texts[i]).text, lines[i] + "\n")

    def test_options_reach_the_daemon(self):
        rows = self.gqa("embed", "-m", "demo", "--json", "--pooling", "none", "--no-normalize", *self.TEXTS).json
        self.assertEqual(len(rows["embeddings"]), sum(rows["n_tokens"]))
        mean = self.gqa("embed", "-m", "demo", "--json", "--pooling", "mean", "--embd-normalize", -1, self.TEXTS[0]).json
        n = rows["n_tokens"][0]
        for k, value in enumerate(mean["embeddings"][0]):
            self.assertAlmostEqual(value, math.fsum(r[k] for r in rows["embeddings"][:n]) / n, places=4)
        without = self.gqa("embed", "-m", "demo", "--json", "--no-special", self.TEXTS[0]).json
        self.assertEqual(without["n_tokens"], [n - 1])
        self.refused("embed", "-m", "demo", "--pooling", "rank", "x", words=["classifier"])
        self.refused("embed", "-m", "demo", "-o", "/absent/f", "x", words=["/absent/f"], status=73)

    def test_meanings_are_near(self):
        """Not that this little model knew much: a text is nearer to its own variation than to another."""
        env = {**os.environ, "GQA_SOCKET": self.daemon.socket}
        example = os.path.join(os.environ["GQAD_TEST_EXAMPLES"], "example-embed")
        done = subprocess.run([example, "demo", *self.TEXTS, self.TEXTS[0]], capture_output=True, env=env, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        table = [[float(w) for w in line.split()[:4]] for line in done.stdout.decode().splitlines()]
        for i in range(4):
            self.assertEqual(table[i][i], 1)
        self.assertEqual((table[0][3], table[0][1]), (1, table[1][0]))
        self.assertGreater(table[0][1], table[0][2])
        done = subprocess.run([example, "absent", "x"], capture_output=True, env=env, timeout=60)
        self.assertEqual((done.returncode, b"'absent'" in done.stderr), (1, True))


def struct_f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def questions(expected, seed=3):
    """What the model itself says next, against words that it does not say; the answer's place varies."""
    draw = random.Random(seed)
    wrong = ["zzz qqq", "### ###", "\u00e4\u00f6\u00fc", "qx 77 qx"]
    made = []
    for prompt in expected["prompts"]:
        choices = [(w * 20)[:len(prompt["greedy_text"])] for w in draw.sample(wrong, 3)]
        answer = draw.randrange(4)
        choices.insert(answer, prompt["greedy_text"])
        made.append({"context": prompt["prompt"], "choices": choices, "answer": answer})
    return made


class Eval(Case):
    def test_scores_are_those_of_the_logits(self):
        context, choices = "Description: a tool", [" for", " for developers", "zzz"]
        text = "Package: curl"
        file = self.write_lines("q.jsonl", [{"context": context, "choices": choices, "answer": " for"}, {"text": text}])
        question, of_text, totals = self.gqa("eval", "-m", "demo", "-f", file, "--details", "--json").lines
        n_context = self.tokens(context)
        for choice, logprob, n in zip(choices, question["logprobs"], question["n_tokens"]):
            ids = self.tokens(context + choice)
            first = next((i for i, (a, b) in enumerate(zip(ids, n_context)) if a != b), min(len(ids), len(n_context)))
            self.assertEqual(n, len(ids) - first)
            self.assertAlmostEqual(logprob, math.fsum(self.logprobs(ids)[first - 1:]), places=3)
        best = max(range(3), key=lambda i: question["logprobs"][i])
        best_norm = max(range(3), key=lambda i: question["logprobs"][i] / len(choices[i]))
        self.assertEqual((question["answer"], question["chosen"], question["chosen_norm"]), (0, best, best_norm))
        scores = self.logprobs(self.tokens(text))
        self.assertAlmostEqual(of_text["logprob"], math.fsum(scores), places=3)
        self.assertEqual((of_text["n_tokens"], totals["n_scored"]), (len(scores), len(scores)))
        self.assertAlmostEqual(totals["perplexity"], math.exp(-math.fsum(scores) / len(scores)), places=2)
        self.assertAlmostEqual(totals["bits_per_byte"], -math.fsum(scores) / math.log(2) / len(text), places=4)
        self.assertEqual(totals["accuracy"], float(best == 0))

    def test_accuracy_counts_right_and_wrong(self):
        file = self.write_lines("own.jsonl", questions(self.expected))
        own = self.gqa("eval", "-m", "demo", "-f", file, "--json").json
        self.assertEqual((own["accuracy"], own["accuracy_norm"], own["n_questions"]), (1, 1, len(self.expected["prompts"])))
        lies = questions(self.expected)
        lies[0]["answer"] = (lies[0]["answer"] + 1) % 4
        n = len(lies)
        told = self.gqa("eval", "-m", "demo", "-f", self.write_lines("lies.jsonl", lies), "--json").json
        self.assertAlmostEqual(told["accuracy"], (n - 1) / n, places=6)
        self.assertAlmostEqual(told["accuracy_error"], math.sqrt((n - 1) / n / n / (n - 1)), places=6)
        text = self.gqa("eval", "-m", "demo", "-f", file, "-N", 1).text
        self.assertRegex(text, r"^accuracy = 1\.0000 \+/- 0\.0000, by length 1\.0000 .*\(1 questions\)\n$")

    def test_a_line_that_is_wrong_is_named(self):
        good = {"text": "fine"}
        for bad, words in ((["x"], ["'text'"]), ({"text": 5}, ["'text' is not a string"]),
                           ({"context": 1, "choices": ["a", "b"], "answer": 0}, ["'context'"]),
                           ({"context": "x", "choices": ["a"], "answer": 0}, ["2 to 64"]),
                           ({"context": "x", "choices": ["a", ""], "answer": 0}, ["empty"]),
                           ({"context": "x", "choices": ["a", "b"], "answer": 2}, ["'answer'"]),
                           ({"context": "x", "choices": ["a", "b"], "answer": "c"}, ["'answer'"]),
                           ({"question": "x"}, ["'text'", "'choices'"])):
            with self.subTest(bad):
                self.refused("eval", "-m", "demo", "-f", self.write_lines("bad.jsonl", [good, bad]),
                             words=["bad.jsonl", "line 2", *words], status=65)
        self.refused("eval", "-m", "demo", "-f", "-", input=b"{\n", words=["line 1"], status=65)
        self.refused("eval", "-m", "demo", "-f", "-", input=b"\n \n", words=["no question"], status=65)
        self.refused("eval", "-m", "demo", "-f", "/absent/q", words=["/absent/q"], status=66)
        self.refused("eval", "-m", "demo", words=["-f FILE"], status=64)


class Policies(Case):
    """gqa eval longgen, and the options --kv-* of the other verbs."""

    def longgen(self, *policy, depth=120):
        return self.gqa("eval", "longgen", "-m", "demo", "-d", depth, "-n", 16, "--json", *policy).json

    def test_a_policy_that_drops_nothing_loses_nothing(self):
        for policy in (["--kv-policy", "snapkv", "--kv-budget", 120],
                       ["--kv-policy", "window", "--kv-sinks", 4, "--kv-recent", 200]):
            told = self.longgen(*policy)
            self.assertEqual((told["share_equal"], told["nll_loss"], told["kv_ratio"]), (1.0, 0.0, 1.0), policy)

    def test_what_is_dropped_is_told_with_its_loss(self):
        told = self.longgen("--kv-policy", "snapkv", "--kv-budget", 40, "--kv-window", 8)
        full, less = told["runs"]
        self.assertEqual((full["policy"], full["n_kept"], full["n_dropped"]), ("full", 135, 0))
        self.assertEqual((less["policy"], less["n_kept"], less["n_dropped"]), ("snapkv", 55, 80))
        self.assertAlmostEqual(told["nll_loss"], less["nll"] - full["nll"], places=6)
        self.assertNotEqual(told["nll_loss"], 0)
        self.assertGreater(told["bytes_allow"], 1)
        for run in told["runs"]:
            self.assertGreater(run["step_ms"], 0)
            self.assertGreater(run["worst_step_ms"], 0)
        text = self.gqa("eval", "longgen", "-m", "demo", "-d", 64, "-n", 4, "--kv-policy", "window",
                        "--kv-recent", 20).text
        self.assertIn("nats a token", text)
        self.refused("eval", "longgen", "-m", "demo", words=["--kv-policy"], status=64)

    def test_streams_have_prompts_of_their_own(self):
        one = self.longgen("--kv-policy", "snapkv", "--kv-budget", 40)
        two = self.longgen("--kv-policy", "snapkv", "--kv-budget", 40, "--streams", 2)
        for alone, both in zip(one["runs"], two["runs"]):
            self.assertEqual((both["streams"], both["n_kept"]), (2, alone["n_kept"]))
            self.assertEqual(both["kv_bytes"], 2 * alone["kv_bytes"])
            self.assertNotEqual(both["nll"], alone["nll"])
        self.refused("eval", "longgen", "-m", "demo", "--kv-policy", "window", "--streams", 65, words=["--streams"],
                     status=64)

    def test_a_policy_has_the_first_half_of_a_chunk_for_a_prompt(self):
        text = self.path("chunks")
        with open(text, "w") as f:
            f.write("the library is shared and the games are in the games group " * 20)
        base = ["perplexity", "-m", "demo", "-f", text, "-c", 128, "--json"]
        full = self.gqa(*base).json
        self.assertEqual(self.gqa(*base, "--kv-policy", "snapkv", "--kv-budget", 64).json, full)
        less = self.gqa(*base, "--kv-policy", "snapkv", "--kv-budget", 20, "--kv-window", 8).json
        self.assertEqual(less["n_scored"], full["n_scored"])
        self.assertNotEqual(less["perplexity"], full["perplexity"])

    def test_needles_are_asked_for_at_every_depth(self):
        text = self.path("hay")
        with open(text, "w") as f:
            f.write("the library is shared and the games are in the games group\n" * 30)
        base = ["eval", "needle", "-m", "demo", "-f", text, "-d", 150, "-N", 2, "--json"]
        same = self.gqa(*base, "--kv-policy", "snapkv", "--kv-budget", 400).json
        self.assertEqual([d["depth"] for d in same["depths"]], [0, 0.25, 0.5, 0.75, 1])
        self.assertEqual((same["n_tokens"], same["n_cases"], same["chance"]), (150, 2, 0.125))
        for d in same["depths"]:
            self.assertEqual((d["accuracy"], d["margin"]), (d["full"], d["full_margin"]))
            self.assertEqual((d["kept"], d["kept_of_all"]), (1, 1))
            self.assertIn(d["full"], (0, 0.5, 1))
        less = self.gqa(*base, "--kv-policy", "window", "--kv-sinks", 2, "--kv-recent", 30).json
        for d, of_all in zip(less["depths"], same["depths"]):
            self.assertEqual(d["full_margin"], of_all["full_margin"])
            self.assertLess(d["kept_of_all"], 0.25)
        kept = [d["kept"] for d in less["depths"]]
        self.assertEqual(kept[1:4], [0, 0, 0])
        self.assertTrue(0 < kept[0] < 1 and kept[4] > 0.5, kept)  # two sinks of it; near the end
        self.assertNotEqual([d["margin"] for d in less["depths"]], [d["margin"] for d in same["depths"]])
        self.refused("eval", "needle", "-m", "demo", words=["-f FILE"], status=64)
        self.refused(*base[:6], "-d", 100000, words=["less than the 100000"], status=65)

    def test_other_verbs_know_the_options(self):
        text = self.path("text")
        with open(text, "w") as f:
            f.write("the library is shared and the games are in the games group " * 20)
        base = ["perplexity", "-m", "demo", "-f", text, "-c", 64, "--json"]
        full = self.gqa(*base).json
        self.assertEqual(self.gqa(*base, "--kv-policy", "window", "--kv-recent", 64).json, full)
        less = self.gqa(*base, "--kv-policy", "window", "--kv-sinks", 1, "--kv-recent", 4).json
        self.assertNotEqual(less["perplexity"], full["perplexity"])
        self.refused("run", "-m", "demo", "x", "--kv-policy", "half", words=["kv_policy", "half"])


class Levels(Case):
    """The same figures at every level that this machine has, within what the head of this file states."""
    TEXTS = ["a library", "tool that converts", "Package: python3-apt\nSection: python\n"]
    N_TOKENS = 200

    def figures(self, model, level):
        name = f"{model}-{level}"
        self.gqa("load", self.path(f"models/{model}.gguf"), "--name", name, "--backend", f"cpu:isa={level}")
        info = self.gqa("show", name, "--json").json
        self.assertEqual(info["backend"]["isa"], level)
        ids = [1] + [(i * i * 7 + 3 * i) % (info["tokenizer"]["n_vocab"] - 300) + 280 for i in range(self.N_TOKENS - 1)]
        with open(self.path("text.txt"), "w") as f:
            f.write("\n".join(p["prompt"] + p["greedy_text"] for p in self.expected["prompts"]) * 6)
        lines = questions(self.expected) + [{"text": t} for t in self.TEXTS]
        *items, totals = self.gqa("eval", "-m", name, "-f", self.write_lines("q.jsonl", lines), "--details", "--json").lines
        made = {
            "logits": self.logits(name, ids),
            "perplexity": self.gqa("perplexity", "-m", name, "-c", 128, "-f", self.path("text.txt"), "--json").json,
            "items": items, "totals": totals,
            "vectors": self.gqa("embed", "-m", name, "--pooling", "mean", "--json", *self.TEXTS).json["embeddings"],
        }
        self.gqa("unload", name)
        return made

    def close(self, a, b):
        self.assertLessEqual(abs(a - b), RELATIVE_TOLERANCE * abs(b), (a, b))

    def compare(self, found, truth, bound):
        n_vocab = len(truth["logits"]) // self.N_TOKENS
        self.assertEqual(len(found["logits"]), len(truth["logits"]))
        self.assertLessEqual(max(abs(a - b) for a, b in zip(found["logits"], truth["logits"])), bound.logit)
        self.assertLessEqual(mean_kl(truth["logits"], found["logits"], n_vocab), bound.kl)
        for a, b in zip(found["items"], truth["items"]):
            logprobs = zip(*(i.get("logprobs", [i.get("logprob")]) for i in (a, b)))
            for x, y in logprobs:
                self.assertLessEqual(abs(x - y), bound.token * max(flat(a["n_tokens"])))
            self.assertEqual((a["n_tokens"], a.get("chosen"), a.get("chosen_norm")),
                             (b["n_tokens"], b.get("chosen"), b.get("chosen_norm")))
        for of, key in (("perplexity", "perplexity"), ("totals", "perplexity"), ("totals", "bits_per_byte")):
            self.assertLessEqual(abs(found[of][key] / truth[of][key] - 1), bound.relative, (of, key))
        for of, key in (("perplexity", "n_scored"), ("totals", "n_scored"), ("totals", "accuracy"), ("totals", "accuracy_norm")):
            self.assertEqual(found[of][key], truth[of][key])
        for a, b in zip(found["vectors"], truth["vectors"]):
            self.assertGreaterEqual(math.fsum(x * y for x, y in zip(a, b)), 1 - bound.cosine)

    def test_figures_agree(self):
        cpu = next(b for b in self.gqa("backend", "list", "--json").json["backends"] if b["name"] == "cpu")
        self.assertIn("c", cpu["isas"])
        print("levels here:", ", ".join(cpu["isas"]))
        for model, bound in (("demo", FLOATS), ("tiny", FLOATS), ("q4_0", INT8), ("q8_0", INT8), ("q4_k_m", INT8)):
            truth = self.figures(model, "c")
            for level in cpu["isas"]:
                if level != "c":
                    with self.subTest(model=model, level=level):
                        self.compare(self.figures(model, level), truth, bound)


if __name__ == "__main__":
    main()
