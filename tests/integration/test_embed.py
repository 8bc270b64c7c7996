"""text.embed over the wire: shapes, pooling, many texts at once, refusals, and who is in the way."""
import math
import os
import struct

import gguf
from harness import DaemonCase, main, synth

TEXTS = ["Once upon a time", "", "there was", "a" * 300, "日本語", "once upon a time"]


def vectors(tensor):
    rows, width = tensor["shape"]
    assert (tensor["nd"], tensor["type"]) == (True, "<f4")
    values = struct.unpack(f"<{rows * width}f", tensor["data"])
    return [values[i * width:(i + 1) * width] for i in range(rows)]


class Embed(DaemonCase):
    def embed(self, **params):
        result = self.client.call("text.embed", {"model": "tiny", **params})
        return vectors(result["embeddings"]), result

    def rows(self, **params):
        """Without pooling: the rows of every input."""
        id = self.client.send("text.embed", {"model": "tiny", "pooling": "none", **params})
        result = self.client.wait(id)
        rows = [[] for _ in result["n_tokens"]]
        for event in self.client.events.pop(id):
            of_input = rows[event["input"]]
            self.assertEqual(event["first_row"], len(of_input))
            of_input += vectors(event["embeddings"])
        self.assertEqual([len(r) for r in rows], result["n_tokens"])
        self.assertNotIn("embeddings", result)
        return rows

    def test_one_vector_per_text_whatever_else_is_in_the_request(self):
        many, result = self.embed(inputs=TEXTS)
        info = self.client.call("model.info", {"model": "tiny"})
        self.assertEqual((info["kind"], info["pooling"], result["pooling"]), ("decoder", "last", "last"))
        self.assertEqual((len(many), len(many[0]), result["n_dims"]), (len(TEXTS), info["n_embd"], info["n_embd"]))
        self.assertEqual(sum(result["n_tokens"]), result["n_prompt"])
        for text, vector, n in zip(TEXTS, many, result["n_tokens"]):
            one, alone = self.embed(prompt=text)
            self.assertEqual((one[0], alone["n_prompt"]), (vector, n))
            self.assertAlmostEqual(math.fsum(x * x for x in vector), 1, places=5)
        tokens = self.client.call("text.tokenize", {"model": "tiny", "text": TEXTS[0]})["tokens"]
        self.assertEqual(self.embed(tokens=tokens)[0][0], many[0])

    def test_pooling_is_made_of_the_rows(self):
        rows = self.rows(inputs=TEXTS, normalize=False)
        raw = {"inputs": TEXTS, "normalize": False}
        for i, of_input in enumerate(rows):
            self.assertEqual(self.embed(pooling="cls", **raw)[0][i], of_input[0])
            self.assertEqual(self.embed(pooling="last", **raw)[0][i], of_input[-1])
            mean = self.embed(pooling="mean", **raw)[0][i]
            for k, value in enumerate(mean):
                want = math.fsum(row[k] for row in of_input) / len(of_input)
                self.assertAlmostEqual(value, want, delta=1e-6 * max(1, abs(want)))

    def test_norms_and_dimensions(self):
        raw = self.embed(prompt=TEXTS[0], normalize=False)[0][0]
        self.assertEqual(self.embed(prompt=TEXTS[0], embd_normalize=-1)[0][0], raw)
        for norm, length in ((0, lambda v: max(map(abs, v)) / 32760), (1, lambda v: math.fsum(map(abs, v))),
                             (2, lambda v: math.sqrt(math.fsum(x * x for x in v)))):
            for n in (0, 5):
                got = self.embed(prompt=TEXTS[0], embd_normalize=norm, n_dims=n)[0][0]
                cut = raw[:n or None]
                self.assertEqual(len(got), len(cut))
                for x, y in zip(got, cut):
                    self.assertAlmostEqual(x, y / length(cut), delta=1e-6 * abs(x))

    def test_refusals_name_field_and_limit(self):
        def refused(*words, name="INVALID_PARAMS", **params):
            self.refused(name, "text.embed", {"model": "tiny", **params}, *words)
        refused("exactly one of 'prompt', 'tokens' and 'inputs'")
        refused("exactly one of", prompt="x", inputs=["y"])
        refused("'inputs' needs at least one", inputs=[])
        refused("'tokens' needs at least one", tokens=[])
        refused("'inputs', item 1", inputs=["x", 5])
        refused("'inputs', item 1 gives no token", inputs=["x", ""], add_special=False)
        refused("'tokens', item 1", "512", tokens=[1, 512])
        refused("'pooling' is 'max'", "none, mean, cls, last or rank", prompt="x", pooling="max")
        refused("no classifier", "cls.weight", prompt="x", pooling="rank")
        refused("'n_dims' is 4096", prompt="x", n_dims=4096)
        refused("contradict", prompt="x", normalize=False, embd_normalize=2)
        refused("'query' goes with pooling rank; it is last", prompt="x", query="y")
        refused("'embd_normalize' is -2", prompt="x", embd_normalize=-2)
        refused("'inputs', item 1 has", "2048", name="CONTEXT_EXCEEDED", inputs=["x", "y " * 3000])
        refused("'model'", model="")

    def test_what_does_not_fit_a_message_is_refused_before_any_work(self):
        synth(os.path.join(self.folder.path, "models", "wide.gguf"),
              "n_embd=4096,n_heads=8,n_kv_heads=1,n_ff=32,n_layers=1,n_vocab=300")
        self.refused("INVALID_PARAMS", "text.embed", {"model": "wide", "inputs": ["x"] * 1100}, "1100 vectors of 4096",
                     "16777216")
        result = self.client.call("text.embed", {"model": "wide", "inputs": ["x"] * 1000, "add_special": False,
                                                 "n_dims": 8})
        self.assertEqual(result["embeddings"]["shape"], [1000, 8])

    def test_cancel_frees_everything(self):
        id = self.client.send("text.embed", {"model": "tiny", "inputs": ["word " * 90] * 500, "pooling": "none"})
        self.client.wait_events(id, 1)
        self.client.cancel(id)
        with self.assertRaises(Exception) as caught:
            self.client.wait(id)
        self.assertEqual(caught.exception.name, "CANCELLED")
        self.wait_idle()

    def test_a_caller_that_leaves_frees_everything(self):
        other = self.daemon.connect()
        id = other.send("text.embed", {"model": "tiny", "inputs": ["word " * 90] * 500, "pooling": "none"})
        other.wait_events(id, 1)
        other.close()
        self.wait_idle()

    def test_a_large_request_lets_others_through(self):
        id = self.client.send("text.embed", {"model": "tiny", "inputs": ["word " * 90] * 500})
        with self.daemon.connect() as other:
            one = other.call("text.embed", {"model": "tiny", "prompt": TEXTS[0]})
            text = other.generate(model="tiny", prompt="x", n_predict=3, ignore_eos=True)
        self.assertEqual((one["n_tokens"][0] > 0, len(text["tokens"])), (True, 3))
        self.assertNotIn(id, self.client.answers)
        self.assertEqual(self.client.wait(id)["embeddings"]["shape"][0], 500)

    def test_a_prefix_that_was_computed_is_taken_from_the_cache_and_changes_no_bit(self):
        texts = ["shared words " * 40 + tail for tail in ("one", "two")]
        cold = [self.embed(prompt=t, cache_prompt=False) for t in texts]
        self.assertEqual([r["n_cached"] for _, r in cold], [0, 0])
        warm = [self.embed(prompt=t) for t in texts]
        self.assertGreaterEqual(warm[1][1]["n_cached"], 64)
        self.assertEqual([v for v, _ in warm], [v for v, _ in cold])
        # Other vectors need every row of a text.
        for pooling in ("mean", "cls"):
            self.assertEqual(self.embed(prompt=texts[0], pooling=pooling)[1]["n_cached"], 0)
        self.assertEqual(len(self.rows(inputs=texts)[0]), cold[0][1]["n_prompt"])

    def test_neighbours_change_no_bit(self):
        alone = self.embed(inputs=TEXTS, pooling="mean")[0]
        ids = [self.client.send("text.generate", {"model": "tiny", "prompt": "x" * i, "n_predict": 300, "ignore_eos": True})
               for i in range(1, 4)]
        self.client.wait_events(ids[0], 2)
        self.assertEqual(self.embed(inputs=TEXTS, pooling="mean")[0], alone)
        for id in ids:
            self.client.cancel(id)
            self.client.wait(id)


