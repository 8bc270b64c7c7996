"""Every method of the protocol against the real daemon, as a well-behaved client sees it."""
import json
import math
import os
import struct

import wire
from harness import DaemonCase, main

PROMPT = [1, 40, 41, 42, 43, 44]


class Basics(DaemonCase):
    def test_hello_agrees_on_the_version_and_tells_who_we_are(self):
        r = self.client.call("gqa.hello", {"client": "test 1", "version_min": 1, "version_max": 9})
        self.assertEqual((r["server"], r["protocol"], r["uid"], r["admin"]), ("gqad", 1, os.geteuid(), True))
        self.assertEqual(r["limits"]["frame_bytes"], 16 << 20)
        self.assertIn("stream", r["features"])

    def test_hello_refuses_a_future_client(self):
        self.refused("VERSION", "gqa.hello", {"version_min": 7, "version_max": 9}, "7", "9")

    def test_ping(self):
        self.assertEqual(self.client.call("gqa.ping"), {})

    def test_api_info_lists_the_table(self):
        r = self.client.call("gqa.api_info")
        methods = {m["name"]: m for m in r["methods"]}
        self.assertEqual(methods["model.load"]["access"], "admin")
        fields = {f["name"]: f for f in methods["text.generate"]["params"]}
        self.assertEqual((fields["temperature"]["min"], fields["temperature"]["max"]), (0, 1000))
        self.assertTrue(fields["model"]["required"])
        # What the table says is what the daemon does: every listed method is known ...
        for name in methods:
            if name not in ("server.drain", "gqa.hello"):
                with self.daemon.connect() as c: # ring.open sends what comes after it elsewhere
                    try:
                        c.call(name, {"unknown_key": 1})
                    except wire.Refused as e:
                        self.assertNotEqual(e.name, "METHOD_NOT_FOUND")
        # ... and every required field is asked for by its name.
        for name, m in methods.items():
            for field in m["params"]:
                if field["required"]:
                    self.refused("INVALID_PARAMS", name, {}, "")
                    break

    def test_unknown_methods_are_named(self):
        self.refused("METHOD_NOT_FOUND", "text.sing", {}, "text.sing")

    def test_unknown_keys_are_ignored(self):
        self.assertEqual(self.client.call("gqa.ping", {"later": {"version": [1, 2]}}), {})

    def test_backends_are_listed(self):
        backends = {b["name"]: b for b in self.client.call("backend.list")["backends"]}
        self.assertTrue(backends["cpu"]["usable"], backends)
        self.assertIn(backends["cpu"]["isa"], backends["cpu"]["isas"])
        self.assertIn("gqa.program.0", backends["cpu"]["interfaces"])

    def test_stats_count(self):
        before = self.client.call("server.stats")
        self.client.generate(model="tiny", tokens=PROMPT, n_predict=5, temperature=0, ignore_eos=True)
        after = self.client.call("server.stats")
        self.assertEqual(after["requests_total"], before["requests_total"] + 1)
        self.assertEqual(after["tokens_prompt_total"], before["tokens_prompt_total"] + len(PROMPT))
        self.assertEqual(after["tokens_generated_total"], before["tokens_generated_total"] + 5)
        self.assertGreaterEqual(after["connections"], 1)
        self.assertEqual([m["name"] for m in after["models"]], ["tiny"])
        for name, more in {"time_to_first_token_seconds": 1, "inter_token_latency_seconds": 4,
                           "request_queue_time_seconds": 1, "e2e_request_latency_seconds": 1}.items():
            latency = after["latency"][name]
            self.assertEqual(latency["count"], before["latency"][name]["count"] + more, name)
            self.assertGreater(latency["p50"], 0)
            self.assertLessEqual(latency["p50"], latency["p99"])
        self.assertLessEqual(after["step"]["p50_ms"], after["step"]["p99_ms"])
        self.assertEqual(after["step"]["rows"], 1)
        self.assertEqual(after["preemptions_total"], 0)
        (user,) = after["users"]
        self.assertEqual((user["uid"], user["weight"], user["n_running"], user["n_waiting"]),
                         (os.getuid(), 1, 0, 0))
        self.assertEqual(user["tokens_prompt_total"], after["tokens_prompt_total"])

    def test_open_requests_are_listed(self):
        self.assertEqual(self.client.call("server.requests"), {"requests": []})
        with self.daemon.connect() as other:
            for _ in range(100):  # a request may be over before it is looked for
                call = other.send("text.generate", {"model": "tiny", "tokens": [9, 8, 7], "n_predict": 400,
                                                     "temperature": 0, "ignore_eos": True})
                other.wait_events(call, 1)
                listed = self.client.call("server.requests", {"all": True})["requests"]
                if listed:
                    break
            (r,) = listed
            self.assertEqual((r["uid"], r["model"], r["kind"], r["n_prompt"]),
                             (os.getuid(), "tiny", "generate", 3))
            self.assertIn(r["state"], ("decode", "paused"))
            self.assertGreaterEqual(r["n_generated"], 1)
            self.assertGreater(r["age_ms"], 0)
        wire.wait_until(lambda: self.client.call("server.requests") == {"requests": []}, "it is gone")

    def test_reload_is_answered(self):
        self.assertEqual(self.client.call("server.reload"), {})


