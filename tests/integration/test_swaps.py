#!/usr/bin/env python3
"""Golden models generate, one stream each, while their backends are swapped: no request fails, no token is
another, nothing is left behind. And what a client sees: the time between two tokens around a swap.

60 swaps over four models; with GQAD_TEST_LONG=1, 1,000 over all of the list. Levels of the cpu backend that
this processor lacks come from plugin files that emulate them (tests/emulated). GQAD_TEST_SWAP_MODEL=FILE
measures the gaps with that model, too, between the levels of the cpu backend that are not its reference; where
there is one such level only, between files of it that are new each time."""
import array
import json
import operator
import os
import shutil
import statistics
import threading
import time
import unittest

import wire
from harness import Daemon, Folder, main

PLUGINS = os.environ["GQAD_TEST_PLUGINS"]
CPU = os.environ["GQAD_TEST_CPU"]
GOLDEN = os.path.join(os.environ.get("GQAD_TEST_GOLDEN", "none"), "models")
LONG = bool(os.environ.get("GQAD_TEST_LONG"))
LARGE = os.environ.get("GQAD_TEST_SWAP_MODEL")
N_SWAPS = 1000 if LONG else 60
# Float32 caches, which the second plugin file ("good": plain loops, no sinks) can read, and others.
SHORT_MODELS = {"llama-gqa": "f32", "qwen3moe": "f32", "gemma3": "f16", "llama-q-Q4_K_M": "f32"}
MODELS = {**SHORT_MODELS, "llama-q-Q4_0": "f16", "llama-q-Q8_0": "q8_0", "llama-q-IQ4_XS": "f16", "llama-q-BF16": "bf16",
          "gemma2": "f32", "gpt-oss-mxfp4": "f16", "phi3": "f32", "qwen2": "f16", "mixtral": "f32", "granite": "f16"}
N_TOKENS = 160          # of a stream
TOKENS_BETWEEN = 3      # of a model's stream, between one swap of it and the next
REPLACE_EVERY = 10      # swaps after which the cpu plugin's file is another
LEVELS = ("amx", "avx512", "avx2", "c")  # that there are: swaps are between those that can run here
EMULATED = {level: os.environ["GQAD_TEST_EMULATED_" + level.upper()] for level in LEVELS
            if "GQAD_TEST_EMULATED_" + level.upper() in os.environ}
PAUSE_MS_MAX = 50
# Two tokens whose logits are nearer than this are a tie, on any model: levels differ by 1e-5 where weights are floats.
# Where they are quantised, one rounding that decides the code of an activation (8 bits) sends others after it, and
# what is left is the noise of these codes. How much that is, is measured for each model, on the text of the test
# itself: the most that any logit of any of its tokens moves between the reference and another choice. Two logits may
# move by as much against each other.
TIE = 1e-3
# And no logit moves by more than this: beyond it a backend is wrong. Caches of halves round K and V. Tiles multiply
# the rows of prompts in bf16, weights and activations (0.62 at most measured, with Q8_0): ties are wide with them,
# so that they are swapped in a test of their own.
NOISE_MAX, NOISE_MAX_QUANTISED, NOISE_MAX_TILES = 0.02, 0.25, 1.0
# Its router sends some tokens to other experts for a rounding: logits then move by 4, and no token could be wrong.
NOT_WITH_TILES = "gpt-oss-mxfp4"


def is_quantised(model):
    floats = model in MODELS and "mxfp4" not in model and ("-q-" not in model or "F16" in model)
    return not floats


