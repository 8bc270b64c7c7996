"""The training loop that train.py (a base) and uptrain.py (a converted model) share.

The data's order and the rate depend on the step alone, so that a run which was
stopped and resumed repeats the losses of one that was not. Started by torchrun,
every process takes its share of each step's rows and gradients are averaged
(DistributedDataParallel): the batch is the same however many share it.
"""
import json
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import model as llama

WINDOW = 512         # the order of the data is made of these, whatever a row's length is
BATCH_WINDOWS = 8    # 4096 tokens a step


class Data:
    """Windows of the token stream: a new order each epoch, the same each run."""

    def __init__(self, path, seed):
        self.ids = np.fromfile(path, dtype="<u2")
        self.count = (len(self.ids) - 1) // WINDOW
        self.seed, self.epoch, self.order = seed, None, None
        if self.count < 1:
            raise SystemExit(f"{path}: less than one window of {WINDOW} tokens")

    def window(self, i):
        epoch, at = divmod(i, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        start = int(self.order[at]) * WINDOW
        return self.ids[start:start + WINDOW + 1].astype(np.int64)

    def batch(self, first, count, context):
        """Windows first .. first + count as rows of `context` tokens: (ids, targets)."""
        rows = torch.from_numpy(np.stack([self.window(first + i) for i in range(count)]))
        return rows[:, :-1].reshape(-1, context), rows[:, 1:].reshape(-1, context)


class World:
    """The processes of this run: one, or as many as torchrun started."""

    def __init__(self, rendezvous):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    init_method=rendezvous, rank=self.rank, world_size=self.size)

    def share(self, rows):
        """This process's rows of a batch."""
        if len(rows) % self.size:
            raise SystemExit(f"{len(rows)} rows a step do not divide among {self.size} processes")
        part = len(rows) // self.size
        return rows[self.rank * part:(self.rank + 1) * part].to(self.device)

    def mean(self, value):
        """The mean of a scalar tensor over the processes."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def finish(self):
        if self.size > 1:
            dist.destroy_process_group()


class Loss(torch.nn.Module):
    """The model as a function to its loss: what DistributedDataParallel can wrap."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids, targets):
        return self.net.loss(ids, targets)


def held_out_loss(net, ids, windows, device=torch.device("cpu"), autocast=True):
    """Mean loss over the first `windows` windows of the held-out stream."""
    total, net_was = 0.0, net.training
    net.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for at in range(0, windows, 4):
            n = min(4, windows - at)
            rows = torch.from_numpy(np.stack(
                [ids[i * WINDOW:i * WINDOW + WINDOW + 1] for i in range(at, at + n)])
                .astype(np.int64)).to(device)
            total += net.loss(rows[:, :-1], rows[:, 1:]).item() * n
    net.train(net_was)
    return total / windows


def add_options(ap):
    ap.add_argument("--build", default="build", help="where train.u16 and heldout.u16 are")
    ap.add_argument("--out", required=True, help="checkpoint to write")
    ap.add_argument("--curve", required=True, help="JSON lines to write")
    ap.add_argument("--resume", action="store_true", help="go on from --out if it is there")
    ap.add_argument("--stop-at", type=int, help="stop after this step, to be resumed")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--seed", type=int, default=1, help="of the weights and of the data's order")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--batch-windows", type=int, default=BATCH_WINDOWS,
                    help=f"windows of {WINDOW} tokens a step")
    ap.add_argument("--eval-every", type=int, default=100)
    ap.add_argument("--eval-windows", type=int, default=64,
                    help="held-out windows for the curve; its last row has all of them")
    ap.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    ap.add_argument("--rendezvous", default="env://",
                    help="how the processes of a run meet: torchrun's way, or file://PATH")


