#!/usr/bin/python3
"""Train, go on training (--resume) or uptrain (--from).

The learning rate warms up and then stays: the base can stop at any step, and
whatever is trained further from it goes on at the same rate. Only a run with
--decay brings the rate down to zero, in a straight line to its last step.
One JSON object a line goes to --curve: step, tokens, training and held-out
loss in nats a token.
"""
import argparse
import json
import math
import os
import time

import numpy as np
import torch

import model as llama

WINDOW = 512         # the order of the data is made of these, whatever --context is
BATCH_WINDOWS = 8    # 4096 tokens a step


class Data:
    """Windows of the token stream: a new order each epoch, the same each run."""

    def __init__(self, path, seed):
        self.ids = np.fromfile(path, dtype="<u2")
        self.count = (len(self.ids) - 1) // WINDOW
        self.seed, self.epoch, self.order = seed, None, None

    def window(self, i):
        epoch, at = divmod(i, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        start = int(self.order[at]) * WINDOW
        return self.ids[start:start + WINDOW + 1].astype(np.int64)

    def batch(self, step, context):
        rows = torch.from_numpy(np.stack(
            [self.window(step * BATCH_WINDOWS + i) for i in range(BATCH_WINDOWS)]))
        return rows[:, :-1].reshape(-1, context), rows[:, 1:].reshape(-1, context)


def held_out_loss(net, ids, windows, autocast):
    """Mean loss over the first `windows` windows of the held-out stream."""
    total, net_was = 0.0, net.training
    net.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for at in range(0, windows, 4):
            n = min(4, windows - at)
            rows = torch.from_numpy(np.stack(
                [ids[i * WINDOW:i * WINDOW + WINDOW + 1] for i in range(at, at + n)]).astype(np.int64))
            total += net.loss(rows[:, :-1], rows[:, 1:]).item() * n
    net.train(net_was)
    return total / windows


def learning_rate(args, step, first, last):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (last - step) / (last - first) if args.decay else args.lr


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--build", default="build")
    ap.add_argument("--out", required=True, help="checkpoint to write")
    ap.add_argument("--curve", required=True, help="JSON lines to write")
    ap.add_argument("--steps", type=int, help="steps of a base run")
    ap.add_argument("--long-from", type=int, default=0,
                    help="steps before this one see rows of 256 tokens, the others of 512")
    ap.add_argument("--from", dest="start", help="checkpoint to go on from")
    ap.add_argument("--alpha", type=float, help="with --from: this part of its steps more")
    ap.add_argument("--decay", action="store_true", help="rate to zero over this run")
    ap.add_argument("--resume", action="store_true", help="go on from --out if it is there")
    ap.add_argument("--kv-heads", type=int, default=8)
    ap.add_argument("--layers", type=int, default=5)
    ap.add_argument("--ffn", type=int, default=512)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--warmup", type=int, default=100)
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--eval-every", type=int, default=100)
    ap.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    bf16 = not args.float32

    data = Data(os.path.join(args.build, "train.u16"), args.seed)
    held = np.fromfile(os.path.join(args.build, "heldout.u16"), dtype="<u2")
    held_windows = (len(held) - 1) // WINDOW

    resumed = args.resume and os.path.exists(args.out)
    first, step, elapsed = 0, 0, 0.0
    if resumed:
        net, ckpt = llama.load(args.out)
        first, step, elapsed = ckpt["first"], ckpt["step"], ckpt["seconds"]
    elif args.start:
        net, ckpt = llama.load(args.start)
        first = step = ckpt["step"]
    else:
        net = llama.Llama(llama.Config(kv_heads=args.kv_heads, layers=args.layers, ffn=args.ffn))
    last = args.steps or first + round(first * args.alpha)

    matrices = [p for p in net.parameters() if p.dim() == 2]
    norms = [p for p in net.parameters() if p.dim() != 2]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                             {"params": norms, "weight_decay": 0.0}],
                            lr=args.lr, betas=(0.9, 0.95))
    # A converted model has no moments of its own; its MHA twin starts without
    # them too, or the comparison would not be of the heads alone.
    if resumed:
        opt.load_state_dict(ckpt["opt"])

    def save():
        llama.save(args.out + ".tmp", net, opt=opt.state_dict(), first=first, step=step,
                   seconds=elapsed)
        os.replace(args.out + ".tmp", args.out)

    curve = open(args.curve, "a" if resumed else "w", buffering=1)

    def report(train, held_windows):
        row = {"step": step, "tokens": step * BATCH_WINDOWS * WINDOW,
               "train": train and round(train, 4),
               "heldout": round(held_out_loss(net, held, held_windows, bf16), 4),
               "windows": held_windows, "seconds": round(elapsed)}
        curve.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    mean, count = 0.0, 0
    print(f"{sum(p.numel() for p in net.parameters())} parameters, steps {step} to {last}, "
          f"{data.count} windows an epoch, bf16 {bf16}", flush=True)
    few = min(64, held_windows)   # enough to draw a curve
    if not resumed:
        report(None, few)
        report(None, held_windows)
    while step < last:
        t = time.time()
        rate = learning_rate(args, step, first, last)
        for group in opt.param_groups:
            group["lr"] = rate
        ids, targets = data.batch(step, WINDOW if step >= args.long_from else WINDOW // 2)
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = net.loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"step {step}: loss {loss.item()}")
        step += 1
        mean, count, elapsed = mean + loss.item(), count + 1, elapsed + time.time() - t
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} {elapsed:.0f} s", flush=True)
        if step % args.eval_every == 0 or step == last:
            report(mean / count, few)
            if step == last:
                report(mean / count, held_windows)
            mean, count = 0.0, 0
            save()
    curve.close()


if __name__ == "__main__":
    main()