class Stream(threading.Thread):
    """Generates the same text over and over, and notes when each event came."""

    def __init__(self, daemon, model, prompt, expected, tie):
        super().__init__()
        self.gqad, self.model, self.prompt, self.expected, self.tie = daemon, model, prompt, expected, tie
        self.news = threading.Condition()
        self.arrivals = [[]]    # of each text: times of its events
        self.n_tokens = self.n_texts = self.n_ties = 0
        self.ending, self.error = False, None

    def run(self):
        try:
            with self.gqad.connect() as client:
                while not self.ending:
                    self.generate(client)
        except Exception as error:  # told by whoever waits
            self.error = error
        with self.news:
            self.news.notify_all()

    def generate(self, c):
        id = c.send("text.generate", request(self.model, self.prompt, len(self.expected)))
        got = []
        while id not in c.answers:
            seen = len(c.events.get(id, []))
            if not c.receive():
                raise EOFError("the daemon closed the connection")
            now = time.monotonic()
            with self.news:
                for event in c.events.get(id, [])[seen:]:
                    got += event.get("tokens", [])
                    self.n_tokens += len(event.get("tokens", []))
                    self.arrivals[-1].append(now)
                self.news.notify_all()
        c.wait(id)
        c.events.pop(id)
        self.n_ties += check_same(c, self.model, self.prompt, self.expected, got, self.tie)
        self.n_texts += 1
        self.arrivals.append([])

    def wait_tokens(self, n):
        """Until so many more have come."""
        with self.news:
            until = self.n_tokens + n
            came = self.news.wait_for(lambda: self.n_tokens >= until or self.error, wire.TIMEOUT_S)
        if self.error or not came:
            raise self.error or AssertionError(f"{self.model}: no token for {wire.TIMEOUT_S} s")

    def finish(self):
        self.ending = True
        self.join()
        if self.error:
            raise self.error

    def gaps(self):
        """(begin, end) between two events of one text."""
        return [pair for times in self.arrivals for pair in zip(times, times[1:])]


def request(model, tokens, n):
    return {"model": model, "tokens": tokens, "n_predict": n, "temperature": 0.0, "ignore_eos": True,
            "cache_prompt": False, "stream": True}


def logits_of(client, model, tokens, first_row):
    id = client.send("text.logits", {"model": model, "tokens": tokens, "first_row": first_row, "cache_prompt": False})
    client.wait(id)
    data = b"".join(e["logits"]["data"] for e in client.events.pop(id))
    return array.array("f", data)


class Noise:
    """How far the logits of a text move when others than the reference compute them."""

    def __init__(self, client, model, prompt, expected):
        self.client, self.model, self.tokens, self.first = client, model, prompt + expected, len(prompt) - 1
        self.truth = self.logits()
        self.moves = array.array("f", [0])
        self.most = NOISE_MAX_QUANTISED if is_quantised(model) else NOISE_MAX

    def logits(self):
        return logits_of(self.client, self.model, self.tokens, self.first)

    def measure(self):
        """With the backend that is in use."""
        self.moves.extend(map(abs, map(operator.sub, self.truth, self.logits())))

    def tie(self):
        """Two logits that are nearer than this; the noise is that of sound backends."""
        moves = sorted(self.moves)
        told = f"{self.model}: logits move by {moves[len(moves) // 2]:.2g} (median), " \
               f"{moves[len(moves) * 999 // 1000]:.2g} (99.9 %), {moves[-1]:.2g} (most), of {len(moves)}"
        print(told)
        if moves[-1] > self.most:
            raise AssertionError(told)
        return max(TIE, 2 * moves[-1])


def check_same(client, model, prompt, expected, got, tie):
    """0 where the tokens are equal; 1 where they part at a tie; else an error."""
    if len(got) != len(expected):
        raise AssertionError(f"{model}: {len(got)} tokens of {len(expected)}")
    at = next((k for k in range(len(got)) if expected[k] != got[k]), None)
    if at is None:
        return 0
    tokens = prompt + expected[:at]
    logits = logits_of(client, model, tokens, len(tokens) - 1)
    lead = abs(logits[expected[at]] - logits[got[at]])
    if lead >= tie:
        raise AssertionError(f"{model}: token {at} is {got[at]}, not {expected[at]}: their logits are {lead} apart, "
                             f"and {tie} are a tie")
    return 1


def gaps_of(streams, swaps):
    """Times between two tokens in ms: those in which the model's backend was swapped, and the others."""
    around, usual = [], []
    for stream in streams:
        own = [(begin, end) for model, begin, end in swaps if model == stream.model]
        for a, b in stream.gaps():
            (around if any(a < end and begin < b for begin, end in own) else usual).append((b - a) * 1e3)
    return sorted(around), sorted(usual)


