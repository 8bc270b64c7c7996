#!/usr/bin/python3
"""Write a checkpoint (or a GGUF file) as GGUF, with what to expect of it.

Matrices become F16 or F32, norms F32.

NAME.expected.json and NAME.logits.f32 are computed by torch in float32 from the
weights as the file has them, after rounding: what another program that
runs the file should come to, up to the order of its sums.
"""
import argparse
import json
import os

import numpy as np
import torch

import gguf
import model as llama
from tokenizer import Tokenizer

PROMPTS = ["Package: curl",
           "Package: libpng-dev\nSection: libdevel\nDescription:",
           "systemctl (1) -"]
# Not for the model but for whoever writes a tokenizer: contractions, digits,
# runs of blanks, newlines, letters and signs beyond ASCII, control text.
TOKENIZE = ["", " ", "it's we'll I'D", "x86_64-linux-gnu 3.14", "a  b   c \n\n d \t",
            "naïve café – 日本語 😀", " leading and trailing ", "<|bos|> is text here"]
GREEDY, LOGIT_TOKENS = 32, 40
LICENCE = ("weights trained on the descriptions of Debian's packages and on manual-page "
           "summaries, each under the licence of its package")


FILE_TYPES = {"f32": 0, "f16": 1}   # general.file_type: what most tensors are
DTYPES = {"f32": "<f4", "f16": "<f2"}


def metadata(cfg, tok, name, type):
    u32, f32, text, arch = gguf.UINT32, gguf.FLOAT32, gguf.STRING, "llama."
    kinds = [3 if t in (tok.tokens[tok.bos], tok.tokens[tok.eos]) else 1 for t in tok.tokens]
    return [
        ("general.architecture", text, "llama"),
        ("general.name", text, name),
        ("general.license", text, LICENCE),
        ("general.alignment", u32, gguf.ALIGNMENT),
        ("general.file_type", u32, FILE_TYPES[type]),
        (arch + "context_length", u32, cfg.context),
        (arch + "embedding_length", u32, cfg.width),
        (arch + "block_count", u32, cfg.layers),
        (arch + "feed_forward_length", u32, cfg.ffn),
        (arch + "vocab_size", u32, cfg.vocab),
        (arch + "attention.head_count", u32, cfg.heads),
        (arch + "attention.head_count_kv", u32, cfg.kv_heads),
        (arch + "attention.layer_norm_rms_epsilon", f32, cfg.eps),
        (arch + "rope.dimension_count", u32, cfg.head_dim),
        (arch + "rope.freq_base", f32, cfg.rope_base),
        ("tokenizer.ggml.model", text, "gpt2"),
        ("tokenizer.ggml.pre", text, "gpt-2"),
        ("tokenizer.ggml.tokens", gguf.ARRAY, (text, tok.tokens)),
        ("tokenizer.ggml.token_type", gguf.ARRAY, (gguf.INT32, kinds)),
        ("tokenizer.ggml.merges", gguf.ARRAY, (text, [" ".join(m) for m in tok.merges])),
        ("tokenizer.ggml.bos_token_id", u32, tok.bos),
        ("tokenizer.ggml.eos_token_id", u32, tok.eos),
        ("tokenizer.ggml.add_bos_token", gguf.BOOL, True),
    ]


def tensors(net, type):
    """The tensors under their GGUF names, which the modules bear already."""
    out = []
    for name, p in net.state_dict().items():
        a = p.detach().cpu().numpy()
        out.append((name, a.astype(DTYPES[type] if a.ndim == 2 else "<f4")))
    return out


def write_gguf(path, net, tok, type="f16"):
    """Writes the model; returns its tensors as the file has them."""
    name = "gqad-" + os.path.splitext(os.path.basename(path))[0]
    rounded = tensors(net, type)
    gguf.write(path, metadata(net.cfg, tok, name, type), rounded)
    return rounded


def logits(net, ids):
    with torch.no_grad():
        return net(torch.tensor([ids]))[0]


def greedy(net, tok, prompt):
    """32 most likely tokens, also past an end of text: a test of numbers, not of prose."""
    ids = tok.encode(prompt)
    n, margins = len(ids), []
    first = logits(net, ids)[-1]
    for _ in range(GREEDY):
        top = logits(net, ids)[-1].topk(2)
        margins.append(round((top.values[0] - top.values[1]).item(), 5))
        ids.append(int(top.indices[0]))
    top = first.topk(10)
    return {"prompt": prompt, "prompt_tokens": ids[:n], "greedy_tokens": ids[n:],
            "margins": margins, "greedy_text": tok.decode(ids[n:]),
            "top10": [[int(i), round(v.item(), 6)] for i, v in zip(top.indices, top.values)]}


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint")
    ap.add_argument("out", help="NAME.gguf")
    ap.add_argument("--type", choices=tuple(DTYPES), default="f16", help="of the matrices")
    ap.add_argument("--tokenizer", default="build/tokenizer.json",
                    help="tokenizer.json, or a GGUF file that has it")
    ap.add_argument("--logits", action="store_true", help="NAME.logits.f32 too")
    args = ap.parse_args()
    stem, _ = os.path.splitext(args.out)

    net, _ = llama.load(args.checkpoint)
    tok = Tokenizer.load(args.tokenizer)
    rounded = write_gguf(args.out, net, tok, args.type)

    net.load_state_dict({n: torch.from_numpy(a.astype(np.float32)) for n, a in rounded})
    net.eval()
    cases = [greedy(net, tok, p) for p in PROMPTS]
    expected = {"model": os.path.basename(args.out), "vocab": net.cfg.vocab,
                "bos": tok.bos, "eos": tok.eos, "prompts": cases,
                "tokenize": [{"text": t, "ids": tok.encode(t, bos=False)} for t in TOKENIZE]}
    if args.logits:
        ids = (cases[0]["prompt_tokens"] + cases[0]["greedy_tokens"])[:LOGIT_TOKENS]
        logits(net, ids).numpy().astype("<f4").tofile(stem + ".logits.f32")
        expected["logits"] = {"file": os.path.basename(stem) + ".logits.f32",
                              "shape": [len(ids), net.cfg.vocab], "tokens": ids}
    with open(stem + ".expected.json", "w", encoding="utf-8") as f:
        json.dump(expected, f, indent=1, ensure_ascii=False)
        f.write("\n")


if __name__ == "__main__":
    main()
