#!/usr/bin/python3
"""Write on from a prompt with a checkpoint: a look at what was learnt."""
import argparse

import torch

import model as llama
from tokenizer import Tokenizer


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint")
    ap.add_argument("prompt", nargs="+")
    ap.add_argument("--tokenizer", default="build/tokenizer.json")
    ap.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    ap.add_argument("--tokens", type=int, default=160)
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    net, _ = llama.load(args.checkpoint)
    tok = Tokenizer.load(args.tokenizer)
    for prompt in args.prompt:
        ids = tok.encode(prompt.replace("\\n", "\n"))
        with torch.no_grad():
            while len(ids) < min(args.tokens, net.cfg.context):
                row = net(torch.tensor([ids]))[0, -1]
                if args.temperature > 0:
                    row = (row / args.temperature).softmax(-1)
                    ids.append(int(torch.multinomial(row, 1)))
                else:
                    ids.append(int(row.argmax()))
                if ids[-1] == tok.eos:
                    break
        print(tok.decode(ids).rstrip() + "\n")


if __name__ == "__main__":
    main()