def tell(name, gaps):
    return f"{name}: median {statistics.median(gaps):.2f} ms, 99 % {gaps[len(gaps) * 99 // 100]:.2f}, " \
           f"most {gaps[-1]:.2f} (n = {len(gaps)})"


class Swaps(unittest.TestCase):
    def start(self, models, *flags):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        self.plugins = os.path.join(self.folder.path, "plugins")
        os.mkdir(self.plugins, 0o700)
        self.install(CPU, "cpu.so")
        self.install(os.path.join(PLUGINS, "good.so"), "good.so")
        for name, file in models.items():
            os.symlink(file, os.path.join(self.folder.path, "models", name + ".gguf"))
        self.daemon = Daemon(self.folder.path, "--plugin-dir", self.plugins, "--parallel", str(len(models) + 1), *flags)
        self.addCleanup(self.daemon.kill)
        self.client = self.daemon.connect()
        self.addCleanup(self.client.close)
        self.levels = next(b for b in self.client.call("backend.list")["backends"] if b["name"] == "cpu")["isas"]
        self.emulated = {level: file for level, file in EMULATED.items() if level not in self.levels}
        self.cpu_file = CPU  # what cpu.so is a copy of
        self.isa_of = {}     # the level of each model's program

    def install_cpu(self, source):
        self.install(source, "cpu.so")
        self.cpu_file = source

    def install(self, source, name):
        path = os.path.join(self.plugins, name)
        shutil.copyfile(source, path + ".new")
        os.chmod(path + ".new", 0o755)
        os.rename(path + ".new", path)

    def use(self, model, **choice):
        if choice["backend"] == "cpu":
            self.isa_of[model] = choice.get("isa")
        file = self.emulated.get(self.isa_of[model], CPU)
        if file != self.cpu_file:  # a swap of attention alone opens the program's file, too
            self.install_cpu(file)
        return self.client.call("backend.use", {"model": model, **choice})

    def leaks(self):
        proc = f"/proc/{self.daemon.process.pid}/"
        with open(proc + "maps") as f:
            maps = [line for line in f if "gqa-plugin" in line or ".so" in line]
        return len(os.listdir(proc + "task")), len(os.listdir(proc + "fd")), len(maps)

    def images(self):
        """How many plugin files are mapped."""
        with open(f"/proc/{self.daemon.process.pid}/maps") as f:
            return len({line.split()[4] for line in f if "gqa-plugin" in line})

    def settle(self, models):
        """Every model on the cpu backend, and what was there before it closed."""
        for model in models:
            self.use(model, backend="cpu")
            self.client.generate(**request(model, [1, 5, 9], 100))
        wire.wait_until(lambda: self.images() <= 2, "files of plugins that nobody uses are closed")

    def swap(self, streams, choices, n, replace_every):
        """n swaps, one model after the other; what each took, and when. replace_every 0: never."""
        pauses, prepares, swaps = [], [], []
        for k in range(n):
            if replace_every and k % replace_every == replace_every - 1:
                self.install_cpu(self.cpu_file)
            stream = streams[k % len(streams)]
            mine = choices[stream.model]
            begin = time.monotonic()
            told = self.use(stream.model, **mine[k // len(streams) % len(mine)])
            swaps.append((stream.model, begin, time.monotonic()))
            pauses.append(told["pause_ms"])
            prepares.append(told["prepare_ms"])
            stream.wait_tokens(TOKENS_BETWEEN)
        return sorted(pauses), sorted(prepares), swaps

    def run_swaps(self, streams, choices, n, replace_every):
        for s in streams:
            s.start()
        try:
            pauses, prepares, swaps = self.swap(streams, choices, n, replace_every)
        finally:
            for s in streams:
                s.ending = True
            for s in streams:
                s.finish()
        around, usual = gaps_of(streams, swaps)
        others = [level for level in LEVELS if level not in self.levels and level not in self.emulated]
        print(f"levels here: {', '.join(self.levels)}; not here, and not tried: {', '.join(others) or 'none'}")
        print(f"{n} swaps of {len(streams)} models; "
              f"{sum(s.n_texts for s in streams)} texts, {sum(s.n_tokens for s in streams)} tokens, "
              f"{sum(s.n_ties for s in streams)} parted at a tie")
        print(f"no step could begin for: median {pauses[n // 2]:.4f} ms, most {pauses[-1]:.3f}; "
              f"preparation: median {prepares[n // 2]:.1f} ms, most {prepares[-1]:.1f}")
        print("between two tokens, " + tell("around a swap", around) + "; " + tell("else", usual))
        self.assertLessEqual(pauses[-1], PAUSE_MS_MAX)

    def run_golden_models(self, tiles):
        names = {n: t for n, t in (MODELS if LONG else SHORT_MODELS).items() if os.path.exists(os.path.join(GOLDEN, n))}
        if not names:
            self.skipTest(f"no golden models in {GOLDEN}: swaps were not tried on them")
        if tiles and names.pop(NOT_WITH_TILES, None):
            print(f"{NOT_WITH_TILES} is not swapped to tiles: golden-emulated-amx compares it with the truth")
        self.start({n: os.path.join(GOLDEN, n, "model.gguf") for n in names})
        levels = [level for level in (*self.levels, *self.emulated) if (level == "amx") == tiles or level == "c"]
        if levels == ["c"]:
            self.skipTest("no level that multiplies tiles, native or emulated: swaps to it were not tried")
        choices, streams = {}, []
        for name, kv_type in names.items():
            self.client.call("model.load", {"model": name, "cache_type_k": kv_type, "cache_type_v": kv_type,
                                            "backend": "cpu:isa=c"})
            with open(os.path.join(GOLDEN, name, "tokens.json")) as f:
                prompt = json.load(f)["seqs"][0]["ids"]
            expected = self.client.generate(**request(name, prompt, N_TOKENS))["tokens"]  # by the reference
            noise = Noise(self.client, name, prompt, expected)
            if tiles and (is_quantised(name) or "BF16" in name):
                noise.most = NOISE_MAX_TILES
            choices[name] = [{"backend": "cpu", "isa": level} for level in levels]
            if kv_type == "f32":
                choices[name].append({"backend": "good", "attention_only": True})
            for choice in choices[name]:  # whatever is loaded once is loaded now
                self.use(name, **choice)
                if choice.get("isa") != "c":
                    noise.measure()
            streams.append(Stream(self.daemon, name, prompt, expected, noise.tie()))
        self.settle(names)
        before = self.leaks()
        print(f"swaps between {', '.join(levels)} and a second plugin's attention; "
              f"emulated: {', '.join(level for level in levels if level in self.emulated) or 'none'}")
        self.run_swaps(streams, choices, N_SWAPS, REPLACE_EVERY)
        self.settle(names)
        wire.wait_until(lambda: self.leaks() == before, f"threads, descriptors and mappings are {before} again")
        faults = {b["name"]: b["faults"] for b in self.client.call("backend.list")["backends"]}
        self.assertEqual(faults, {"cpu": 0, "good": 0})
        self.daemon.stop()

    def test_golden_models(self):
        self.run_golden_models(tiles=False)

    def test_golden_models_with_tiles(self):
        self.run_golden_models(tiles=True)

    @unittest.skipUnless(LARGE, "no large model: set GQAD_TEST_SWAP_MODEL=FILE to measure gaps with one")
    def test_a_large_model(self):
        self.start({"large": os.path.abspath(LARGE)}, "-t", "2", "--kv-bytes", "1G", "-c", "2048")
        self.client.call("model.load", {"model": "large"})
        fast = [level for level in self.levels if level != "c"]
        prompt = [1 + 7 * k % 1000 for k in range(40)]
        expected = self.client.generate(**request("large", prompt, 400))["tokens"]
        noise = Noise(self.client, "large", prompt, expected)
        for level in fast:
            self.use("large", backend="cpu", isa=level)
            noise.measure()
        self.run_swaps([Stream(self.daemon, "large", prompt, expected, noise.tie())],
                       {"large": [{"backend": "cpu", "isa": level} for level in fast]}, 100, 0 if len(fast) > 1 else 1)
        self.daemon.stop()


if __name__ == "__main__":
    main()
