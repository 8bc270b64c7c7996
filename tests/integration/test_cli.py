"""Every verb of gqa against one private daemon: what scripts rely on, and what users read."""
import json
import os
import re
import subprocess
import unittest

from cli import GQA, TIMEOUT_S, Outcome, Tool, ToolCase, assert_one_line, read_f32, write_json
from harness import Daemon, Folder, main, synth
from test_hostile import as_stranger

RUN_KEYS = {"text", "tokens", "finish", "n_prompt", "n_cached", "n_generated", "seed", "kv", "timings", "cache"}
TIMING_KEYS = {"queue_ms", "prompt_ms", "first_token_ms", "predict_ms", "prompt_per_second",
               "predicted_per_second", "prefill_ms", "decode_ms", "sampling_ms", "delivery_ms", "steps",
               "n_preempted"}
CACHE_KEYS = {"hit_blocks", "source", "miss_reason"}
PROMPT = "Once upon a time"
ALL_BYTES = bytes(range(256)) + b"\xf0\x9f\x99\x82 \xe6\x97\xa5 \xc3\xa9 <s></s>\r\n\0\0 " + bytes(range(255, -1, -1))


class Case(ToolCase):
    @classmethod
    def make_models(cls, folder):
        for name, shape, type in (("q8", "tiny", "q8_0"), ("q4", "n_embd=256,n_ff=256,n_layers=1", "q4_k_m")):
            synth(os.path.join(folder, name + ".gguf"), shape, type)

    def write(self, name, data):
        with open(self.path(name), "wb") as f:
            f.write(data)
        return self.path(name)


