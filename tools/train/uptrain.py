#!/usr/bin/python3
"""Go on training a converted model for a small part of its original steps.

Section 2.1 of the GQA paper: after the conversion (gqa-convert), pre-training
goes on with its data and its recipe for a part alpha of its steps. Here the
data's order goes on where the base stopped, at the base's rate, which comes
down to zero in a straight line over these steps. The base itself can be given,
too: multi-head attention with the same steps more is what a grouped model must
be compared with.

--from is a GGUF file (F16 or F32, of gqa-convert or export.py) or a checkpoint
of train.py. With --gguf the outcome is a file that gqad loads. Under torchrun
the processes share each step's rows:

    torchrun --nproc_per_node 2 uptrain.py --from build/gqa2.gguf --alpha 0.05 ...

or, where there is no torchrun that works, each process by itself:

    RANK=0 WORLD_SIZE=2 uptrain.py --rendezvous file:///tmp/meet ... & RANK=1 ...
"""
import argparse
import os

import torch

import export
import loop
import model as llama
from tokenizer import Tokenizer

BASE_STEPS = 3000   # of recipe.sh; a GGUF file does not say how long it was trained


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    loop.add_options(ap)
    ap.add_argument("--from", dest="start", required=True, help="model to go on from")
    ap.add_argument("--alpha", type=float, default=0.05, help="this part of the base's steps more")
    ap.add_argument("--base-steps", type=int, default=BASE_STEPS,
                    help=f"steps of the base that a GGUF file came from ({BASE_STEPS})")
    ap.add_argument("--no-start", action="store_true", help="do not measure the loss at alpha 0")
    ap.add_argument("--gguf", help="GGUF file to write")
    ap.add_argument("--tokenizer", help="for --gguf: tokenizer.json or a GGUF file "
                    "(default: that of --from, or build/tokenizer.json)")
    ap.add_argument("--plot", help="picture of the curve to write, .svg or .png")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    net, base = llama.load(args.start)
    first = base.get("step", args.base_steps)
    past = base.get("windows", first * loop.BATCH_WINDOWS)
    last, ckpt = first + round(first * args.alpha), None
    if args.resume and os.path.exists(args.out):
        net, ckpt = llama.load(args.out)

    def rate(step):
        return args.lr * (last - step) / (last - first)

    run = loop.Run(args, net, first, last, past, rate, lambda step: loop.WINDOW, ckpt)
    if not run.train(start_report=not args.no_start):
        return   # the first process writes the files
    if args.gguf:
        source = args.tokenizer or (args.start if args.start.endswith(".gguf")
                                    else os.path.join(args.build, "tokenizer.json"))
        export.write_gguf(args.gguf, net, Tokenizer.load(source))
    if args.plot:
        import plot   # matplotlib only where a picture is asked for
        plot.draw(args.plot, [(args.curve, os.path.basename(args.curve))])


if __name__ == "__main__":
    main()
