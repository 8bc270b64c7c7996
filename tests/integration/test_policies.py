#!/usr/bin/env python3
"""What a request keeps of its tokens (kv_policy), against the real daemon: bounds that hold, neighbours that do not
change, later turns that choose anew."""
import os
import struct
import threading

import wire
from harness import DaemonCase, main
from test_cache import tokens

LONG = os.environ.get("GQAD_TEST_LONG") == "1"
MODELS = os.environ["GQAD_TEST_MODELS"]
N_CTX = 256
WINDOW = {"kv_policy": "window", "kv_sinks": 8, "kv_recent": 100}
SNAPKV = {"kv_policy": "snapkv", "kv_budget": 96, "kv_window": 16}
SNAPSTREAM = {"kv_policy": "snapstream", "kv_sinks": 10, "kv_recent": 64, "kv_topk": 40, "kv_window": 32}


class Policies(DaemonCase):
    flags = ("--ctx-size", str(N_CTX))

    def greedy(self, prompt, n_predict, client=None, **more):
        more = {"temperature": 0.0, "ignore_eos": True, **more}
        return (client or self.client).generate(model="tiny", tokens=prompt, n_predict=n_predict, **more)

    def test_a_window_goes_on_past_the_context(self):
        n = 3000
        for more in ({}, {"kv_positions": "cache"}):
            r = self.greedy(tokens(1, 50), n, **WINDOW, **more)
            self.assertEqual((r["n_generated"], r["finish"]), (n, "length"))
            self.assertEqual(r["kv"], {"policy": "window", "n_kept": 108, "n_dropped": 50 + n - 1 - 108})
        self.wait_idle_but_for_cached()

    def test_a_result_without_stream_fits_a_message_however_long_a_window_lets_it_get(self):
        for n_max, more in ((524288, {}), (262144, {"n": 2}), (131072, {"n_probs": 3})):
            self.refused("INVALID_PARAMS", "text.generate",
                         {"model": "tiny", "tokens": tokens(1, 50), "n_predict": n_max + 1, "stream": False, **WINDOW,
                          **more}, *(("n_predict", str(n_max + 1), str(n_max), "window") if not more else ("stream",)))
        full = self.client.call("text.generate", {"model": "tiny", "tokens": tokens(1, 50), "n_predict": 1 << 24,
                                                  "stream": False, "ignore_eos": True, "temperature": 0.0})
        self.assertEqual(full["n_generated"], N_CTX - 50)

    def wait_idle_but_for_cached(self):
        """What the sequences held is free again: only the tree's blocks are left."""
        self.client.call("kv.drop", {})
        self.wait_idle()

    def test_a_window_holds_few_blocks_however_long_it_gets(self):
        self.wait_idle_but_for_cached()
        id = self.client.send("text.generate", {"model": "tiny", "tokens": tokens(2, 30), "n_predict": 100000,
                                                "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
                                                **WINDOW})
        self.client.wait_events(id, 600)  # far behind what it keeps
        most = self.daemon.stats()["kv"]["blocks_used"]
        self.client.cancel(id)
        self.client.wait(id)
        # A block of sinks, two that the recent ones reach into, and the step's own.
        self.assertLessEqual(most, 5)
        self.assertGreater(most, 0)

    def test_what_leaves_nothing_out_is_what_full_gives(self):
        prompt = tokens(3, 90)
        full = self.greedy(prompt, 40, cache_prompt=False)
        self.assertEqual((full["kv"]["policy"], full["kv"]["n_dropped"]), ("full", 0))
        for policy in ({**WINDOW, "kv_recent": 200}, {**WINDOW, "kv_recent": 200, "kv_positions": "cache"},
                       {**SNAPKV, "kv_budget": 90}, {**SNAPSTREAM, "kv_recent": 200}):
            r = self.greedy(prompt, 40, cache_prompt=False, **policy)
            self.assertEqual(r["tokens"], full["tokens"], policy)
            self.assertEqual(r["kv"]["n_dropped"], 0, policy)

    def test_policies_keep_what_they_say(self):
        prompt = tokens(4, 200)
        r = self.greedy(prompt, 20, **SNAPKV)
        self.assertEqual((r["kv"]["n_kept"], r["kv"]["n_dropped"]), (96 + 19, 200 - 96))
        r = self.greedy(prompt, 500, **SNAPSTREAM)
        self.assertEqual((r["kv"]["n_kept"], r["n_generated"]), (10 + 40 + 64, 500))
        self.assertEqual(r["kv"]["n_kept"] + r["kv"]["n_dropped"], 200 + 499)

    def test_what_is_kept_is_told_token_by_token(self):
        prompt = tokens(5, 200)
        for policy, kept, sinks, last in (({}, 200, 200, 0), (WINDOW, 108, 8, 100), (SNAPKV, 96, 0, 16),
                                          (SNAPSTREAM, 114, 10, 64), ({**SNAPKV, "kv_budget": 200}, 200, 200, 0)):
            for _ in ("cold", "warm"):
                told = self.greedy(prompt, 1, kv_kept=True, **policy)["kv"]["kept"]
                shares = self.numbers(told)
                self.assertEqual(told["shape"], [200])
                self.assertAlmostEqual(sum(shares), kept, places=3, msg=policy)
                self.assertEqual(set(shares[:sinks] + shares[200 - last:]), {1.0}, policy)
                self.assertTrue(all(0 <= s <= 1 for s in shares), policy)
        self.assertNotIn("kept", self.greedy(prompt, 1, **SNAPKV)["kv"])

    def test_a_result_depends_on_neither_cache_nor_company(self):
        """Cold, warm and beside others: the same tokens; and a full neighbour's do not change either."""
        for i, policy in enumerate((WINDOW, {**WINDOW, "kv_positions": "cache"}, SNAPKV,
                                    {**SNAPKV, "kv_pool": "max", "kv_kernel": 7}, SNAPSTREAM)):
            prompt = tokens(10 + i, 220)
            cold = self.greedy(prompt, 60, cache_prompt=False, **policy)
            first = self.greedy(prompt, 60, **policy)
            warm = self.greedy(prompt, 60, **policy)
            self.assertEqual(first["tokens"], cold["tokens"], policy)
            self.assertEqual(warm["tokens"], cold["tokens"], policy)
            self.assertGreater(warm["n_cached"], 0, policy)

    def test_mixed_policies_in_one_step_change_nobody(self):
        policies = [{}, WINDOW, SNAPKV, {**WINDOW, "kv_positions": "cache"}, SNAPSTREAM, {}]
        prompts = [tokens(30 + i, 120 + 15 * i) for i in range(len(policies))]
        alone = [self.greedy(p, 60, cache_prompt=False, **how)["tokens"] for p, how in zip(prompts, policies)]
        together = [None] * len(policies)

        def run(i):
            with self.daemon.connect() as c:
                together[i] = self.greedy(prompts[i], 60, client=c, cache_prompt=False, **policies[i])["tokens"]
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(policies))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(together, alone)

    def test_a_view_that_is_lost_is_made_again(self):
        """A purge takes the blocks of what runs: it computes them again, and no token differs."""
        for i, policy in enumerate((WINDOW, {**WINDOW, "kv_positions": "cache"}, SNAPKV, SNAPSTREAM)):
            prompt, n = tokens(90 + i, 200), 50 if policy is SNAPKV else 400
            undisturbed = self.greedy(prompt, n, **policy)["tokens"]
            id = self.client.send("text.generate", {"model": "tiny", "tokens": prompt, "n_predict": n,
                                                    "temperature": 0.0, "ignore_eos": True, **policy})
            self.client.wait_events(id, 20)
            with self.daemon.connect() as other:
                other.call("kv.purge", {})
            self.client.wait(id)
            got = [t for e in self.client.events.pop(id) for t in e["tokens"]]
            self.assertEqual(got, undisturbed, policy)

    def test_samples_of_a_prompt_are_what_each_would_be(self):
        prompt = tokens(55, 200)
        for policy in (WINDOW, SNAPKV, SNAPSTREAM):
            alone = self.greedy(prompt, 20, stream=False, **policy)
            many = self.greedy(prompt, 20, stream=False, n=3, **policy)
            self.assertEqual([s["tokens"] for s in many["samples"]], [alone["tokens"]] * 3, policy)

    def test_a_later_turn_finds_the_whole_prompt_and_chooses_anew(self):
        prompt = tokens(50, 200)
        first = self.greedy(prompt, 4, **SNAPKV)
        self.assertEqual(first["n_cached"], 0)
        turn = prompt + tokens(51, 30)
        again = self.greedy(turn, 4, **SNAPKV)
        self.assertEqual(again["n_cached"], 192, "all whole blocks of the first turn's prompt")
        self.assertEqual(again["tokens"], self.greedy(turn, 4, cache_prompt=False, **SNAPKV)["tokens"])
        full = self.greedy(turn, 4)
        self.assertEqual(full["tokens"], self.greedy(turn, 4, cache_prompt=False)["tokens"])

    def test_logits_see_what_a_generation_sees(self):
        """Every greedy token is the likeliest after those before it, by text.logits of the same policy: past the
        context, and behind a prompt of which a selection was kept."""
        prompt = tokens(60, 200)
        for policy in (WINDOW, {**WINDOW, "kv_positions": "cache"}, SNAPKV):
            n = 40 if policy is SNAPKV else 200
            r = self.greedy(prompt, n, numerics="strict", cache_prompt=False, n_probs=1, **policy)
            text = prompt + r["tokens"]
            id = self.client.send("text.logits", {"model": "tiny", "tokens": text, "logprobs": True,
                                                  "first_row": len(prompt), "cache_prompt": False, **policy})
            self.client.wait(id)
            rows = [x for e in self.client.events.pop(id) for x in self.numbers(e["logprobs"])]
            # Row p tells of the token at p + 1.
            told = [p["logprob"] for p in r["logprobs"]][1:]
            self.assertEqual(len(rows), len(told))
            for got, want in zip(rows, told):
                self.assertAlmostEqual(got, want, places=3)

    @staticmethod
    def numbers(tensor):
        return struct.unpack(f"<{len(tensor['data']) // 4}f", tensor["data"])

    def test_what_means_nothing_is_refused(self):
        base = {"model": "tiny", "tokens": tokens(70, 20), "n_predict": 1}
        for fields, *words in (
                ({"kv_policy": "half"}, "'kv_policy' is 'half'", "snapstream"),
                ({"kv_sinks": 4}, "'kv_sinks' means nothing to 'kv_policy' full"),
                ({"kv_policy": "window", "kv_budget": 64}, "'kv_budget' means nothing"),
                ({"kv_policy": "window", "kv_positions": "new"}, "'kv_positions' is 'new'", "cache"),
                ({"kv_policy": "snapkv", "kv_pool": "sum"}, "'kv_pool' is 'sum'"),
                ({"kv_policy": "snapkv", "kv_kernel": 4}, "'kv_kernel' is 4", "odd"),
                ({"kv_policy": "snapkv", "kv_budget": 32}, "'kv_window' is 32", "room for 31"),
                ({"kv_policy": "snapstream", "kv_recent": 16}, "'kv_window' is 32", "'kv_recent'"),
                ({"kv_policy": "window", "kv_recent": 0}, "kv_recent")):
            self.refused("INVALID_PARAMS", "text.generate", {**base, **fields}, *words)
        self.refused("INVALID_PARAMS", "text.embed", {"model": "tiny", "prompt": "x", "kv_policy": "window"},
                     "'kv_policy' is 'window'", "only full")
        for policy in ({}, SNAPKV, SNAPSTREAM):
            self.refused("CONTEXT_EXCEEDED", "text.generate", {**base, "tokens": tokens(71, N_CTX + 1), **policy})
        r = self.greedy(tokens(71, 3 * N_CTX), 2, **WINDOW)
        self.assertEqual(r["n_prompt"], 3 * N_CTX)