class Run(Case):
    def run_json(self, *arguments, model="tiny"):
        return self.gqa("run", "-m", model, "-n", 6, "--ignore-eos", "--json", *arguments).json

    def test_the_object_has_the_keys_that_scripts_rely_on(self):
        for model in ("tiny", "q8", "q4"):
            r = self.run_json("--temperature", 0, PROMPT, model=model)
            self.assertEqual(set(r), RUN_KEYS)
            self.assertEqual(set(r["timings"]), TIMING_KEYS)
            self.assertEqual(set(r["cache"]), CACHE_KEYS)
            self.assertEqual((r["finish"], r["n_generated"], len(r["tokens"])), ("length", 6, 6))
            prompt = self.gqa("tokenize", "-m", model, "--json", PROMPT).json
            self.assertEqual(r["n_prompt"], len(prompt))
            self.assertLess(r["n_cached"], r["n_prompt"])
            again = self.run_json("--temperature", 0, PROMPT, model=model)
            self.assertEqual((again["text"], again["tokens"]), (r["text"], r["tokens"]))

    def test_sampling_options(self):
        best = self.run_json("--temperature", 0, PROMPT)["tokens"]
        for options in (("--samplers", "top_k;temperature", "--top-k", 1), ("--samplers", "temp,top_k", "--top-k", 1),
                        ("--top-nsigma", "1e-6", "--temp", 9), ("--mirostat", 2, "--mirostat-ent", 0, "--temp", 0)):
            with self.subTest(options):
                self.assertEqual(self.run_json(*options, PROMPT)["tokens"], best)
        every = ("--dynatemp-range", 0.1, "--dynatemp-exp", 2, "--typical", 0.9, "--xtc-probability", 0.5,
                 "--xtc-threshold", 0.1, "--dry-multiplier", 0.8, "--dry-base", 2, "--dry-allowed-length", 1,
                 "--dry-penalty-last-n", 100, "--dry-sequence-breaker", "none", "--dry-sequence-breaker", "\n",
                 "--mirostat-tau", 3, "--mirostat-lr", 0.2, "--seed", 3)
        self.assertEqual(self.run_json(*every, PROMPT)["tokens"], self.run_json(*every, PROMPT)["tokens"])
        self.refused("run", "-m", "tiny", "--samplers", "top_k;nucleus", PROMPT, words=["samplers", "nucleus", "top_p"])
        self.refused("run", "-m", "tiny", "--dry-sequence-breaker", "x" * 41, PROMPT, words=["dry_sequence_breakers", 40])

    def test_grammars(self):
        grammar = 'root ::= "yes" | "no" # a comment'
        file = self.write("answer.gbnf", grammar.encode())
        for options in (("--grammar", grammar), ("--grammar-file", file)):
            r = self.gqa("run", "-m", "tiny", "-n", 20, "--json", *options, PROMPT).json
            self.assertIn((r["text"], r["finish"]), (("yes", "eos"), ("no", "eos")))
        schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
        document = json.loads(self.gqa("run", "-m", "tiny", "-n", 40, "--json", "-j", schema, PROMPT).json["text"])
        self.assertIn(document, ({"ok": True}, {"ok": False}))
        self.refused("run", "-m", "tiny", "--grammar", "root ::= x", PROMPT, words=["grammar", "line 1", "'x'"])
        self.refused("run", "-m", "tiny", "--grammar-file", self.path("none"), PROMPT, words=["none"], status=66)
        self.refused("run", "-m", "tiny", "--grammar-file", file, "--grammar", grammar, PROMPT, words=["only one"], status=64)

    def test_a_prompt_comes_from_anywhere(self):
        want = self.run_json("--temperature", 0, PROMPT)["tokens"]
        file = self.write("prompt.txt", PROMPT.encode())
        ids = write_json(self.path("prompt.json"), self.gqa("tokenize", "-m", "tiny", "--json", PROMPT).json)
        common = ("run", "-m", "tiny", "-n", 6, "--ignore-eos", "--temperature", 0, "--json")
        for more, input in ((("--prompt-file", file), None), (("--prompt-file", "-"), PROMPT.encode()),
                            (("--tokens", ids), None), ((), PROMPT.encode())):
            with self.subTest(more):
                self.assertEqual(self.gqa(*common, *more, input=input).json["tokens"], want)
        self.refused(*common, PROMPT, "--tokens", ids, words=["only one"], status=64)

    def test_text_without_json_is_the_text_alone(self):
        arguments = ("--logit-bias", "2:-inf", "--temperature", 0, PROMPT)
        plain = self.gqa("run", "-m", "tiny", "-n", 6, "--ignore-eos", *arguments)
        self.assertEqual(plain.out.decode(errors="replace"), self.run_json(*arguments)["text"])

    def test_stream_json_gives_steps_and_then_the_result(self):
        *steps, last = self.gqa("run", "-m", "tiny", "-n", 6, "--ignore-eos", "--stream", "json", PROMPT).lines
        self.assertEqual(set(last), RUN_KEYS)
        self.assertTrue(all(set(s) == {"text", "tokens"} for s in steps))
        self.assertEqual([t for s in steps for t in s["tokens"]], last["tokens"])
        self.assertEqual("".join(s["text"] for s in steps), last["text"])

    def test_a_seed_makes_draws_repeatable(self):
        draw = ("--temperature", 2, "--top-k", 0, "--top-p", 1, "--min-p", 0)
        first = self.run_json(*draw, "--seed", 4000000007, PROMPT)
        self.assertEqual(first["seed"], 4000000007)
        self.assertEqual(self.run_json(*draw, "--seed", 4000000007, PROMPT)["tokens"], first["tokens"])
        self.assertNotEqual(self.run_json(*draw, "--seed", 8, PROMPT)["tokens"], first["tokens"])
        own = self.run_json(*draw, PROMPT)
        self.assertIsInstance(own["seed"], int)
        self.assertLess(own["seed"], 1 << 32)
        self.assertEqual(self.run_json(*draw, "--seed", own["seed"], PROMPT)["tokens"], own["tokens"])

    def test_samples_are_told_apart(self):
        draw = ("--temperature", 2, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--seed", 90)
        r = self.run_json(*draw, "-np", 3, PROMPT)
        self.assertEqual(set(r), RUN_KEYS | {"samples"})
        self.assertEqual([s["seed"] for s in r["samples"]], [90, 91, 92])
        self.assertEqual((r["tokens"], r["text"]), (r["samples"][0]["tokens"], r["samples"][0]["text"]))
        for s in r["samples"]:
            alone = self.run_json(*draw[:-1], s["seed"], PROMPT)
            self.assertEqual((alone["tokens"], alone["text"], alone["finish"]), (s["tokens"], s["text"], s["finish"]))
        *steps, last = self.gqa("run", "-m", "tiny", "-n", 6, "--ignore-eos", "--stream", "json", *draw, "--parallel",
                                3, PROMPT).lines
        for i, s in enumerate(last["samples"]):
            self.assertEqual([t for e in steps if e["sample"] == i for t in e["tokens"]], s["tokens"])
        out = self.gqa("run", "-m", "tiny", "-n", 6, "--ignore-eos", *draw, "-np", 3, PROMPT).out.decode(errors="replace")
        at = 0
        for i, s in enumerate(r["samples"]):
            at = out.index(f"[{i}] seed {90 + i}, 6 tokens, length\n{s['text']}", at)
        self.assertIn("1 to 64", self.gqa("run", "-m", "tiny", "-np", 65, PROMPT, status=64).err)

    def test_stop_ends_before_its_text(self):
        whole = self.gqa("run", "-m", "tiny", "-n", 64, "--temperature", 0, "--ignore-eos", "--json", PROMPT).json
        at = next(i for i in range(3, len(whole["text"])) if whole["text"][i:i + 2].isascii())
        stop = whole["text"][at:at + 2]
        r = self.gqa("run", "-m", "tiny", "-n", 64, "--temperature", 0, "--ignore-eos", "--json", "--stop", "no such",
                     "--stop", stop, PROMPT).json
        self.assertEqual((r["finish"], r["stop"]), ("stop", stop))
        self.assertEqual(r["text"], whole["text"][:whole["text"].index(stop)])
        self.assertEqual(set(r), RUN_KEYS | {"stop"})

    def test_biases_force_and_forbid(self):
        self.assertEqual(self.run_json("--logit-bias", "40:1000", PROMPT)["tokens"], [40] * 6)
        best = self.run_json("--temperature", 0, PROMPT)["tokens"][0]
        without = self.run_json("--temperature", 0, "--logit-bias", f"{best}:-inf", PROMPT)["tokens"][0]
        self.assertNotEqual(without, best)

    def test_log_probabilities(self):
        r = self.run_json("--temperature", 0, "--n-probs", 3, PROMPT)
        self.assertEqual(set(r), RUN_KEYS | {"logprobs"})
        for token, p in zip(r["tokens"], r["logprobs"]):
            self.assertEqual(set(p), {"token", "logprob", "top"})
            self.assertEqual((p["token"], p["top"][0][0], len(p["top"])), (token, token, 3))
            values = [value for _, value in p["top"]]
            self.assertEqual(values, sorted(values, reverse=True))
            self.assertLess(values[0], 0)
        self.assertEqual(len(r["logprobs"]), 6)

    def test_stats_are_told_beside_the_text(self):
        plain = self.gqa("run", "-m", "tiny", "-n", 4, "--temperature", 0, "--ignore-eos", PROMPT)
        told = self.gqa("run", "-m", "tiny", "-n", 4, "--temperature", 0, "--ignore-eos", "--stats", PROMPT)
        self.assertEqual(told.out, plain.out)
        for word in ("prompt: ", "cache: ", "backend: cpu", "threads", "speed: ", "bytes a token", "t/s", "length"):
            self.assertIn(word, told.err)

    def test_nothing_to_generate_is_fine(self):
        r = self.gqa("run", "-m", "tiny", "-n", 0, "--json", PROMPT).json
        self.assertEqual((r["tokens"], r["text"], r["n_generated"], r["finish"]), ([], "", 0, "length"))


class Models(Case):
    def names(self, verb):
        return {m["name"]: m["state"] for m in self.gqa(verb, "--json").json["models"]}

    def test_list_ps_load_show_unload(self):
        self.assertEqual(set(self.names("list")), {"tiny", "q8", "q4"})
        self.assertNotIn("second", self.names("ps"))
        path = self.path("models/tiny.gguf")
        options = ("-c", 96, "-ctk", "f32", "-ctv", "f32", "--json")
        info = self.gqa("load", "-m", path, "--name", "second", *options).json
        self.assertEqual((info["name"], info["n_ctx"]), ("second", 96))
        self.assertEqual((info["cache"]["type_k"], info["cache"]["type_v"]), ("f32", "f32"))
        self.assertEqual(self.names("ps")["second"], "loaded")
        self.assertEqual(self.gqa("show", "second", "--json").json["n_ctx"], 96)
        self.assertIn("second", self.gqa("ps").text)
        self.refused("load", path, "--name", "second", "-c", 64, words=["second"])
        self.gqa("unload", "second")
        self.assertNotIn("second", self.names("ps"))
        self.refused("unload", "second", words=["second"])

    def test_show_loads_what_is_not_loaded_and_reads_well(self):
        text = self.gqa("show", "q8").text
        self.assertEqual(self.names("ps")["q8"], "loaded")
        for word in ("n_kv_heads", "bytes_per_token", "tokenizer"):
            self.assertIn(word, text)
        self.assertIn("loaded in", self.gqa("load", "q4").text)

    def test_a_prompt_beyond_the_context_is_told_with_both_numbers(self):
        self.gqa("load", "tiny", "--name", "small", "-c", 32)
        ids = write_json(self.path("long.json"), [1] * 50)
        self.refused("run", "-m", "small", "--tokens", ids, words=[50, 32])
        self.gqa("unload", "small")

    def test_models_that_are_not_there(self):
        for verb in (("run", PROMPT), ("tokenize", PROMPT), ("show",), ("load",), ("bench",),
                     ("logits", PROMPT, "-o", "x")):
            with self.subTest(verb):
                self.refused(verb[0], *verb[1:], "-m", "absent", words=["'absent'"])
        self.refused("run", "-m", "/absent/model.gguf", PROMPT, words=["/absent/model.gguf", "No such file"])
        self.refused("load", self.write("broken.gguf", b"GGUF" + bytes(60)), words=["broken.gguf"])
        self.assertFalse(os.path.exists(self.path("x")), "a file for no logits was left")


class Tokens(Case):
    def test_detokenize_is_the_inverse_byte_for_byte(self):
        texts = [b"", b" ", PROMPT.encode(), b"  two  blanks ", b"\n", "日本語 é 🙂".encode(), ALL_BYTES,
                 ALL_BYTES[::-1]]
        for text in texts:
            for more in ((), ("--no-special",)):
                with self.subTest(text=text[:20], more=more):
                    file = self.write("text.bin", text)
                    ids = self.gqa("tokenize", "-m", "tiny", "--json", "--no-parse-special", *more, "-f", file)
                    ids_file = self.write("ids.json", ids.out)
                    self.assertEqual(self.gqa("detokenize", "-m", "tiny", *more, "--file", ids_file).out, text)
                    plain = self.gqa("tokenize", "-m", "tiny", "--no-parse-special", *more, input=text)
                    self.assertEqual([int(w) for w in plain.out.split()], ids.json)

    def test_ids_may_be_arguments(self):
        ids = self.gqa("tokenize", "-m", "tiny", "--no-special", PROMPT).text.split()
        self.assertEqual(self.gqa("detokenize", "-m", "tiny", "--no-special", *ids).out, PROMPT.encode())
        self.refused("detokenize", "-m", "tiny", "--no-special", 1, 99999999, words=["99999999"])
        self.refused("detokenize", "-m", "tiny", 1, "x", words=["'x'"], status=64)

    def test_a_bos_is_added_unless_it_is_not_wanted(self):
        info = self.gqa("show", "tiny", "--json").json["tokenizer"]
        with_bos = self.gqa("tokenize", "-m", "tiny", "--json", PROMPT).json
        without = self.gqa("tokenize", "-m", "tiny", "--json", "--no-special", PROMPT).json
        self.assertEqual(with_bos, ([info["bos"]] if info["add_bos"] else []) + without)


class Logits(Case):
    def test_rows_of_float32(self):
        ids = self.gqa("tokenize", "-m", "tiny", "--json", PROMPT).json
        n_vocab = self.gqa("show", "tiny", "--json").json["n_vocab"]
        file, out = write_json(self.path("l.json"), ids), self.path("l.f32")
        told = self.gqa("logits", "-m", "tiny", "--tokens", file, "-o", out, "--json").json
        self.assertEqual((told["n_tokens"], told["n_vocab"]), (len(ids), n_vocab))
        logits = read_f32(out)
        self.assertEqual(len(logits), len(ids) * n_vocab)
        last = logits[-n_vocab:]
        best = max(range(n_vocab), key=lambda i: last[i])
        run = self.gqa("run", "-m", "tiny", "--tokens", file, "-n", 1, "--temperature", 0, "--json").json
        self.assertEqual(run["tokens"], [best])
        piped = self.gqa("logits", "-m", "tiny", "--tokens", file, "--first-row", len(ids) - 1, "-o", "-")
        self.assertEqual(piped.out, last.tobytes())

    def test_perplexity(self):
        text = self.write("text.txt", b"the rain and the river and the long road home. " * 20)
        r = self.gqa("perplexity", "-m", "tiny", "-f", text, "-c", 64, "--chunks", 2, "--json").json
        self.assertEqual(set(r), {"perplexity", "error", "n_scored", "n_chunks", "n_ctx"})
        self.assertEqual((r["n_chunks"], r["n_ctx"], r["n_scored"]), (2, 64, 2 * 31))
        n_vocab = self.gqa("show", "tiny", "--json").json["n_vocab"]
        self.assertTrue(1 < r["perplexity"] < 10 * n_vocab, r)
        told = self.gqa("perplexity", "-m", "tiny", "-f", text, "-c", 64, "--chunks", 2).text
        self.assertIn("PPL = %.4f" % r["perplexity"], told)
        self.refused("perplexity", "-m", "tiny", "-f", self.write("short", b"x"), words=["one chunk"], status=65)


class Server(Case):
    def test_ping_info_backends(self):
        self.assertEqual(self.gqa("ping", "-c", 3, "--json").json["n"], 3)
        self.assertIn("3 pings", self.gqa("ping", "-c", 3).text)
        info = self.gqa("info", "--json").json
        self.assertEqual(set(info), {"hello", "stats", "backends", "shadows"})
        self.assertEqual(info["hello"]["uid"], os.getuid())
        self.assertIn("frame_bytes", self.gqa("info").text)
        backends = {b["name"]: b for b in self.gqa("backend", "list", "--json").json["backends"]}
        self.assertTrue(backends["cpu"]["usable"] and backends["cpu"]["isa"] in backends["cpu"]["isas"])
        listed = self.gqa("backend", "list").text
        for word in ("NAME", "LEVEL", backends["cpu"]["isa"], "default", "attention can shared", backends["cpu"]["path"]):
            self.assertIn(word, listed)

    @unittest.skipUnless(os.geteuid() == 0, "needs root: a system daemon and another user")
    def test_others_than_administrators_are_told_no_paths(self):
        folder = Folder()
        d = Daemon(folder.path, "--group", "", user=False)
        try:
            os.chmod(d.socket, 0o666)
            os.chmod(folder.path, 0o711)

            def action():
                if not os.access(GQA, os.X_OK):
                    return 77
                gqa = Tool(".", "--socket", "s")
                listed, info = gqa("backend", "list").text, gqa("info").text
                bench = gqa("backend", "bench", "cpu", status=1).err
                return 0 if "cpu" in listed and "/" not in listed + info and "administrators only" in bench else 1
            status = as_stranger(folder.path, action)
            if status == 77:
                self.skipTest("another user cannot run the gqa that was built: it was NOT tested")
            self.assertEqual(status, 0)
        finally:
            d.kill()
            folder.remove()

    def test_a_bench_of_a_backend_is_another_program(self):
        self.refused("backend", "bench", "none", words=["none is called 'none'"])
        done = subprocess.run([GQA, "backend", "bench", "/nonexistent.so", "--json"], stdout=subprocess.PIPE, text=True)
        told = json.loads(done.stdout)
        self.assertEqual((done.returncode, told["file"], told["verdict"]), (1, "/nonexistent.so", "refused"))

    def test_call_prints_events_and_the_result(self):
        params = {"model": "tiny", "prompt": PROMPT, "n_predict": 2, "ignore_eos": True, "seed": 1}
        out = self.gqa("call", "text.generate", json.dumps(params)).out
        *events, last = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(sum(len(e["tokens"]) for e in events), 2)
        self.assertEqual(last["n_generated"], 2)
        names = {m["name"] for m in self.gqa("call", "gqa.api_info").json["methods"]}
        self.assertIn("text.generate", names)

    def test_call_says_what_was_wrong(self):
        self.refused("call", "no.method", words=["no.method"])
        self.refused("call", "gqa.ping", "{bad", words=["params"], status=65)
        self.refused("call", "gqa.ping", "[]", words=["not a JSON object"], status=65)
        self.refused("call", "text.generate", '{"model": "tiny", "prompt": "", "top_p": 1.5}',
                     words=["'top_p'", "1.5", "0 to 1"])
        self.refused("call", "text.generate", '{"model": "tiny", "prompt": 7}', words=["'prompt'"])
        self.refused("call", "text.tokenize", '{"model": "tiny"}', words=["'text'"])

    def test_wrong_usage_is_64_and_one_line(self):
        for arguments in (("frobnicate",), (), ("run",), ("run", "-m"), ("run", "-m", "tiny", "-n", "many", "x"),
                          ("run", "-m", "tiny", "a", "b"), ("ping", "--frob"), ("ping", "now"), ("list", "x"),
                          ("bench", "kv", "x"), ("bench", "kv"), ("backend",), ("backend", "paint"), ("show",), ("unload",), ("call",),
                          ("logits", "-m", "tiny", "x"), ("run", "-m", "tiny", "--logit-bias", "x", "y"),
                          ("run", "-m", "tiny", "--stream", "xml", "y"), ("--timeout", "0", "ping"),
                          ("--spawn", "ping")):
            with self.subTest(arguments):
                self.refused(*arguments, words=[], status=64)

    def test_files_that_are_not_there(self):
        self.refused("run", "-m", "tiny", "-f", "absent.txt", words=["absent.txt"], status=66)
        self.refused("run", "-m", "tiny", "--tokens", "absent.json", words=["absent.json"], status=66)
        self.refused("run", "-m", "tiny", "--tokens", self.write("t.json", b'{"a": 1}'), words=["t.json"], status=65)
        self.refused("run", "-m", "tiny", "--tokens", self.write("t.json", b"[1, 999999]"), words=["999999"])
        self.refused("logits", "-m", "tiny", "-o", "/absent/f", "x", words=["/absent/f"], status=73)
        self.refused("tokenize", "-m", "tiny", "-f", "/", words=["Is a directory"], status=66)

    def test_a_model_that_is_not_there(self):
        self.refused("run", "./absent.gguf", "x", words=["./absent.gguf: No such file"], status=66)
        self.refused("detokenize", "-m", "tiny", "seven", words=["detokenize: ID: 'seven'"], status=64)
        self.gqa("run", "-m", "tiny", "-n", 1, "x")
        self.refused("load", "tiny", words=["a model is loaded under the name 'tiny'", "another name"])

    def test_who_cannot_connect_is_told_what_helps(self):
        for path, word in ((self.path("absent"), "--spawn"), (self.write("dead", b""), "--spawn")):
            done = subprocess.run([GQA, "--socket", path, "ping"], capture_output=True, text=True, timeout=TIMEOUT_S)
            self.assertEqual(done.returncode, 69)
            self.assertRegex(done.stderr, rf"^gqa: connect: {re.escape(path)}: .*'gqad --user'.*{word}.*\n$")

    def test_output_that_cannot_be_written(self):
        for verb in (("run", "-n", 64, "--ignore-eos", PROMPT), ("tokenize", PROMPT), ("logits", "-o", "-", PROMPT)):
            with self.subTest(verb), open("/dev/full", "wb") as full:
                done = subprocess.run([GQA, *self.gqa.first, verb[0], "-m", "tiny", *map(str, verb[1:])], stdout=full,
                                      stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S)
                outcome = Outcome(verb, done.returncode, b"", done.stderr.decode())
                self.assertEqual(outcome.status, 74, str(outcome))
                assert_one_line(outcome)

    def test_what_is_no_file_is_not_removed(self):
        """A failure takes its own file away, and nothing else that the path may be."""
        for verb in ("logits", "embed"):
            with self.subTest(verb):
                path = self.path("out")
                self.refused(verb, "-m", "tiny", "-o", path, "--tokens", self.write("t.json", b"[999999]"),
                             words=["999999"])
                self.assertFalse(os.path.exists(path))
                os.symlink("/dev/full", path)
                self.refused(verb, "-m", "tiny", "-o", path, PROMPT, words=["No space left"], status=74)
                self.assertTrue(os.path.islink(path))
                os.unlink(path)

    def test_why_a_stream_cannot_be_written(self):
        long = [GQA, *self.gqa.first, "run", "-m", "tiny", "-n", "2000", "--ignore-eos", PROMPT]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(long, stdout=full, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S)
        self.assertEqual((done.returncode, done.stderr), (74, b"gqa: output: No space left on device\n"))
        process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        process.stdout.read(1)
        process.stdout.close()  # as "| head" does
        self.assertEqual(process.stderr.read(), b"")
        self.assertEqual(process.wait(TIMEOUT_S), 74)
        process.stderr.close()

    def test_closed_standard_descriptors(self):
        """What is printed must not go to the daemon, whose socket would have got the number."""
        done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", GQA, *self.gqa.first, "run", "-m", "tiny", "-n", "8",
                               "--ignore-eos", PROMPT], stderr=subprocess.PIPE, timeout=TIMEOUT_S)
        self.assertEqual((done.returncode, done.stderr), (74, b"gqa: output: Bad file descriptor\n"))
        done = subprocess.run(["sh", "-c", 'exec "$@" <&- 2>&-', "sh", GQA, *self.gqa.first, "ping", "-c", "1"],
                              stdout=subprocess.PIPE, timeout=TIMEOUT_S)
        self.assertEqual(done.returncode, 0)

    def test_help_of_every_verb(self):
        text = self.gqa("--help").text
        for verb in ("run", "ps", "list", "show", "load", "unload", "tokenize", "detokenize", "logits", "embed",
                     "eval", "perplexity", "bench", "backend", "ping", "info", "call", "stop"):
            self.assertIn(f"  {verb} ", text)
            self.assertIn(f"Usage: gqa {verb}", self.gqa(verb, "--help").text)
        self.assertTrue(self.gqa("--version").text.startswith("gqa "))
        for arguments in (["--help"], ["run", "--help"], ["--version"]):
            with open("/dev/full", "wb") as full:
                done = subprocess.run([GQA, *arguments], stdout=full, stderr=subprocess.PIPE)
            self.assertEqual((done.returncode, done.stderr), (74, b"gqa: output: No space left on device\n"))

    def test_no_daemon_is_69(self):
        nobody = Tool(self.folder.path, "--socket", self.path("nobody"))
        for verb in (("ping",), ("run", "-m", "tiny", "x"), ("list",), ("bench", "-m", "tiny")):
            self.assertIn("nobody", nobody(*verb, status=69).err)
        Tool(self.folder.path)("ping", status=69)


class Pins(unittest.TestCase):
    """A user may pin a part of what may be kept, and is told where that ends."""

    def test_what_goes_beyond_a_users_share_is_told(self):
        folder = Folder()
        self.addCleanup(folder.remove)
        daemon = Daemon(folder.path, "--kv-bytes", "2M", "--no-kv-store")
        self.addCleanup(daemon.kill)
        gqa = Tool(folder.path, "--socket", daemon.socket)
        told = [gqa("kv", "pin", "-m", "tiny", f"{k} " + "word " * 300).text for k in range(8)]
        for text, next_text in zip(told, told[1:]):  # all of one, then a part or nothing of those that come
            self.assertLessEqual("beyond" in text, "beyond" in next_text)
        self.assertNotIn("beyond", told[0])
        self.assertRegex(told[-1], r"^0 of \d+ tokens pinned\nthe rest is beyond what this user may pin")
        gqa("kv", "unpin", "-m", "tiny", "0 " + "word " * 300)
        self.assertNotRegex(gqa("kv", "pin", "-m", "tiny", "7 " + "word " * 300).text, "^0 of")
        daemon.stop()


if __name__ == "__main__":
    main()
