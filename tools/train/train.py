#!/usr/bin/python3
"""Train a base model.

The learning rate warms up and then stays: the base can stop at any step, and
whatever is trained further from it goes on at the same rate. One JSON object a
line goes to --curve: step, tokens, training and held-out loss in nats a token.
Under torchrun the processes share each step's rows.
"""
import argparse
import os

import torch

import loop
import model as llama


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    loop.add_options(ap)
    ap.add_argument("--steps", type=int, required=True)
    ap.add_argument("--long-from", type=int, default=0,
                    help="steps before this one see rows of 256 tokens, the others of 512")
    ap.add_argument("--warmup", type=int, default=100)
    ap.add_argument("--kv-heads", type=int, default=8)
    ap.add_argument("--layers", type=int, default=5)
    ap.add_argument("--ffn", type=int, default=512)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    net, ckpt = llama.Llama(llama.Config(kv_heads=args.kv_heads, layers=args.layers,
                                         ffn=args.ffn)), None
    if args.resume and os.path.exists(args.out):
        net, ckpt = llama.load(args.out)

    def rate(step):
        return args.lr * min(1.0, (step + 1) / args.warmup)

    def context(step):
        return loop.WINDOW if step >= args.long_from else loop.WINDOW // 2

    loop.Run(args, net, 0, args.steps, 0, rate, context, ckpt).train()


if __name__ == "__main__":
    main()