class Models(DaemonCase):
    flags = ("--no-allow-autoload",)

    def state(self):
        return {m["name"]: m["state"] for m in self.client.call("model.list")["models"]}

    def test_load_list_info_unload(self):
        self.assertEqual(self.state(), {"tiny": "available"})
        self.refused("NOT_FOUND", "model.info", {"model": "tiny"}, "tiny")
        self.refused("NOT_FOUND", "model.ops", {"model": "tiny"}, "tiny")
        self.refused("NOT_FOUND", "text.tokenize", {"model": "tiny", "text": "x"}, "not loaded")

        id = self.client.send("model.load", {"model": "tiny", "n_ctx": 256, "cache_type_k": "f32",
                                             "cache_type_v": "f32"})
        info = self.client.wait(id)
        self.assertEqual(info["name"], "tiny")
        self.assertEqual((info["n_ctx"], info["n_heads"], info["n_kv_heads"], info["n_vocab"]), (256, 8, 2, 512))
        self.assertEqual((info["cache"]["type_k"], info["cache"]["block_tokens"]), ("f32", 64))
        self.assertEqual(sum(c["n_layers"] for c in info["cache"]["classes"]), info["n_layers"])
        self.assertEqual(info["tokenizer"]["n_vocab"], 512)
        self.assertEqual(info["backend"]["program"].split(":")[0], "cpu")
        stages = {e["stage"] for e in self.client.events.get(id, [])}
        self.assertIn("ready", stages)
        self.assertEqual(self.client.call("model.info", {"model": "tiny"}), info)

        self.refused("EXISTS", "model.load", {"model": "tiny"}, "tiny")
        self.assertEqual(self.state(), {"tiny": "loaded"})
        self.assertEqual(self.client.call("model.unload", {"model": "tiny"}), {})
        self.assertEqual(self.state(), {"tiny": "available"})
        self.refused("NOT_FOUND", "model.unload", {"model": "tiny"}, "tiny")

    def test_a_cache_of_quants_is_told_and_used(self):
        info = self.client.wait(self.client.send("model.load", {"model": "tiny", "n_ctx": 256, "cache_type_k": "q8_0",
                                                                "cache_type_v": "q4_0"}))
        cache = info["cache"]
        self.assertEqual((cache["type_k"], cache["type_v"]), ("q8_0", "q4_0"))
        # Heads of 8 dimensions are filled up to a quant: 34 bytes of K, 18 of V.
        self.assertEqual(cache["bytes_per_token"], info["n_layers"] * info["n_kv_heads"] * (34 + 18))
        tokens = [self.client.generate(model="tiny", tokens=PROMPT, n_predict=70, temperature=0, ignore_eos=True)["tokens"]
                  for _ in range(2)]
        self.assertEqual(tokens[0], tokens[1])
        self.client.call("model.unload", {"model": "tiny"})

    def test_unknown_and_broken_models_are_refused_with_reasons(self):
        self.refused("NOT_FOUND", "model.load", {"model": "nobody"}, "nobody")
        self.refused("INVALID_PARAMS", "model.load", {"model": "../tiny"}, "../tiny")
        self.refused("INVALID_PARAMS", "model.load", {"model": "tiny", "cache_type_k": "q9"}, "cache_type_k", "q9")
        path = os.path.join(self.folder.path, "models", "broken.gguf")
        with open(path, "wb") as f:
            f.write(b"GGUF" + b"\xff" * 100)
        try:
            self.refused("MODEL_REFUSED", "model.load", {"model": "broken"}, "broken")
        finally:
            os.unlink(path)

    def test_a_path_and_another_name(self):
        path = os.path.join(self.folder.path, "models", "tiny.gguf")
        info = self.client.call("model.load", {"model": path, "name": "other"})
        self.assertEqual(info["name"], "other")
        self.client.call("model.unload", {"model": "other"})

    def test_unload_waits_for_what_runs_and_refuses_what_comes(self):
        self.client.call("model.load", {"model": "tiny"})
        running = self.client.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 1500,
                                                     "ignore_eos": True})
        self.client.wait_events(running, 1)
        unload = self.client.send("model.unload", {"model": "tiny"})
        late = self.client.send("text.generate", {"model": "tiny", "tokens": PROMPT})
        with self.assertRaises(wire.Refused) as caught:
            self.client.wait(late)
        self.assertIn(caught.exception.name, ("DRAINING", "NOT_FOUND"))
        self.assertEqual(self.client.wait(running)["n_generated"], 1500)
        self.assertEqual(self.client.wait(unload), {})