class WithoutEnd(DaemonCase):
    """The bundled model, far past its context: the blocks in use are counted all along, by another client."""
    flags = ("--ctx-size", "512", "--models-dir", MODELS)
    N = 100000 if LONG else 2500
    EVERY = 50  # tokens between two looks

    def generate_watched(self, n_prompt, **policy):
        """The result, and the most blocks that were seen while it generated."""
        id = self.client.send("text.generate", {"model": "demo", "tokens": [t + 3 for t in tokens(100, n_prompt)],
                                                "n_predict": self.N, "temperature": 0.0, "ignore_eos": True,
                                                "cache_prompt": False, **policy})
        looks, most = 0, 0
        self.client.wait_events(id, 2)  # the prompt's own blocks are gone with the second token
        with self.daemon.connect() as other:
            while id not in self.client.answers:
                self.client.receive()
                n_events = len(self.client.events[id])
                if id not in self.client.answers and n_events >= looks * self.EVERY:
                    looks += 1
                    most = max(most, other.call("server.stats")["kv"]["blocks_used"])
        self.assertGreaterEqual(looks, self.N // self.EVERY // 2)
        return self.client.wait(id), most

    def test_blocks_stay_within_the_bound(self):
        # A token sees 100 recent ones, which reach into 3 blocks at most, or 64 in 2; sinks and choice have one.
        for policy, n_prompt, n_kept, n_blocks in (
                (WINDOW, 50, 108, 4), ({**WINDOW, "kv_positions": "cache"}, 700, 108, 4), (SNAPSTREAM, 500, 114, 3)):
            r, most = self.generate_watched(n_prompt, **policy)
            self.assertEqual((r["n_generated"], r["finish"]), (self.N, "length"), policy)
            self.assertEqual((r["kv"]["n_kept"], r["kv"]["n_dropped"]), (n_kept, n_prompt + self.N - 1 - n_kept))
            self.assertLessEqual(most, n_blocks, policy)
            self.assertGreaterEqual(most, n_blocks - 1, policy)
            self.wait_idle()


class CacheTypes(DaemonCase):
    """The same for every type of K and V: tokens are copied as they lie."""

    def test_every_type_is_kept_as_it_is(self):
        for type in ("f32", "f16", "bf16", "q8_0", "q4_0"):
            self.client.call("model.load", {"model": "tiny", "name": "t-" + type, "cache_type_k": type,
                                            "cache_type_v": type})
            base = {"model": "t-" + type, "tokens": tokens(80, 150), "n_predict": 30, "temperature": 0.0,
                    "ignore_eos": True, "cache_prompt": False}
            full = self.client.generate(**base)
            # All but one token kept: nearly what full gives, and surely not nonsense.
            for policy in ({**SNAPKV, "kv_budget": 149}, {**WINDOW, "kv_recent": 141}):
                near = self.client.generate(**base, **policy)
                same = sum(a == b for a, b in zip(near["tokens"], full["tokens"]))
                self.assertEqual(near["kv"]["n_dropped"] > 0, True)
                self.assertGreater(same, 0, (type, policy))
            self.client.call("model.unload", {"model": "t-" + type})


if __name__ == "__main__":
    main()
