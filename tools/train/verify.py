#!/usr/bin/python3
"""Check a GGUF file against its expected.json, and measure its held-out loss.

Runs the file with numpy and from its metadata alone: no code in common with
model.py, so that an error in the export (a transposed matrix, a wrong pairing
of RoPE) cannot hide in both.
"""
import argparse
import json
import os

import numpy as np

import gguf


class NumpyLlama:
    def __init__(self, path):
        r = gguf.Reader(path)
        self.meta = r.metadata
        self.w = {k: v.astype(np.float32) for k, v in r.tensors.items()}
        self.heads = self.meta["llama.attention.head_count"]
        self.kv_heads = self.meta["llama.attention.head_count_kv"]
        self.dim = self.meta["llama.rope.dimension_count"]
        self.eps = self.meta["llama.attention.layer_norm_rms_epsilon"]

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def rope(self, x):
        """x: [time, heads, dim], as complex numbers: a neighbouring pair each."""
        freq = self.meta["llama.rope.freq_base"] ** (-np.arange(0, self.dim, 2) / self.dim)
        turn = np.exp(1j * np.arange(len(x))[:, None] * freq).astype(np.complex64)
        return (np.ascontiguousarray(x).view(np.complex64) * turn[:, None]).view(np.float32)

    def logits(self, ids):
        w, t = self.w, len(ids)
        x = w["token_embd.weight"][ids]
        future = np.triu(np.full((t, t), -np.inf, np.float32), 1)
        for n in range(self.meta["llama.block_count"]):
            b = f"blk.{n}."
            h = self.norm(x, b + "attn_norm.weight")
            q = self.rope((h @ w[b + "attn_q.weight"].T).reshape(t, self.heads, -1))
            k = self.rope((h @ w[b + "attn_k.weight"].T).reshape(t, self.kv_heads, -1))
            v = (h @ w[b + "attn_v.weight"].T).reshape(t, self.kv_heads, -1)
            out = np.empty_like(q)
            for head in range(self.heads):
                group = head // (self.heads // self.kv_heads)
                s = q[:, head] @ k[:, group].T / np.float32(np.sqrt(self.dim)) + future
                s = np.exp(s - s.max(-1, keepdims=True))
                out[:, head] = s / s.sum(-1, keepdims=True) @ v[:, group]
            x = x + out.reshape(t, -1) @ w[b + "attn_output.weight"].T
            h = self.norm(x, b + "ffn_norm.weight")
            gate = h @ w[b + "ffn_gate.weight"].T
            gate = gate / (1 + np.exp(-gate)) * (h @ w[b + "ffn_up.weight"].T)
            x = x + gate @ w[b + "ffn_down.weight"].T
        return self.norm(x, "output_norm.weight") @ w["token_embd.weight"].T


def check(net, expected, folder):
    worst = 0.0
    for case in expected["prompts"]:
        prompt, tokens = case["prompt_tokens"], case["greedy_tokens"]
        got = net.logits(prompt + tokens)[len(prompt) - 1:-1]
        for id_, value in case["top10"]:
            worst = max(worst, abs(float(got[0, id_]) - value))
        for at, (row, token, margin) in enumerate(zip(got, tokens, case["margins"])):
            if margin > 0.01 and row.argmax() != token:
                raise SystemExit(f"{case['prompt']!r}: token {at} is {row.argmax()}, not {token}")
    if "logits" in expected:
        want = np.fromfile(os.path.join(folder, expected["logits"]["file"]), "<f4")
        want = want.reshape(expected["logits"]["shape"])
        worst = max(worst, float(abs(net.logits(expected["logits"]["tokens"]) - want).max()))
    if worst > 2e-3:
        raise SystemExit(f"logits differ by {worst}")
    print(f"greedy tokens agree, logits within {worst:.1e}")


def held_out(net, path, window):
    ids = np.fromfile(path, "<u2").astype(np.int64)
    losses = []
    for at in range(0, len(ids) - window, window):
        row = net.logits(ids[at:at + window])
        row = row - row.max(-1, keepdims=True)
        chosen = np.take_along_axis(row, ids[at + 1:at + window + 1, None], 1)[:, 0]
        losses.append(float((np.log(np.exp(row).sum(-1)) - chosen).mean()))
    return sum(losses) / len(losses)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("gguf")
    ap.add_argument("--heldout", help="heldout.u16: measure the loss on it")
    args = ap.parse_args()
    net = NumpyLlama(args.gguf)
    expected = os.path.splitext(args.gguf)[0] + ".expected.json"
    if os.path.exists(expected):
        with open(expected, encoding="utf-8") as f:
            check(net, json.load(f), os.path.dirname(args.gguf))
    if args.heldout:
        loss = held_out(net, args.heldout, net.meta["llama.context_length"])
        print(f"held-out loss {loss:.4f} nats a token")


if __name__ == "__main__":
    main()