class Run:
    """One model on its way from step `first` to step `last`.

    rate(step) is the learning rate, context(step) the length of a row. `past`
    is how many windows were read before step `first`; `plan` names what must be
    the same when the run is resumed.
    """

    def __init__(self, args, net, first, last, past, rate, context, ckpt=None):
        self.args, self.world = args, World(args.rendezvous)
        self.net = net.to(self.world.device)
        self.first, self.last, self.past = first, last, past
        self.rate, self.context = rate, context
        self.plan = {"seed": args.seed, "first": first, "last": last, "lr": args.lr,
                     "batch_windows": args.batch_windows}
        self.step = ckpt["step"] if ckpt else first
        self.elapsed = ckpt["seconds"] if ckpt else 0.0
        self.data = Data(os.path.join(args.build, "train.u16"), args.seed)
        self.held = np.fromfile(os.path.join(args.build, "heldout.u16"), dtype="<u2")
        self.held_windows = (len(self.held) - 1) // WINDOW
        self.few = min(args.eval_windows, self.held_windows)
        self.opt = self.optimizer()
        # A converted model has no moments of its own; its MHA twin starts without
        # them too, or the comparison would not be of the heads alone.
        if ckpt:
            if ckpt["plan"] != self.plan:
                raise SystemExit(f"{args.out} is of another run: {ckpt['plan']}, not {self.plan}")
            self.opt.load_state_dict(ckpt["opt"])
        self.curve = self.open_curve(resumed=bool(ckpt)) if self.world.rank == 0 else None

    def optimizer(self):
        matrices = [p for p in self.net.parameters() if p.dim() == 2]
        norms = [p for p in self.net.parameters() if p.dim() != 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": self.args.weight_decay},
                                  {"params": norms, "weight_decay": 0.0}],
                                 lr=self.args.lr, betas=(0.9, 0.95))

    def open_curve(self, resumed):
        """A stop between a row and its checkpoint leaves a row that will come again."""
        rows = []
        if resumed and os.path.exists(self.args.curve):
            with open(self.args.curve) as f:
                rows = [line for line in f if json.loads(line)["step"] <= self.step]
        curve = open(self.args.curve, "w", buffering=1)
        curve.writelines(rows)
        return curve

    def save(self):
        llama.save(self.args.out + ".tmp", self.net, opt=self.opt.state_dict(), plan=self.plan,
                   step=self.step, windows=self.windows(), seconds=self.elapsed)
        os.replace(self.args.out + ".tmp", self.args.out)

    def windows(self):
        """Windows of the stream that were read until now."""
        return self.past + (self.step - self.first) * self.args.batch_windows

    def report(self, train, windows):
        loss = held_out_loss(self.net, self.held, windows, self.world.device,
                             not self.args.float32)
        row = {"step": self.step, "tokens": self.windows() * WINDOW,
               "train": train and round(train, 4), "heldout": round(loss, 4),
               "windows": windows, "seconds": round(self.elapsed)}
        self.curve.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def one_step(self, module):
        """The loss of this step's batch, whose gradient has been followed."""
        rate, device = self.rate(self.step), self.world.device
        for group in self.opt.param_groups:
            group["lr"] = rate
        ids, targets = self.data.batch(self.windows(), self.args.batch_windows,
                                       self.context(self.step))
        self.opt.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=not self.args.float32):
            loss = module(self.world.share(ids), self.world.share(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.opt.step()
        loss = self.world.mean(loss)
        if not math.isfinite(loss):
            raise SystemExit(f"step {self.step}: loss {loss}")
        self.step += 1
        return loss

    def train(self, start_report=True):
        """To the last step; writes curve and checkpoints on the way."""
        first_rank, module = self.world.rank == 0, Loss(self.net)
        if self.world.size > 1:
            module = torch.nn.parallel.DistributedDataParallel(module)
        if first_rank:
            print(f"{sum(p.numel() for p in self.net.parameters())} parameters, steps {self.step} "
                  f"to {self.last}, {self.data.count} windows an epoch, {self.world.size} x "
                  f"{self.world.device.type}", flush=True)
            if start_report and self.step == self.first:
                self.report(None, self.few)
                self.report(None, self.held_windows)
        mean, count = 0.0, 0
        stop = min(self.last, self.args.stop_at or self.last)
        while self.step < stop:
            start = time.time()
            loss = self.one_step(module)
            mean, count, self.elapsed = mean + loss, count + 1, self.elapsed + time.time() - start
            if first_rank and self.step % 20 == 0:
                print(f"step {self.step} loss {loss:.3f} {self.elapsed:.0f} s", flush=True)
            if (self.step - self.first) % self.args.eval_every == 0 or self.step == stop:
                if first_rank:
                    self.report(mean / count, self.few)
                    if self.step == self.last:
                        self.report(mean / count, self.held_windows)
                    self.save()
                mean, count = 0.0, 0
        self.world.wait()
        self.world.finish()
        if first_rank:
            self.curve.close()
        return first_rank