class Texts(DaemonCase):
    flags = ("-c", "512")

    def test_tokenize_and_back(self):
        for text in ("", "hello world", "  two  spaces\n", "caf\u00e9 \u4f60\u597d \U0001f600", "tene sasa " * 3000):
            ids = self.client.call("text.tokenize", {"model": "tiny", "text": text})["tokens"]
            self.assertEqual(self.client.call("text.detokenize", {"model": "tiny", "tokens": ids})["text"], text)

    def test_any_bytes_come_back(self):
        data = bytes(range(256)) * 2
        ids = self.client.call("text.tokenize", {"model": "tiny", "text": data})["tokens"]
        back = self.client.call("text.detokenize", {"model": "tiny", "tokens": ids})["text"]
        self.assertEqual(back, data)

    def test_add_special(self):
        with_bos = self.client.call("text.tokenize", {"model": "tiny", "text": "te"})["tokens"]
        without = self.client.call("text.tokenize", {"model": "tiny", "text": "te", "add_special": False})["tokens"]
        self.assertEqual(with_bos, [1] + without)

    def test_token_ids_are_checked_by_place_and_value(self):
        self.refused("INVALID_PARAMS", "text.detokenize", {"model": "tiny", "tokens": [1, 2, 512]}, "tokens", "item 2", "512")
        self.refused("INVALID_PARAMS", "text.generate", {"model": "tiny", "tokens": [1, -5]}, "tokens", "item 1")
        self.refused("INVALID_PARAMS", "text.generate",
                     {"model": "tiny", "tokens": [1], "logit_bias": [[600, 1.0]]}, "logit_bias", "item 0", "600")

    def test_logits_have_a_row_per_token(self):
        id = self.client.send("text.logits", {"model": "tiny", "tokens": PROMPT})
        result = self.client.wait(id)
        self.assertEqual(result.pop("timings")["steps"], 1)
        self.assertEqual(result, {"n_tokens": len(PROMPT), "n_vocab": 512})
        rows = {}
        for event in self.client.events[id]:
            tensor = event["logits"]
            self.assertEqual((tensor["nd"], tensor["type"], tensor["shape"][1]), (True, "<f4", 512))
            self.assertEqual(len(tensor["data"]), 4 * 512 * tensor["shape"][0])
            for i in range(tensor["shape"][0]):
                rows[event["first_row"] + i] = struct.unpack("<512f", tensor["data"][2048 * i:2048 * (i + 1)])
        self.assertEqual(sorted(rows), list(range(len(PROMPT))))

        # The same position's logits do not depend on what follows, and greedy generation takes their best.
        greedy = self.client.generate(model="tiny", tokens=PROMPT, n_predict=1, temperature=0, ignore_eos=True)
        best = max((v, -i) for i, v in enumerate(rows[len(PROMPT) - 1]) if i != 2)
        self.assertEqual(greedy["tokens"], [-best[1]])

        id = self.client.send("text.logits", {"model": "tiny", "tokens": PROMPT, "logprobs": True})
        self.client.wait(id)
        values = [v for e in self.client.events[id]
                  for v in struct.unpack(f"<{e['logprobs']['shape'][0]}f", e["logprobs"]["data"])]
        for i, value in enumerate(values[:len(PROMPT) - 1]):
            row = rows[i]
            top = max(row)
            expected = row[PROMPT[i + 1]] - top - math.log(sum(math.exp(v - top) for v in row))
            self.assertAlmostEqual(value, expected, places=3)

    def test_first_row(self):
        id = self.client.send("text.logits", {"model": "tiny", "tokens": PROMPT, "first_row": 4})
        self.client.wait(id)
        events = self.client.events[id]
        self.assertEqual(events[0]["first_row"], 4)
        self.assertEqual(sum(e["logits"]["shape"][0] for e in events), 2)
        self.refused("INVALID_PARAMS", "text.logits", {"model": "tiny", "tokens": PROMPT, "first_row": 6}, "first_row")

    def test_a_prompt_that_does_not_fit_tells_both_numbers(self):
        self.refused("CONTEXT_EXCEEDED", "text.generate", {"model": "tiny", "tokens": [5] * 512}, "512")
        e = self.refused("CONTEXT_EXCEEDED", "text.logits", {"model": "tiny", "tokens": [5] * 700}, "700", "512")
        self.assertEqual(e.code, 9)

    def samples(self, result, id, n):
        """Text and tokens of each sample: of the result, or joined from the events."""
        self.assertEqual(len(result["samples"]), n)
        if "tokens" in result:
            return [(s["text"], s["tokens"]) for s in result["samples"]]
        events = self.client.events.pop(id)
        self.assertEqual({e["sample"] for e in events}, set(range(n)))
        return [("".join(e["text"] for e in events if e["sample"] == i),
                 [t for e in events if e["sample"] == i for t in e["tokens"]]) for i in range(n)]

    def test_samples_share_a_prompt_and_each_has_its_seed(self):
        how = dict(model="tiny", tokens=PROMPT * 20, n_predict=30, temperature=1.5, top_k=0, seed=77,
                   cache_prompt=False)
        before = self.client.call("server.stats")
        results = []
        for stream in (True, False):
            id = self.client.send("text.generate", {**how, "n": 6, "stream": stream})
            result = self.client.wait(id)
            results.append(self.samples(result, id, 6))
            self.assertEqual(result["n_prompt"], 120)
            self.assertEqual([s["seed"] for s in result["samples"]], list(range(77, 83)))
            self.assertEqual([s["n_generated"] for s in result["samples"]], [len(t) for _, t in results[-1]])
            self.assertEqual(result["n_generated"], sum(len(t) for _, t in results[-1]))
            self.assertEqual((result["seed"], result["finish"]), (77, result["samples"][0]["finish"]))
        after = self.client.call("server.stats")
        self.assertEqual(after["tokens_prompt_total"] - before["tokens_prompt_total"], 2 * 120)
        self.assertEqual(results[0], results[1])
        for i, (text, tokens) in enumerate(results[0]):
            alone = self.client.generate(**{**how, "seed": 77 + i})
            self.assertNotIn("samples", alone)
            self.assertEqual((alone["text"], alone["tokens"]), (text, tokens), f"sample {i}")
        self.assertEqual(len({tuple(t) for _, t in results[0]}), 6) # or this test says little
        self.wait_idle()

    def test_samples_end_each_for_itself(self):
        how = dict(model="tiny", tokens=PROMPT, n_predict=60, temperature=2, top_k=0, seed=5, n_probs=2, n=8,
                   stop=["a", "e"], ignore_eos=True, stream=False)
        result = self.client.call("text.generate", how)
        ends = [s["finish"] for s in result["samples"]]
        self.assertLessEqual(set(ends), {"stop", "length"})
        self.assertIn("stop", ends)
        for s in result["samples"]:
            self.assertEqual("stop" in s, s["finish"] == "stop")
            self.assertEqual(len(s["logprobs"]), s["n_generated"])
            self.assertFalse(set(s["text"]) & {"a", "e"})

    def test_cancelling_samples_gives_what_there_is_of_all(self):
        id = self.client.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 900, "n": 40,
                                                "ignore_eos": True, "temperature": 1, "seed": 1})
        n_events = 40  # a step begins some of them only
        while len({e["sample"] for e in self.client.wait_events(id, n_events)}) < 40:
            n_events += 1
        self.client.cancel(id)
        result = self.client.wait(id)
        self.assertEqual({s["finish"] for s in result["samples"]}, {"cancelled"})
        self.assertGreaterEqual(min(s["n_generated"] for s in result["samples"]), 1)
        self.wait_idle()

    def test_samples_have_limits(self):
        self.refused("INVALID_PARAMS", "text.generate", {"model": "tiny", "tokens": PROMPT, "n": 0}, "n", "1 to 64")
        self.refused("INVALID_PARAMS", "text.generate", {"model": "tiny", "tokens": PROMPT, "n": 65}, "n", "1 to 64")
        self.refused("INVALID_PARAMS", "text.generate", {"model": "tiny", "tokens": PROMPT, "n": 64, "stream": False,
                                                         "n_predict": 1 << 20}, "'n'", "stream")

    def test_generation_stops_at_the_context(self):
        r = self.client.generate(model="tiny", tokens=[5] * 500, n_predict=100, ignore_eos=True)
        self.assertEqual((r["finish"], r["n_prompt"]), ("length", 500))
        self.assertLessEqual(r["n_prompt"] + r["n_generated"], 513)