class Encoder(DaemonCase):
    """Files of bert's kind, from text to vector; what the vectors are is tests/unit/engine's to say."""
    flags = ("-b", "48")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        models = os.path.join(cls.folder.path, "models")
        gguf.bert(os.path.join(models, "bert.gguf"))
        gguf.bert(os.path.join(models, "reranker.gguf"), n_scores=1, **{"bert.pooling_type": 4})

    def embed(self, model="bert", **params):
        result = self.client.call("text.embed", {"model": model, **params})
        return vectors(result["embeddings"]), result

    def test_texts_and_their_tokens_have_the_same_vectors(self):
        texts = ["the cat sat on the mat", "", "a dog ran to you", "THE CAT", "xyz"]
        many, result = self.embed(inputs=texts)
        info = self.client.call("model.info", {"model": "bert"})
        self.assertEqual((info["kind"], info["pooling"], result["pooling"]), ("encoder", "mean", "mean"))
        self.assertEqual((info["cache"]["bytes_per_token"], info["cache"]["classes"]), (0, []))
        for text, vector in zip(texts, many):
            tokens = self.client.call("text.tokenize", {"model": "bert", "text": text})["tokens"]
            self.assertEqual((tokens[0], tokens[-1]), (gguf.CLS, gguf.SEP))
            self.assertEqual(self.embed(tokens=tokens)[0][0], vector)
            self.assertEqual(self.embed(prompt=text)[0][0], vector)
        self.assertNotEqual(many[0], many[2])
        kv = self.client.call("server.stats")["kv"]
        self.assertEqual(kv["blocks_used"], 0)

    def test_the_order_of_words_and_what_comes_later_matter(self):
        first = self.embed(prompt="cat dog mat", pooling="cls")[0][0]
        self.assertNotEqual(self.embed(prompt="dog cat mat", pooling="cls")[0][0], first)
        self.assertNotEqual(self.embed(prompt="cat dog you", pooling="cls")[0][0], first)

    def test_what_does_not_fit_a_step_or_the_context_is_refused_with_numbers(self):
        fits = self.embed(prompt="cat " * 46)[1]
        self.assertEqual(fits["n_tokens"], [48])
        self.refused("CONTEXT_EXCEEDED", "text.embed", {"model": "bert", "inputs": ["x", "cat " * 47]},
                     "'inputs', item 1", "49 tokens", "48 (batch_size)")
        self.refused("CONTEXT_EXCEEDED", "text.embed", {"model": "bert", "prompt": "cat " * 63}, "65 tokens", "64")

    def test_an_encoder_generates_nothing(self):
        for method in ("text.generate", "text.logits", "kv.pin"):
            self.refused("INVALID_PARAMS", method, {"model": "bert", "prompt": "x"}, "encoder (bert)", "text.embed")

    def test_a_query_is_joined_to_every_text(self):
        query, texts = "who sat on the mat", ["the cat sat", "a dog ran", ""]
        scores, result = self.embed("reranker", inputs=texts, query=query)
        self.assertEqual((result["pooling"], result["n_dims"]), ("rank", 1))

        def tokens(text):
            return self.client.call("text.tokenize", {"model": "reranker", "text": text})["tokens"]
        for text, score in zip(texts, scores):
            pair = tokens(query) + tokens(text)[1:]
            self.assertEqual((pair[0], pair.count(gguf.CLS), pair.count(gguf.SEP)), (gguf.CLS, 1, 2))
            self.assertEqual(self.embed("reranker", tokens=pair)[0][0], score)
        self.assertEqual(len(set(scores)), 3)
        self.refused("INVALID_PARAMS", "text.embed", {"model": "bert", "inputs": texts, "query": query}, "rank", "mean")
        self.refused("INVALID_PARAMS", "text.embed", {"model": "reranker", "tokens": [2, 3], "query": query}, "'query'")

    def test_many_texts_while_a_decoder_generates(self):
        texts = [" ".join(gguf.WORDS[i % 18] for i in range(j % 40)) for j in range(200)]
        alone = self.embed(inputs=texts)[0]
        id = self.client.send("text.generate", {"model": "tiny", "prompt": "x", "n_predict": 400, "ignore_eos": True})
        self.client.wait_events(id, 1)
        self.assertEqual(self.embed(inputs=texts)[0], alone)
        self.client.cancel(id)
        self.client.wait(id)


if __name__ == "__main__":
    main()
