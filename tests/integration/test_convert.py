"""gqa-convert against sums that this file does itself, in float64; what it makes runs in the daemon."""
import errno
import json
import math
import os
import pty
import random
import resource
import signal
import struct
import subprocess
import unittest

import checkpoints
import gguf
from cli import Tool, environment, mean_kl, read_f32, write_json
from harness import Daemon, Folder, main, synth

CONVERT = os.environ["GQAD_TEST_CONVERT"]
GOLDEN = os.environ.get("GQAD_TEST_GOLDEN", "")
SANITIZED = os.environ.get("GQAD_TEST_SANITIZED") == "1"
N_EMBD, DIM, N_LAYERS, N_VOCAB = 48, 8, 2, 300
IDS = [1] + random.Random(7).choices(range(3, N_VOCAB), k=30)


def keys_of(arch, n_heads, n_kv_heads, **more):
    return {"general.architecture": arch, f"{arch}.context_length": 128, f"{arch}.embedding_length": N_EMBD,
            f"{arch}.block_count": N_LAYERS, f"{arch}.feed_forward_length": 64,
            f"{arch}.attention.head_count": n_heads, f"{arch}.attention.head_count_kv": n_kv_heads,
            f"{arch}.attention.key_length": DIM, f"{arch}.attention.value_length": DIM,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.rope.freq_base": 10000.0,
            f"{arch}.rope.dimension_count": DIM, **checkpoints.vocabulary(N_VOCAB), **more}


def shapes_of(n_heads, n_kv_heads, biases=False):
    shapes = {"token_embd.weight": (N_VOCAB, N_EMBD), "output_norm.weight": (N_EMBD,),
              "output.weight": (N_VOCAB, N_EMBD)}
    for i in range(N_LAYERS):
        b = f"blk.{i}."
        shapes.update({b + "attn_norm.weight": (N_EMBD,), b + "ffn_norm.weight": (N_EMBD,),
                       b + "attn_q.weight": (n_heads * DIM, N_EMBD), b + "attn_k.weight": (n_kv_heads * DIM, N_EMBD),
                       b + "attn_v.weight": (n_kv_heads * DIM, N_EMBD),
                       b + "attn_output.weight": (N_EMBD, n_heads * DIM),
                       b + "ffn_gate.weight": (64, N_EMBD), b + "ffn_up.weight": (64, N_EMBD),
                       b + "ffn_down.weight": (N_EMBD, 64)})
        if biases:
            shapes.update({b + "attn_q.bias": (n_heads * DIM,), b + "attn_k.bias": (n_kv_heads * DIM,),
                           b + "attn_v.bias": (n_kv_heads * DIM,)})
    return shapes


def float32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def random_tensors(shapes, seed=1):
    draw = random.Random(seed)
    made = {}
    for name, shape in shapes.items():
        about = 1 if name.endswith("norm.weight") else 0
        scale = 0.2 if about else 1.7 / shape[-1] ** 0.5
        made[name] = (shape, [float32(about + scale * draw.uniform(-1, 1)) for _ in range(math.prod(shape))])
    return made


def pooled(rows, groups, dim, first_only=False):
    """Rows of every group: the mean over its heads' rows, or the first head's, rounded once."""
    out = []
    for heads in groups:
        heads = heads[:1] if first_only else heads
        for i in range(dim):
            of_heads = [rows[h * dim + i] for h in heads]
            out.append([float32(math.fsum(column) / len(heads)) for column in zip(*of_heads)])
    return out


