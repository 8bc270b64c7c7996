#!/usr/bin/env python3
"""Needles in a haystack, under each KV policy, in a model made by hand to find them: what attention looks for is kept
and found again, and what a window leaves out is not.

One layer. A question's query points to what the keys of needles have, and of nothing else; a needle's value names it,
and the logits say which. RoPE turns the pair of dimensions in question by less than 1e-4 over the whole text, so that
distance does not matter. All else is noise that the question does not see."""
import os
import random
import struct

import checkpoints
from harness import DaemonCase, main

N_EMBD, N_HEADS, N_GROUPS, DIM, N_VOCAB = 64, 4, 2, 16, 300
NOISE = 32                       # dimensions of the stream that ordinary tokens have
IS_NEEDLE, ASKS, NAME = 40, 41, 48  # dimensions: of needles, of the question, of the needles' names
NEEDLES = range(280, 288)
QUESTION = 290
N_TEXT = 2000
KEPT = 128
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.98)
SHARP = 4.0  # of the query: a needle's score is about 45, a text's 0


def row(*pairs):
    """A row of N_EMBD with those (column, value)."""
    values = [0.0] * N_EMBD
    for column, value in pairs:
        values[column] = value
    return values


def embedding(token, draw):
    if token in NEEDLES:
        return row((IS_NEEDLE, 0.7), (NAME + token - NEEDLES[0], 0.7))
    if token == QUESTION:
        return row((ASKS, 1.0))
    noise = [draw.gauss(0, 1) for _ in range(NOISE)]
    length = sum(x * x for x in noise) ** 0.5
    return [x / length for x in noise] + [0.0] * (N_EMBD - NOISE)


def write_model(path):
    draw = random.Random(3)
    zeros = [0.0] * N_EMBD
    q = [zeros] * (N_HEADS * DIM)
    k, v = [zeros] * (N_GROUPS * DIM), [zeros] * (N_GROUPS * DIM)
    for h in range(N_HEADS):
        q[h * DIM + DIM - 2] = row((ASKS, SHARP))
    for g in range(N_GROUPS):
        k[g * DIM + DIM - 2] = row((IS_NEEDLE, 1.0))
        for i in range(len(NEEDLES)):
            v[g * DIM + i] = row((NAME + i, 1.0))
    out = [[0.0] * (N_HEADS * DIM) for _ in range(N_EMBD)]
    for i in range(len(NEEDLES)):
        for h in range(N_HEADS):
            out[NAME + i][h * DIM + i] = 1.0
    logits = [row((NAME + t - NEEDLES[0], 1.0)) if t in NEEDLES else zeros for t in range(N_VOCAB)]
    matrices = {"token_embd": [embedding(t, draw) for t in range(N_VOCAB)], "output": logits, "blk.0.attn_q": q,
                "blk.0.attn_k": k, "blk.0.attn_v": v, "blk.0.attn_output": out, "blk.0.ffn_gate": [zeros] * 32,
                "blk.0.ffn_up": [zeros] * 32, "blk.0.ffn_down": [[0.0] * 32] * N_EMBD}
    tensors = {name + ".weight": ((len(m), len(m[0])), [x for r in m for x in r]) for name, m in matrices.items()}
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[name + ".weight"] = ((N_EMBD,), [1.0] * N_EMBD)
    checkpoints.write_gguf(path, {
        "general.architecture": "llama", "llama.context_length": 4096, "llama.embedding_length": N_EMBD,
        "llama.block_count": 1, "llama.feed_forward_length": 32, "llama.attention.head_count": N_HEADS,
        "llama.attention.head_count_kv": N_GROUPS, "llama.attention.key_length": DIM,
        "llama.attention.value_length": DIM, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e9, "llama.rope.dimension_count": DIM, **checkpoints.vocabulary(N_VOCAB)}, tensors)


class Retrieval(DaemonCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write_model(os.path.join(cls.folder.path, "models", "finder.gguf"))

    def text(self, depth, needle):
        draw = random.Random(depth)
        ids = [draw.randrange(3, 259) for _ in range(N_TEXT)]
        place = int(depth * N_TEXT)
        ids[place] = needle
        return ids + [QUESTION], place

    def found(self, ids, **policy):
        """Asked again behind the prompt, when the policy has chosen: the likeliest token."""
        id = self.client.send("text.logits", {"model": "finder", "tokens": ids + [QUESTION], "first_row": len(ids),
                                              **policy})
        self.client.wait(id)
        (event,) = self.client.events.pop(id)
        logits = struct.unpack(f"<{N_VOCAB}f", event["logits"]["data"])
        best = max(range(N_VOCAB), key=lambda i: logits[i])
        return best if logits[best] > 1 else None  # without a needle in sight all are 0

    def kept(self, ids, place, **policy):
        told = self.client.generate(model="finder", tokens=ids, n_predict=1, temperature=0.0, kv_kept=True, **policy)
        return struct.unpack_from("<f", told["kv"]["kept"]["data"], 4 * place)[0]

    def check(self, expected, **policy):
        """expected: by depth, whether the needle is kept, and so found."""
        for depth, is_kept in zip(DEPTHS, expected):
            for needle in (NEEDLES[0], NEEDLES[5]):
                ids, place = self.text(depth, needle)
                self.assertEqual(self.kept(ids, place, **policy), float(is_kept), (depth, policy))
                self.assertEqual(self.found(ids, **policy), needle if is_kept else None, (depth, policy))

    def test_all_tokens(self):
        self.check([True] * 5)

    def test_windows_lose_what_they_leave_out(self):
        for positions in ("original", "cache"):
            self.check([True, False, False, False, True], kv_policy="window", kv_sinks=4, kv_recent=KEPT - 4,
                       kv_positions=positions)
        self.check([False] * 4 + [True], kv_policy="window", kv_sinks=0, kv_recent=KEPT)

    def test_choices_keep_what_the_question_looks_at(self):
        for more in ({}, {"kv_pool": "max", "kv_kernel": 7}, {"kv_window": 1}):
            self.check([True] * 5, kv_policy="snapkv", kv_budget=KEPT, **more)
            self.check([True] * 5, kv_policy="snapstream", kv_sinks=4, kv_recent=60, kv_topk=KEPT - 64, **more)

    def test_what_was_asked_before_is_not_what_is_asked_now(self):
        """A later turn chooses by its own question: the first one's choice has dropped what it looks for."""
        ids, place = self.text(0.5, NEEDLES[2])
        without = ids[:-1] + [7] * 40  # nothing asks
        policy = {"kv_policy": "snapkv", "kv_budget": 48, "kv_window": 32}
        self.assertLess(self.kept(without, place, **policy), 1)
        self.assertEqual(self.kept(without + [QUESTION], place, **policy), 1)
        self.assertEqual(self.found(without + [QUESTION], **policy), NEEDLES[2])


if __name__ == "__main__":
    main()
