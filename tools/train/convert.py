#!/usr/bin/python3
"""Turn a multi-head checkpoint into a grouped one by pooling its KV heads.

Section 2.1 of the GQA paper: each group's key and value projections are the
mean of the projections of the heads it replaces. Query head h keeps its weights
and reads group h // (heads per group). RoPE acts on the same dimensions in
every head, so pooling before or after it would be the same.
"""
import argparse

import torch

import model as llama


def pool(weight, head_dim, groups, how):
    """[heads * head_dim, width] -> [groups * head_dim, width]."""
    w = weight.view(groups, -1, head_dim, weight.shape[1])
    w = w.mean(1) if how == "mean" else w[:, 0]
    return w.reshape(groups * head_dim, -1).clone()


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("source")
    ap.add_argument("target")
    ap.add_argument("--kv-heads", type=int, default=2)
    ap.add_argument("--pool", choices=("mean", "first"), default="mean",
                    help="mean of each group's heads, or only its first head")
    args = ap.parse_args()

    ckpt = torch.load(args.source, map_location="cpu")
    cfg = llama.Config(**ckpt["config"])
    if cfg.kv_heads % args.kv_heads:
        raise SystemExit(f"{cfg.kv_heads} heads do not divide into {args.kv_heads} groups")
    state = {name: pool(w, cfg.head_dim, args.kv_heads, args.pool)
             if name.endswith(("attn_k.weight", "attn_v.weight")) else w
             for name, w in ckpt["model"].items()}
    cfg.kv_heads = args.kv_heads
    net = llama.Llama(cfg)
    net.load_state_dict(state)
    # The step goes along: uptraining continues the base's order of the data.
    llama.save(args.target, net, step=ckpt["step"])


if __name__ == "__main__":
    main()