def neighbours(n_heads, n_groups):
    size = n_heads // n_groups
    return [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Folder()
        cls.n_files = 0

    @classmethod
    def tearDownClass(cls):
        cls.folder.remove()

    def path(self, name=None):
        type(self).n_files += 1
        return os.path.join(self.folder.path, name or f"{self.n_files}.gguf")

    def convert(self, *arguments, status=0, **how):
        done = subprocess.run([CONVERT, *map(str, arguments)], capture_output=True, timeout=60,
                              env=environment(self.folder.path), cwd=self.folder.path, **how)
        self.assertEqual(done.returncode, status, done.stderr.decode())
        if status == 0:
            self.assertEqual(done.stderr, b"")
            return done.stdout.decode()
        return done.stderr.decode()

    def refused(self, source, *words, heads=1, more=()):
        """It fails with these words, and leaves nothing behind."""
        target = self.path()
        before = set(os.listdir(self.folder.path))
        err = self.convert("--kv-heads", heads, *more, source, target, status=1)
        for word in words:
            self.assertIn(word, err)
        self.assertEqual(set(os.listdir(self.folder.path)), before)

    def mha(self, n_heads=6, n_kv_heads=6, biases=False, arch="llama", seed=1, change=None, **keys):
        path = self.path()
        tensors = random_tensors(shapes_of(n_heads, n_kv_heads, biases), seed)
        if change:
            change(tensors)
        checkpoints.write_gguf(path, keys_of(arch, n_heads, n_kv_heads, **keys), tensors)
        return path


class Gguf(Case):
    def check(self, source, n_heads, n_groups, pool):
        target = self.path()
        self.convert("--kv-heads", n_groups, "--pool", pool, source, target)
        keys_before, before = checkpoints.read_gguf(source)
        keys_after, after = checkpoints.read_gguf(target)
        self.assertEqual(list(before), list(after))
        self.assertEqual(keys_after.pop("llama.attention.head_count_kv"), n_groups)
        del keys_before["llama.attention.head_count_kv"]
        self.assertIn("needs uptraining", keys_after.pop("gqad.converted"))
        self.assertEqual(keys_before, keys_after)
        groups = neighbours(n_heads, n_groups)
        for name in before:
            if "attn_k" in name or "attn_v" in name:
                want = pooled(before[name].rows, groups, DIM, pool == "first")
                self.assertEqual(after[name].rows, want, name)
            else:
                self.assertTrue(after[name] == before[name], name)

    def test_means_and_first_heads(self):
        source = self.mha(biases=True)
        for n_groups in (3, 2, 1):  # groups of 2, 3 and all 6
            for pool in ("mean", "first"):
                with self.subTest(n_groups, pool=pool):
                    self.check(source, 6, n_groups, pool)

    def test_all_heads_are_the_identity(self):
        source, target = self.mha(biases=True), self.path()
        self.convert("--kv-heads", 6, source, target)
        keys_before, before = checkpoints.read_gguf(source)
        keys_after, after = checkpoints.read_gguf(target)
        self.assertIn("computes what it did", keys_after.pop("gqad.converted"))
        self.assertEqual(keys_before, keys_after)
        self.assertEqual(before, after)

    def test_grouped_heads_made_many_come_back(self):
        """Every KV head three times, then pooled by three: the bits of the grouped model."""
        grouped, many, back = self.mha(6, 2), self.path(), self.path()
        keys, tensors = checkpoints.read_gguf(grouped)
        made = {}
        for name, t in tensors.items():
            rows = t.rows
            if "attn_k" in name or "attn_v" in name:
                rows = [rows[h // 3 * DIM + i] for h in range(6) for i in range(DIM)]
            made[name] = ((len(rows), *t.shape[1:]), [x for r in rows for x in r])
        checkpoints.write_gguf(many, {**keys, "llama.attention.head_count_kv": 6}, made)
        report = json.loads(self.convert("--kv-heads", 2, "--json", many, back))
        self.assertEqual(checkpoints.read_gguf(back)[1], tensors)
        self.assertEqual([(l["k_lost"], l["v_lost"]) for l in report["layers"]], [(0, 0)] * N_LAYERS)

    def test_what_is_lost(self):
        source = self.mha()
        _, tensors = checkpoints.read_gguf(source)
        lost = {}
        for pool in ("mean", "first", "random"):
            report = json.loads(self.convert("--kv-heads", 2, "--pool", pool, "--json", source, self.path()))
            lost[pool] = [l["k_lost"] for l in report["layers"]]
        for layer in range(N_LAYERS):
            rows = tensors[f"blk.{layer}.attn_k.weight"].rows
            want = pooled(rows, neighbours(6, 2), DIM)
            gone = math.fsum((x - y) ** 2 for h in range(6) for i in range(DIM)
                             for x, y in zip(rows[h * DIM + i], want[h // 3 * DIM + i]))
            total = math.fsum(x * x for r in rows for x in r)
            self.assertAlmostEqual(lost["mean"][layer], gone / total, places=9)
            self.assertLess(lost["mean"][layer], lost["first"][layer])
            self.assertLess(lost["first"][layer], lost["random"][layer])

    def test_random_heads(self):
        source, outputs = self.mha(), []
        for seed in (1, 1, 2):
            outputs.append(self.path())
            self.convert("--kv-heads", 2, "--pool", "random", "--seed", seed, source, outputs[-1])
        read = [checkpoints.read_gguf(p)[1]["blk.1.attn_v.weight"] for p in outputs]
        self.assertEqual(read[0], read[1])
        self.assertNotEqual(read[0], read[2])

        def deviation(t):
            values = [x for r in t.rows for x in r]
            return math.sqrt(math.fsum(x * x for x in values) / len(values))
        was = deviation(checkpoints.read_gguf(source)[1]["blk.1.attn_v.weight"])
        self.assertAlmostEqual(deviation(read[0]) / was, 1, delta=0.1)  # of 768 draws; seeds are fixed

    def test_types(self):
        source = os.path.join(self.folder.path, "q4.gguf")
        synth(source, "n_heads=4,n_kv_heads=4,head_dim=32,n_embd=128", "q4_0")
        keys, before = checkpoints.read_gguf(source)
        for wanted, matrix, pool in ((None, "Q4_0", "F16"), ("f16", "F16", "F16"), ("bf16", "BF16", "BF16"),
                                     ("q8_0", "Q8_0", "Q8_0"), ("f32", "F32", "F32")):
            with self.subTest(wanted):
                target = self.path()
                self.convert("--kv-heads", 2, *(["--type", wanted] if wanted else []), source, target)
                keys, after = checkpoints.read_gguf(target)
                self.assertEqual(after["blk.0.attn_q.weight"].type, matrix)
                self.assertEqual(after["blk.0.attn_k.weight"].type, pool)
                self.assertEqual(after["blk.0.attn_norm.weight"].type, "F32")
                if wanted:
                    self.assertEqual(keys["general.file_type"], {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[wanted])
        self.assertIn("q5_0", self.convert("--kv-heads", 2, "--type", "q5_0", source, self.path(), status=1).lower())

    def test_what_ends_in_the_middle_leaves_nothing_of_that_name(self):
        """No room for the file: an error; killed while it writes: what it wrote has another name."""
        source, target = self.mha(), self.path()
        size = os.path.getsize(source) // 2

        def bound():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = set(os.listdir(self.folder.path))
        err = self.convert("--kv-heads", 6, source, target, status=1, preexec_fn=bound, restore_signals=False)
        self.assertIn(os.strerror(errno.EFBIG), err)
        self.assertEqual(set(os.listdir(self.folder.path)), before)
        self.convert("--kv-heads", 6, source, target, status=-signal.SIGXFSZ, preexec_fn=bound)
        self.assertFalse(os.path.exists(target))
        self.convert("--kv-heads", 6, source, target)  # what the dead one left is in nobody's way

    def test_progress_on_a_terminal(self):
        source = self.mha()
        for more, shown in (((), True), (("--quiet",), False)):
            ours, terminal = pty.openpty()
            try:
                subprocess.run([CONVERT, "--kv-heads", "2", *more, source, self.path()], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=terminal, timeout=60, check=True,
                               env=environment(self.folder.path), cwd=self.folder.path)
                os.set_blocking(ours, False)
                try:
                    told = os.read(ours, 1 << 16)
                except BlockingIOError:
                    told = b""
            finally:
                os.close(ours)
                os.close(terminal)
            self.assertEqual(b"100 %" in told, shown, told)

    @unittest.skipIf(SANITIZED, "a sanitizer's shadow is counted as memory too")
    def test_memory_does_not_grow_with_the_model(self):
        """92 MB of weights, in 8 MiB of memory that is not the files'."""
        source, target = os.path.join(self.folder.path, "large.gguf"), self.path()
        synth(source, "n_embd=2048,n_heads=16,n_kv_heads=16,head_dim=128,n_ff=4096,n_layers=2,n_vocab=600", "q8_0")
        self.assertGreater(os.path.getsize(source), 90e6)

        def bound():
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 20, 8 << 20))
        for group in ("neighbour", "similar"):
            self.convert("--kv-heads", 4, "--group", group, source, target, preexec_fn=bound)
            self.assertGreater(os.path.getsize(target), 75e6)
        os.unlink(source)

    def test_refusals(self):
        source = self.mha()
        self.refused(source, "4 KV heads", "6", heads=4)
        self.refused(source, "12 KV heads", "6", heads=12)
        self.refused(self.mha(**{"llama.attention.causal": False}), "encoder")

        def wide_norm(tensors):
            tensors["blk.1.attn_k_norm.weight"] = ((6 * DIM,), [1.0] * 6 * DIM)
        self.refused(self.mha(change=wide_norm), "blk.1.attn_k_norm.weight", "norm over all heads")
        self.refused(self.mha(change=lambda t: t.pop("blk.1.attn_v.weight")), "layer 1", "llama")

        def short(tensors):
            tensors["blk.0.attn_k.weight"] = ((5 * DIM, N_EMBD), [0.0] * 5 * DIM * N_EMBD)
        self.refused(self.mha(change=short), "blk.0.attn_k.weight", "40 rows", "48")
        with open(source, "rb") as f:
            data = f.read()
        for n in (0, 3, 100, len(data) // 2, len(data) - 1):
            cut = self.path()
            with open(cut, "wb") as f:
                f.write(data[:n])
            self.refused(cut)

    def test_usage(self):
        source = self.mha()
        for arguments in ((), (source, "x"), ("--kv-heads", "two", source, "x"), ("--kv-heads", 2, source),
                          ("--kv-heads", 2, "--pool", "median", source, "x"), ("--kv-heads", 2, source, "x", "y"),
                          ("--kv-heads", 2, "--type", "q9", source, "x")):
            self.assertIn("--help", self.convert(*arguments, status=64))
        self.convert("--kv-heads", 2, "nothing.gguf", "x", status=66)
        self.assertIn("needs uptraining", self.convert("--kv-heads", 2, source, self.path()))


class Running(Case):
    """The daemon runs what was converted."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.daemon = Daemon(cls.folder.path)
        cls.gqa = Tool(cls.folder.path, "--socket", cls.daemon.socket)

    @classmethod
    def tearDownClass(cls):
        try:
            cls.daemon.stop()
        finally:
            super().tearDownClass()

    def logits(self, model, ids=IDS):
        file = write_json(os.path.join(self.folder.path, "ids.json"), ids)
        out = os.path.join(self.folder.path, "out.f32")
        self.gqa("logits", "-m", model, "--tokens", file, "-o", out, "-ctk", "f32", "-ctv", "f32")
        return read_f32(out)

    def test_similar_heads_find_each_other(self):
        """Pairs of equal KV heads, far apart: neighbours lose much, similar ones nothing, and the model
        computes what it did. Float sums over moved columns differ in their last bits: 1e-4 of logits of 1."""
        places = {0: 0, 4: 0, 1: 1, 3: 1, 2: 2, 5: 2}

        def planted(tensors):
            for name, (shape, values) in list(tensors.items()):
                if "attn_k" in name or "attn_v" in name:
                    n = len(values) // 6
                    heads = [values[h * n:(h + 1) * n] for h in range(6)]
                    tensors[name] = (shape, [x for h in range(6) for x in heads[places[h]]])
        for arch, n_heads, biases in (("llama", 6, False), ("llama", 12, False), ("qwen2", 6, True)):
            with self.subTest(arch, n_heads=n_heads):
                source, target = self.mha(n_heads, 6, biases, arch, change=planted), self.path()
                report = json.loads(self.convert("--kv-heads", 3, "--json", source, self.path()))
                self.assertGreater(report["layers"][0]["k_lost"], 0.2)
                report = json.loads(self.convert("--kv-heads", 3, "--group", "similar", "--json", source, target))
                self.assertEqual([(l["k_lost"], l["v_lost"]) for l in report["layers"]], [(0, 0)] * N_LAYERS)
                truth, found = self.logits(source), self.logits(target)
                self.assertGreater(max(map(abs, truth)), 0.5)
                self.assertLess(max(abs(a - b) for a, b in zip(truth, found)), 1e-4)

    def test_means_run_as_computed_here(self):
        """Against a model whose pooled rows this file has computed."""
        source, target, by_hand = self.mha(), self.path(), self.path()
        self.convert("--kv-heads", 2, source, target)
        keys, tensors = checkpoints.read_gguf(source)
        made = {}
        for name, t in tensors.items():
            rows = pooled(t.rows, neighbours(6, 2), DIM) if "attn_k" in name or "attn_v" in name else t.rows
            made[name] = ((len(rows), *t.shape[1:]), [x for r in rows for x in r])
        checkpoints.write_gguf(by_hand, {**keys, "llama.attention.head_count_kv": 2}, made)
        self.assertEqual(self.logits(target), self.logits(by_hand))

    def test_every_golden_architecture(self):
        models = os.path.join(GOLDEN, "models")
        if not GOLDEN or not os.path.isdir(models):
            self.skipTest("no golden data")
        for name in sorted(os.listdir(models)):
            if name.startswith("llama-q-") and name not in ("llama-q-Q4_K_M", "llama-q-Q8_0"):
                continue
            with self.subTest(name):
                source, target = os.path.join(models, name, "model.gguf"), self.path()
                with open(os.path.join(models, name, "tokens.json")) as f:
                    ids = json.load(f)["seqs"][0]["ids"]
                truth = read_f32(os.path.join(models, name, "logits.f32"))
                n_vocab = len(truth) // len(ids)
                report = json.loads(self.convert("--kv-heads", 1, "--json", source, target))
                found = self.logits(target, ids)
                self.assertEqual(len(found), len(truth))
                self.assertTrue(all(map(math.isfinite, found)))
                was_mqa = report["kv_heads_before"] == 1
                kl = mean_kl(truth, found, n_vocab)
                self.assertLess(kl, 1e-6 if was_mqa else 20)
                if not was_mqa:
                    self.assertGreater(kl, 1e-6)  # it is another model


def decoder(keys, tensors, ids):
    """Logits of the last position, all in float64: a llama (pairs side by side) or a qwen2 (halves)."""
    arch = keys["general.architecture"]
    n_heads, n_kv = keys[f"{arch}.attention.head_count"], keys[f"{arch}.attention.head_count_kv"]

    def product(name, x):
        rows = tensors[name + ".weight"].rows
        biases = tensors[name + ".bias"].rows if name + ".bias" in tensors else [[0.0]] * len(rows)
        return [math.fsum(w * v for w, v in zip(row, x)) + b for row, (b,) in zip(rows, biases)]

    def norm(name, x):
        scale = 1 / math.sqrt(math.fsum(v * v for v in x) / len(x) + keys[f"{arch}.attention.layer_norm_rms_epsilon"])
        return [v * scale * g for v, (g,) in zip(x, tensors[name + ".weight"].rows)]

    def turn(x, position):
        x = list(x)
        for h in range(len(x) // DIM):
            for i in range(DIM // 2):
                a, b = (2 * i, 2 * i + 1) if arch == "llama" else (i, i + DIM // 2)
                a, b, t = h * DIM + a, h * DIM + b, position * 10000 ** (-2 * i / DIM)
                x[a], x[b] = x[a] * math.cos(t) - x[b] * math.sin(t), x[a] * math.sin(t) + x[b] * math.cos(t)
        return x
    stream = [tensors["token_embd.weight"].rows[i] for i in ids]
    for layer in range(N_LAYERS):
        b = f"blk.{layer}."
        inputs = [norm(b + "attn_norm", x) for x in stream]
        q = [turn(product(b + "attn_q", x), t) for t, x in enumerate(inputs)]
        k = [turn(product(b + "attn_k", x), t) for t, x in enumerate(inputs)]
        v = [product(b + "attn_v", x) for x in inputs]
        for t in range(len(ids)):
            out = []
            for h in range(n_heads):
                g = h // (n_heads // n_kv)
                mine = q[t][h * DIM:(h + 1) * DIM]
                scores = [math.fsum(x * y for x, y in zip(mine, k[s][g * DIM:(g + 1) * DIM])) / math.sqrt(DIM)
                          for s in range(t + 1)]
                weights = [math.exp(s - max(scores)) for s in scores]
                total = math.fsum(weights)
                out += [math.fsum(w * v[s][g * DIM + d] for s, w in enumerate(weights)) / total for d in range(DIM)]
            x = [a + c for a, c in zip(stream[t], product(b + "attn_output", out))]
            y = norm(b + "ffn_norm", x)
            gate, up = product(b + "ffn_gate", y), product(b + "ffn_up", y)
            stream[t] = [a + c for a, c in zip(x, product(b + "ffn_down", [g / (1 + math.exp(-g)) * u
                                                                           for g, u in zip(gate, up)]))]
    return product("output", norm("output_norm", stream[-1]))


class Aligned(Running):
    """Heads turned towards each other before they are pooled."""
    test_similar_heads_find_each_other = test_means_run_as_computed_here = test_every_golden_architecture = None
    TEXT = [1] + random.Random(8).choices(range(3, N_VOCAB), k=191)

    def planted(self, arch, order=range(6)):
        """Heads of a group are one head: its V turned by some orthogonal matrix, its K by an angle per pair.
        order: which of six such heads lies where."""
        draw = random.Random(5)

        def orthogonal():
            rows = []
            for _ in range(DIM):
                row = [draw.gauss(0, 1) for _ in range(DIM)]
                for other in rows:
                    along = math.fsum(a * b for a, b in zip(row, other))
                    row = [a - along * b for a, b in zip(row, other)]
                length = math.sqrt(math.fsum(a * a for a in row))
                rows.append([a / length for a in row])
            return rows

        def change(tensors):
            for layer in range(N_LAYERS):
                turns = [orthogonal() for _ in range(6)]
                angles = [[draw.uniform(-3, 3) for _ in range(DIM // 2)] for _ in range(6)]
                for kind in ("weight", "bias"):
                    for part in "kv":
                        name = f"blk.{layer}.attn_{part}.{kind}"
                        if name not in tensors:
                            continue
                        shape, values = tensors[name]
                        width = shape[1] if len(shape) > 1 else 1
                        rows = [values[i:i + width] for i in range(0, len(values), width)]
                        made = []
                        for h in order:
                            base = rows[h // 3 * DIM:(h // 3 + 1) * DIM]
                            if part == "v":
                                made += [[math.fsum(turns[h][i][m] * base[m][c] for m in range(DIM))
                                          for c in range(width)] for i in range(DIM)]
                                continue
                            head = [list(r) for r in base]
                            for i, t in enumerate(angles[h]):
                                a, b = (2 * i, 2 * i + 1) if arch == "llama" else (i, i + DIM // 2)
                                head[a] = [x * math.cos(t) - y * math.sin(t) for x, y in zip(base[a], base[b])]
                                head[b] = [x * math.sin(t) + y * math.cos(t) for x, y in zip(base[a], base[b])]
                            made += head
                        tensors[name] = (shape, [float32(x) for r in made for x in r])
        return self.mha(6, 6, arch == "qwen2", arch, change=change, **{f"{arch}.context_length": 512})

    def calibration(self, model, **more):
        file, out = write_json(os.path.join(self.folder.path, "text.json"), self.TEXT), self.path()
        name = os.path.basename(model)
        self.gqa("load", model, "--name", name, "-ctk", "f32", "-ctv", "f32")
        self.gqa("run", "-m", name, "-n", 1, "--tokens", file)
        self.gqa("kv", "export", "-m", name, "--tokens", file, "-o", out)
        self.gqa("unload", name)
        return out

    def distance(self, a, b):
        return max(abs(x - y) for x, y in zip(a, b))

    def test_turned_heads_are_one_head(self):
        """Pooling loses nothing, and the pooled model computes what the source did: angles are found from
        float32 values, so logits of size 1 agree to 1e-3. Plain means lose most."""
        for arch, order, group in (("llama", (0, 1, 2, 3, 4, 5), "neighbour"), ("qwen2", (0, 1, 2, 3, 4, 5), "neighbour"),
                                   ("llama", (0, 3, 1, 4, 2, 5), "similar"), ("qwen2", (5, 0, 4, 1, 3, 2), "similar")):
            with self.subTest(arch, group=group):
                source = self.planted(arch, order)
                text, target, plain = self.calibration(source), self.path(), self.path()
                report = json.loads(self.convert("--kv-heads", 2, "--pool", "aligned", "--calibration", text, "--group",
                                                 group, "--json", source, target))
                self.assertTrue(report["needs_uptraining"])
                for layer in report["layers"]:
                    self.assertLess(max(layer["k_lost"], layer["v_lost"]), 1e-6)
                self.convert("--kv-heads", 2, "--group", group, source, plain)
                truth = self.logits(source)
                self.assertLess(self.distance(truth, self.logits(target)), 1e-3)
                self.assertGreater(self.distance(truth, self.logits(plain)), 0.1)

    def test_turning_alone_changes_nothing(self):
        """In float64, from weights that were turned and rounded to float32 once: 1e-5 of logits of size 1."""
        for arch, group in (("llama", "neighbour"), ("llama", "similar"), ("qwen2", "neighbour")):
            with self.subTest(arch, group=group):
                source = self.mha(6, 6, arch == "qwen2", arch, **{f"{arch}.context_length": 512})
                text, target = self.calibration(source), self.path()
                self.convert("--kv-heads", 2, "--pool", "aligned", "--calibration", text, "--keep-heads", "--group",
                             group, source, target)
                keys, before = checkpoints.read_gguf(source)
                keys_after, after = checkpoints.read_gguf(target)
                self.assertEqual(keys_after[f"{arch}.attention.head_count_kv"], 6)
                for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
                    self.assertNotEqual(before[f"blk.0.{part}.weight"].data, after[f"blk.0.{part}.weight"].data)
                truth, found = decoder(keys, before, IDS[:12]), decoder(keys, after, IDS[:12])
                self.assertGreater(max(map(abs, truth)), 0.5)
                self.assertLess(max(abs(a - b) for a, b in zip(truth, found)), 1e-5)

    def test_what_alignment_gains(self):
        source, found = self.mha(**{"llama.context_length": 512}), {}
        text = self.calibration(source)
        for parts in ("k", "v", "kv"):
            report = json.loads(self.convert("--kv-heads", 2, "--pool", "aligned", "--calibration", text, "--align",
                                             parts, "--json", source, self.path()))
            found[parts] = report["layers"]
        for k, v, both in zip(found["k"], found["v"], found["kv"]):
            self.assertLess(both["k_lost"], 0.95 * both["k_lost_unaligned"])
            self.assertLess(both["v_lost"], 0.95 * both["v_lost_unaligned"])
            self.assertEqual((k["k_lost"], k["v_lost"]), (both["k_lost"], both["v_lost_unaligned"]))
            self.assertEqual((v["k_lost"], v["v_lost"]), (both["k_lost_unaligned"], both["v_lost"]))

    def as_folder(self, model, arch):
        """The same model as Hugging Face has it, where RoPE always turns halves."""
        names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
        keys, tensors = checkpoints.read_gguf(model)
        path, content = self.path(), {}
        os.mkdir(path)
        for name, t in tensors.items():
            parts, rows = name.split("."), t.rows
            if parts[0] != "blk" or parts[2] not in names:
                continue
            if arch == "llama" and parts[2] in ("attn_q", "attn_k"):
                rows = [rows[h + 2 * i + odd] for h in range(0, len(rows), DIM) for odd in (0, 1) for i in range(DIM // 2)]
            values = [x for row in rows for x in row]
            content[f"model.layers.{parts[1]}.self_attn.{names[parts[2]]}.{parts[3]}"] = (
                "F32", t.shape, struct.pack(f"<{len(values)}f", *values))
        checkpoints.write_safetensors(os.path.join(path, "model.safetensors"), content)
        n_heads = keys[f"{arch}.attention.head_count"]
        write_json(os.path.join(path, "config.json"), {
            "model_type": arch, "num_hidden_layers": N_LAYERS, "hidden_size": N_EMBD, "head_dim": DIM,
            "num_attention_heads": n_heads, "num_key_value_heads": keys[f"{arch}.attention.head_count_kv"]})
        return path

    def test_a_folder_is_aligned_like_its_gguf(self):
        """With the GGUF's calibration, in which a llama's pairs are neighbours; bit for bit."""
        for arch in ("llama", "qwen2"):
            for more in ((), ("--keep-heads", "--group", "similar")):
                with self.subTest(arch, more=more):
                    source, target, folder = self.planted(arch), self.path(), self.path()
                    aligned = ("--kv-heads", 2, "--type", "f32", "--pool", "aligned", "--calibration",
                               self.calibration(source), *more)
                    self.convert(*aligned, source, target)
                    self.convert(*aligned, self.as_folder(source, arch), folder)
                    truth = checkpoints.read_folder(self.as_folder(target, arch))
                    self.assertTrue(any("k_proj" in name for name in truth))
                    found = checkpoints.read_folder(folder)
                    self.assertEqual(set(found), set(truth))
                    for name, t in truth.items():
                        self.assertTrue(found[name] == t, name)

    def test_refusals(self):
        source = self.mha(**{"llama.context_length": 512})
        text = self.calibration(source)
        unknown = self.as_folder(source, "llama")
        write_json(os.path.join(unknown, "config.json"), {
            "model_type": "mystery", "num_hidden_layers": N_LAYERS, "hidden_size": N_EMBD, "head_dim": DIM,
            "num_attention_heads": 6})
        self.refused(unknown, "mystery", "--align v", more=("--pool", "aligned", "--calibration", text))
        aligned = ("--pool", "aligned", "--calibration", text)

        def norms(tensors):
            for i in range(N_LAYERS):
                tensors[f"blk.{i}.attn_k_norm.weight"] = ((DIM,), [1.0] * DIM)
        self.refused(self.mha(change=norms), "attn_k_norm", "--align v", more=aligned)
        self.convert("--kv-heads", 1, *aligned, "--align", "v", self.mha(change=norms), self.path())
        self.refused(self.mha(arch="mystery"), "mystery", "--align v", more=aligned)
        self.refused(self.mha(12, 12), text, "another model's", more=aligned)
        with open(text, "rb") as f:
            data = f.read()
        for n in (0, 10, 200, 1000, len(data) // 2, len(data) - 17):
            cut = self.path()
            with open(cut, "wb") as f:
                f.write(data[:n])
            self.refused(source, cut, more=("--pool", "aligned", "--calibration", cut))
        for arguments in (("--pool", "aligned"), ("--calibration", text), ("--keep-heads",)):
            self.assertIn("--help", self.convert("--kv-heads", 2, *arguments, source, "x", status=64))


class Folders(Case):
    def folder_of(self, n_heads=4, fused=False, nested=False, shards=2, dtype="BF16"):
        """A checkpoint of Hugging Face; values are exact in BF16."""
        draw = random.Random(3)
        path = self.path(f"hf-{self.n_files}")
        os.mkdir(path)
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": {} for i in range(shards)}
        names = list(files)

        def add(name, *shape):
            values = [draw.randrange(-128, 129) / 64 for _ in range(math.prod(shape))]
            raw = checkpoints.bf16(values) if dtype == "BF16" else struct.pack(f"<{len(values)}f", *values)
            files[names[len(tensors) % shards]][name] = (dtype, shape, raw)
            tensors[name] = shape
        tensors = {}
        add("model.embed_tokens.weight", 32, N_EMBD)
        for i in range(N_LAYERS):
            a = f"model.layers.{i}.self_attn."
            if fused:
                add(a + "qkv_proj.weight", 3 * n_heads * DIM, N_EMBD)
            else:
                for part in "qkv":
                    add(a + part + "_proj.weight", n_heads * DIM, N_EMBD)
                    add(a + part + "_proj.bias", n_heads * DIM)
            add(a + "o_proj.weight", N_EMBD, n_heads * DIM)
        files[names[0]]["step"] = ("I64", (), struct.pack("<q", 17))
        config = {"model_type": "llama", "num_hidden_layers": N_LAYERS, "hidden_size": N_EMBD, "head_dim": DIM,
                  "num_attention_heads": n_heads}
        write_json(os.path.join(path, "config.json"), {"text_config": config} if nested else config)
        with open(os.path.join(path, "tokenizer.json"), "w") as f:
            f.write("{}")
        if shards > 1:
            write_json(os.path.join(path, "model.safetensors.index.json"),
                       {"metadata": {"total_size": 1}, "weight_map": {t: f for f, ts in files.items() for t in ts}})
        for name, content in files.items():
            checkpoints.write_safetensors(os.path.join(path, name), content)
        return path

    def check(self, source, fused, n_groups=2, n_heads=4, exact=True):
        target = self.path(f"out-{self.n_files}")
        self.convert("--kv-heads", n_groups, source, target)
        self.assertEqual(sorted(os.listdir(source)), sorted(os.listdir(target)))
        before, after = checkpoints.read_folder(source), checkpoints.read_folder(target)
        self.assertEqual(set(before), set(after))
        groups = neighbours(n_heads, n_groups)
        for name, t in before.items():
            if "qkv_proj" in name:
                rows, n = t.rows, n_heads * DIM
                want = rows[:n] + pooled(rows[n:2 * n], groups, DIM) + pooled(rows[2 * n:], groups, DIM)
                self.assertEqual(after[name].rows, want, name)
                self.assertEqual(after[name].shape, ((n_heads + 2 * n_groups) * DIM, N_EMBD))
            elif "k_proj" in name or "v_proj" in name:
                self.assertEqual(after[name].rows, pooled(t.rows, groups, DIM), name)
            else:
                self.assertTrue(after[name] == t, name)
        with open(os.path.join(target, "config.json")) as f:
            return json.load(f), target

    def test_a_folder(self):
        config, target = self.check(self.folder_of(), False)
        self.assertEqual(config["num_key_value_heads"], 2)
        self.assertIn("needs uptraining", config["gqad_converted"])
        with open(os.path.join(target, "model.safetensors.index.json")) as f:
            total = json.load(f)["metadata"]["total_size"]
        self.assertEqual(total, sum(len(t.data) for t in checkpoints.read_folder(target).values()))

    def test_fused_nested_and_whole(self):
        config, _ = self.check(self.folder_of(fused=True, nested=True, shards=1, dtype="F32"), True)
        self.assertEqual(config["text_config"]["num_key_value_heads"], 2)

    def test_refusals(self):
        source = self.folder_of(shards=1)
        name = os.path.join(source, "model-00001-of-00001.safetensors")
        with open(name, "rb") as f:
            data = f.read()
        n, = struct.unpack_from("<Q", data)
        header = json.loads(data[8:8 + n])

        def with_header(change):
            changed = json.loads(json.dumps(header))
            change(changed)
            text = json.dumps(changed).encode()
            return struct.pack("<Q", len(text)) + text + data[8 + n:]
        first = "model.embed_tokens.weight"
        for content, words in (
                (data[:4], ("too short",)), (data[:100], ("header of",)), (data[:-1], ("data_offsets",)),
                (struct.pack("<Q", 1 << 60) + data[8:], ("header of",)),
                (data[:8] + b"x" + data[9:], ("JSON",)),
                (with_header(lambda h: h[first].update(dtype="Q9")), (first, "Q9")),
                (with_header(lambda h: h[first].update(shape=[1 << 40, 1 << 40])), (first, "shape")),
                (with_header(lambda h: h[first].update(shape=[-1])), (first, "shape")),
                (with_header(lambda h: h[first].update(data_offsets=[0, 1 << 50])), (first, "data_offsets")),
                (with_header(lambda h: h.pop(first)), ("begins at",))):
            with self.subTest(words):
                with open(name, "wb") as f:
                    f.write(content)
                self.refused(source, *words, heads=2)
        with open(name, "wb") as f:
            f.write(data)
        there = self.path("there")
        os.mkdir(there)
        self.assertIn("there already", self.convert("--kv-heads", 2, source, there, status=73))
        write_json(os.path.join(source, "config.json"), {"num_hidden_layers": 0})
        self.refused(source, "config.json", "num_hidden_layers", heads=2)


if __name__ == "__main__":
    main()