class Generate(DaemonCase):
    def test_streaming_joins_to_the_whole(self):
        params = {"model": "tiny", "tokens": PROMPT, "n_predict": 40, "seed": 7, "ignore_eos": True}
        streamed = self.client.generate(**params)
        whole = self.client.generate(stream=False, **params)
        self.assertEqual((streamed["text"], streamed["tokens"]), (whole["text"], whole["tokens"]))
        self.assertEqual((streamed["n_generated"], streamed["finish"], streamed["seed"]), (40, "length", 7))
        self.assertEqual(len(streamed["tokens"]), 40)
        self.assertEqual(set(streamed["timings"]), {"queue_ms", "prompt_ms", "first_token_ms", "predict_ms",
                                                    "prompt_per_second", "predicted_per_second", "prefill_ms",
                                                    "decode_ms", "sampling_ms", "delivery_ms", "steps",
                                                    "n_preempted"})
        self.assertEqual(streamed["timings"]["steps"], 40)
        self.assertIn(streamed["cache"]["source"], ("none", "memory"))

    def test_the_same_seed_gives_the_same_text_and_another_does_not(self):
        params = {"model": "tiny", "prompt": "sa te", "n_predict": 30, "temperature": 1.5, "ignore_eos": True}
        a, b, c = (self.client.generate(seed=s, **params)["tokens"] for s in (1, 1, 2))
        self.assertEqual(a, b)
        self.assertNotEqual(a, c)

    def test_a_seed_that_is_absent_is_drawn_and_reported(self):
        params = {"model": "tiny", "tokens": PROMPT, "n_predict": 20, "temperature": 1.5, "ignore_eos": True}
        first, second = self.client.generate(**params), self.client.generate(**params)
        self.assertNotEqual(first["seed"], second["seed"])
        self.assertEqual(self.client.generate(seed=first["seed"], **params)["tokens"], first["tokens"])

    def test_results_do_not_depend_on_neighbours(self):
        params = {"model": "tiny", "n_predict": 60, "temperature": 0, "ignore_eos": True}
        prompts = [[1] + [20 + i * 7 % 200 + j for j in range(5 + 30 * i)] for i in range(4)]
        alone = [self.client.generate(tokens=p, **params)["tokens"] for p in prompts]
        with self.daemon.connect() as other:
            clients = [self.client, other, self.client, other]
            ids = [c.send("text.generate", {"tokens": p, **params}) for c, p in zip(clients, prompts)]
            for c, id in zip(clients, ids):
                c.wait(id)
            together = [[t for e in c.events[id] for t in e["tokens"]] for c, id in zip(clients, ids)]
        self.assertEqual(together, alone)

    def test_a_stop_string_ends_the_text_before_it(self):
        params = {"model": "tiny", "tokens": PROMPT, "temperature": 0, "n_predict": 60, "ignore_eos": True}
        text = self.client.generate(**params)["text"]
        stop = text[12:15]
        r = self.client.generate(stop=["never in there", stop], **params)
        self.assertEqual((r["finish"], r["stop"]), ("stop", stop))
        self.assertEqual(r["text"], text[:text.index(stop)])

    def test_logprobs_are_sorted_and_hold_the_choice(self):
        r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=4, temperature=0, n_probs=5, ignore_eos=True)
        self.assertEqual(len(r["logprobs"]), 4)
        for token, p in zip(r["tokens"], r["logprobs"]):
            self.assertEqual(p["token"], token)
            values = [v for _, v in p["top"]]
            self.assertEqual((len(values), values), (5, sorted(values, reverse=True)))
            self.assertLess(max(values), 0)
        whole = self.client.generate(model="tiny", tokens=PROMPT, n_predict=4, temperature=0, n_probs=5,
                                     ignore_eos=True, stream=False)
        self.assertEqual(whole["logprobs"], r["logprobs"])

    def test_logit_bias_forbids_and_forces(self):
        params = {"model": "tiny", "tokens": PROMPT, "temperature": 0, "n_predict": 1, "ignore_eos": True}
        best = self.client.generate(**params)["tokens"][0]
        other = self.client.generate(logit_bias=[[best, -math.inf]], **params)["tokens"][0]
        self.assertNotEqual(other, best)
        self.assertEqual(self.client.generate(logit_bias=[[77, 1000.0]], **params)["tokens"], [77])

    def test_every_sampler_is_reached(self):
        params = {"model": "tiny", "tokens": PROMPT, "n_predict": 12, "ignore_eos": True, "seed": 5}
        greedy = self.client.generate(**{**params, "temperature": 0})["tokens"]
        usual = self.client.generate(**params)["tokens"]
        self.assertEqual(self.client.generate(**params)["tokens"], usual)
        # Each of them forces the best token, at a temperature that would never.
        for force in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}, {"top_n_sigma": 1e-6}):
            with self.subTest(force):
                hot = {**params, "temperature": 50, "top_k": 0, "top_p": 1, "min_p": 0}
                order = {"samplers": [next(iter(force)), "temperature"]}
                self.assertEqual(self.client.generate(**{**hot, **force, **order})["tokens"], greedy)
                self.assertNotEqual(self.client.generate(**{**hot, **force, "samplers": ["temp"]})["tokens"], greedy)
        hot = {**params, "top_k": 0, "top_p": 1, "min_p": 0}
        plain = self.client.generate(**hot)["tokens"]
        for change in ({"typ_p": 0}, {"typical_p": 0.01}, {"dynatemp_range": 0.7}, {"xtc_probability": 1, "xtc_threshold": 0},
                       {"mirostat": 1, "mirostat_tau": 0.1}, {"mirostat": 2, "mirostat_tau": 0.1}, {"samplers": []}):
            with self.subTest(change):
                tokens = self.client.generate(**{**hot, **change})["tokens"]
                self.assertEqual(tokens == plain, "typ_p" in change, "a name that nobody knows does nothing")
                self.assertEqual(self.client.generate(**{**hot, **change})["tokens"], tokens)

    def test_dry_breaks_a_repetition_unless_it_is_broken(self):
        # Byte b is token b + 3. The bias makes "ab" likely to go on in "abcabcab"; dry forbids it.
        text = [b + 3 for b in b"abcabcab"]
        params = {"model": "tiny", "tokens": text, "n_predict": 1, "temperature": 0, "logit_bias": [[ord("c") + 3, 50.0]]}
        dry = {"dry_multiplier": 100.0, "dry_base": 4}
        self.assertEqual(self.client.generate(**params)["tokens"], [ord("c") + 3])
        self.assertNotEqual(self.client.generate(**params, **dry)["tokens"], [ord("c") + 3])
        for broken in ({"dry_sequence_breakers": ["x", "b"]}, {"dry_sequence_breakers": ["c"]}, {"dry_allowed_length": 6},
                       {"dry_penalty_last_n": 3}, {"samplers": ["temperature"]}):
            with self.subTest(broken):
                self.assertEqual(self.client.generate(**params, **{**dry, **broken})["tokens"], [ord("c") + 3])
        self.assertNotEqual(self.client.generate(**params, **dry, dry_sequence_breakers=[])["tokens"], [ord("c") + 3])

    def test_a_grammar_is_followed_to_its_end(self):
        params = {"model": "tiny", "tokens": PROMPT, "n_predict": 200}
        for grammar, words in (('root ::= ("yes" | "no") "!"{3}', r"(yes|no)!!!"), ("root ::= [0-9]{8} [^a]", r"[0-9]{8}[^a]"),
                               ('root ::= "日本" | "🙂é"', "日本|🙂é")):
            for change in ({"temperature": 0}, {"seed": 3}, {"mirostat": 2, "seed": 4}, {"temperature": 0, "ignore_eos": True}):
                with self.subTest((grammar, change)):
                    r = self.client.generate(**params, **change, grammar=grammar)
                    self.assertRegex(r["text"], "^(" + words + ")$")
                    self.assertEqual(r["finish"], "eos")
        # The same without one, and where it is cut.
        self.assertEqual(self.client.generate(**{**params, "n_predict": 5}, temperature=0, grammar="")["tokens"],
                         self.client.generate(**{**params, "n_predict": 5}, temperature=0)["tokens"])
        r = self.client.generate(**{**params, "n_predict": 3}, grammar="root ::= [0-9]{8}", seed=1)
        self.assertEqual(r["finish"], "length")

    def test_documents_satisfy_their_schema(self):
        schema = {"type": "object", "required": ["name", "tags"], "additionalProperties": False, "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "日本"]}, "minItems": 1, "maxItems": 3},
            "born": {"type": "string", "format": "date"}, "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]}},
            "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 7}]}}}
        for change in ({"temperature": 0}, {"seed": 1}, {"seed": 2, "temperature": 2}, {"seed": 3, "ignore_eos": True}):
            with self.subTest(change):
                r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=400, json_schema=json.dumps(schema), **change)
                self.assertEqual(r["finish"], "eos", r["text"])
                d = json.loads(r["text"])
                self.assertLessEqual(set(d), set(schema["properties"]))
                self.assertTrue(1 <= len(d["name"]) <= 12 and 1 <= len(d["tags"]) <= 3 and set(d["tags"]) <= {"a", "b", "日本"})
                self.assertTrue(0 <= d.get("age", 0) <= 150 and type(d.get("age", 0)) is int)
                self.assertRegex(d.get("born", "2000-01-01"), r"^\d{4}-\d\d-\d\d$")
                self.assertIn(d.get("more"), (None, [True, 7], [False, 7]))

    def test_a_grammar_that_leaves_no_token_is_an_error(self):
        # The text is empty, which only an end-of-generation token could tell.
        params = {"model": "tiny", "tokens": PROMPT, "grammar": 'root ::= ""'}
        self.assertEqual(self.client.generate(**params)["finish"], "eos")
        self.refused("INVALID_PARAMS", "text.generate", {**params, "ignore_eos": True}, "grammar", "no token")

    def test_eos_ends_the_generation(self):
        r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=10, temperature=0, logit_bias=[[2, 1000.0]])
        self.assertEqual((r["finish"], r["n_generated"], r["text"]), ("eos", 1, ""))

    def test_characters_are_never_cut(self):
        # 0xe4 0xbd 0xa0 as byte tokens (byte b is token b + 3); each event must be whole characters.
        bias = [[0xE4 + 3, 1000.0]]
        r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=6, temperature=0, logit_bias=bias)
        self.assertEqual(r["text"], "\ufffd" * 6)
        self.assertEqual(r["n_generated"], 6)

    def test_cancel_stops_within_a_step(self):
        id = self.client.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 2000,
                                                "ignore_eos": True})
        self.client.wait_events(id, 3)
        self.client.cancel(id)
        r = self.client.wait(id)
        self.assertEqual(r["finish"], "cancelled")
        self.assertLess(r["n_generated"], 2000)
        self.wait_idle()

    def test_cancel_of_nothing_is_no_fault(self):
        self.client.cancel(4711)
        self.assertEqual(self.client.call("gqa.ping"), {})

    def test_t_max_predict_ms(self):
        r = self.client.generate(model="tiny", tokens=PROMPT, n_predict=2000, t_max_predict_ms=1, ignore_eos=True)
        self.assertEqual(r["finish"], "time")

    def test_wrong_params_are_refused_by_name(self):
        good = {"model": "tiny", "tokens": PROMPT}
        for change, *words in (
                ({"tokens": None}, "tokens"), ({"tokens": []}, "tokens"), ({"prompt": "x"}, "prompt", "tokens"),
                ({"temperature": "hot"}, "temperature"), ({"temperature": math.nan}, "temperature"),
                ({"temperature": -1}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"n_predict": -1}, "n_predict"),
                ({"n_predict": 1 << 40}, "n_predict"), ({"n_predict": 5, "max_tokens": 6}, "max_tokens"),
                ({"stop": [""]}, "stop", "item 0"), ({"stop": "x"}, "stop"), ({"stop": ["x"] * 17}, "stop"),
                ({"stop": ["x" * 257]}, "stop"), ({"seed": -1}, "seed"), ({"n_probs": 33}, "n_probs"),
                ({"logit_bias": [[1]]}, "logit_bias"), ({"stream": 1}, "stream"), ({"model": ""}, "model"),
                ({"model": "a\0b"}, "model"), ({"model": 5}, "model"), ({"tokens": [1.5]}, "tokens"),
                ({"tokens": [1 << 40]}, "tokens"), ({"mirostat": 3}, "mirostat"), ({"typical_p": 2}, "typical_p"),
                ({"dry_allowed_length": -1}, "dry_allowed_length"), ({"samplers": "top_k"}, "samplers"),
                ({"samplers": ["top_k", "topk"]}, "samplers", "item 1", "'topk'", "penalties", "temperature"),
                ({"samplers": ["xtc"] * 17}, "samplers", "16"), ({"dry_sequence_breakers": [""]}, "item 0"),
                ({"dry_sequence_breakers": ["a", "b" * 41]}, "dry_sequence_breakers", "item 1", "41", "40"),
                ({"dry_sequence_breakers": ["a"] * 33}, "dry_sequence_breakers", "32"), ({"grammar": 5}, "grammar"),
                ({"grammar": "root ::= \"a\"\nb ::= c"}, "grammar", "line 2", "column 7", "'c'"),
                ({"grammar": "root ::= root"}, "grammar", "left recursion", "'root'"),
                ({"json_schema": "{"}, "json_schema", "line 1"), ({"json_schema": "{\"not\": {}}"}, "json_schema", "'not'"),
                ({"json_schema": "{}", "grammar": "root ::= \"a\""}, "grammar", "json_schema")):
            with self.subTest(change):
                self.refused("INVALID_PARAMS", "text.generate", {**good, **change}, *words)
        self.refused("INVALID_PARAMS", "text.generate", {"model": "tiny"}, "prompt", "tokens")

    def test_ids_of_open_calls_are_not_taken_twice(self):
        id = self.client.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 1000,
                                                "ignore_eos": True})
        self.client.wait_events(id, 1)
        self.client.send("gqa.ping", id=id)
        with self.assertRaises(wire.Refused) as caught:
            self.client.wait(id)
        self.assertEqual(caught.exception.name, "INVALID_REQUEST")
        self.client.close()
        self.wait_idle()

    def test_first_use_loads_the_model_once_for_all_who_wait(self):
        if any(m["state"] == "loaded" for m in self.client.call("model.list")["models"]):
            self.client.call("model.unload", {"model": "tiny"})
        ids = [self.client.send("text.generate", {"model": "tiny", "tokens": PROMPT, "n_predict": 3,
                                                  "temperature": 0, "ignore_eos": True}) for _ in range(4)]
        for id in ids:
            self.assertEqual(self.client.wait(id)["n_generated"], 3)
        self.assertEqual(self.daemon.log_text().count("tiny' is unloaded"), 1)


if __name__ == "__main__":
    main()
