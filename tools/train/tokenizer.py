#!/usr/bin/python3
"""Byte-level BPE as GPT-2 has it: train it, encode with it, decode with it.

`tokenizer.py` alone trains on build/train.txt, writes build/tokenizer.json,
then encodes both splits to build/{train,heldout}.u16 (little-endian uint16 ids).
With `--from MODEL.gguf` it takes that model's tokenizer instead of training
one: who trains a model further must read the corpus with its tokens.
"""
import argparse
import collections
import heapq
import json
import os

import numpy as np
import regex

import gguf

PRETOKEN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
BOS, EOS = "<|bos|>", "<|eos|>"


def byte_alphabet():
    """GPT-2's reversible map from the 256 bytes to printable characters."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(keep))
    return table


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def to_alphabet(text):
    return "".join(BYTE_TO_CHAR[b] for b in text.encode("utf-8"))


def apply_merge(symbols, pair):
    """The symbols with every non-overlapping `pair`, from the left, joined."""
    out, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def train_merges(pretokens, n_merges):
    """The n most frequent merges. `pretokens`: {text in the alphabet: count}.

    Incremental: a merge only touches the pre-tokens that hold its pair, and
    stale heap entries are recognised by their count when they come up.
    """
    words = [[list(w), n] for w, n in sorted(pretokens.items())]
    counts, where = collections.Counter(), collections.defaultdict(set)
    for i, (symbols, n) in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        n, best = heapq.heappop(heap)
        if -n != counts[best]:
            if counts[best] > 0:
                heapq.heappush(heap, (-counts[best], best))
            continue
        merges.append(best)
        touched = set()
        for i in where.pop(best):
            symbols, n = words[i]
            for pair in zip(symbols, symbols[1:]):
                counts[pair] -= n
            words[i][0] = symbols = apply_merge(symbols, best)
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += n
                where[pair].add(i)
                touched.add(pair)
        for pair in touched:
            heapq.heappush(heap, (-counts[pair], pair))
    return merges


class Tokenizer:
    def __init__(self, merges):
        self.merges = [tuple(m) for m in merges]
        self.tokens = [BYTE_TO_CHAR[b] for b in sorted(BYTE_TO_CHAR, key=BYTE_TO_CHAR.get)]
        self.tokens += [a + b for a, b in self.merges] + [BOS, EOS]
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        assert len(self.ids) == len(self.tokens)
        self.rank = {m: i for i, m in enumerate(self.merges)}
        self.bos, self.eos = self.ids[BOS], self.ids[EOS]
        self.cache = {}

    @classmethod
    def load(cls, path):
        """From tokenizer.json or from a GGUF file that export.py wrote."""
        if path.endswith(".gguf"):
            meta = gguf.Reader(path).metadata
            tok = cls(m.split(" ") for m in meta["tokenizer.ggml.merges"])
            if tok.tokens != meta["tokenizer.ggml.tokens"]:
                raise ValueError(f"{path}: its vocabulary is not bytes, merges, {BOS}, {EOS}")
            return tok
        with open(path, encoding="utf-8") as f:
            return cls(m.split(" ") for m in json.load(f)["merges"])

    def encode_pretoken(self, text):
        found = self.cache.get(text)
        if found is None:
            symbols = list(to_alphabet(text))
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, 1 << 30))
                if pair not in self.rank:
                    break
                symbols = apply_merge(symbols, pair)
            found = self.cache[text] = [self.ids[s] for s in symbols]
        return found

    def encode(self, text, bos=True):
        """Text to ids. Control tokens spelt out in the text stay plain text."""
        out = [self.bos] if bos else []
        for pretoken in PRETOKEN.findall(text):
            out += self.encode_pretoken(pretoken)
        return out

    def decode(self, ids):
        chars = "".join(self.tokens[i] for i in ids if i not in (self.bos, self.eos))
        return bytes(CHAR_TO_BYTE[c] for c in chars).decode("utf-8", "replace")


def documents(path):
    with open(path, encoding="utf-8", newline="") as f:
        return f.read().split("\0")


def trained(path, vocab):
    counts = collections.Counter()
    for doc in documents(path):
        counts.update(PRETOKEN.findall(doc))
    counts = {to_alphabet(w): n for w, n in counts.items()}
    tok = Tokenizer(train_merges(counts, vocab - 256 - 2))
    assert len(tok.tokens) == vocab
    return tok


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--build", default="build")
    ap.add_argument("--out", default="build/tokenizer.json")
    ap.add_argument("--vocab", type=int, default=2048)
    ap.add_argument("--from", dest="source", help="a GGUF file whose tokenizer to take")
    args = ap.parse_args()

    if args.source:
        tok = Tokenizer.load(args.source)
    else:
        tok = trained(os.path.join(args.build, "train.txt"), args.vocab)
    with open(args.out, "w", encoding="utf-8") as f:
        json.dump({"merges": [" ".join(m) for m in tok.merges]}, f, ensure_ascii=False, indent=0)
        f.write("\n")

    for split in ("train", "heldout"):
        ids, size = [], 0
        for doc in documents(os.path.join(args.build, split + ".txt")):
            ids += tok.encode(doc) + [tok.eos]
            size += len(doc.encode("utf-8"))
        np.array(ids, dtype="<u2").tofile(os.path.join(args.build, split + ".u16"))
        print(f"{split}: {len(ids)} tokens, {size / len(ids):.3f} bytes a token")


if __name__ == "__main__":
    main()
