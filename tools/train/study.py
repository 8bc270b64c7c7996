#!/usr/bin/python3
"""The GQA paper's experiments on the bundled base: every arm, one after the other.

An arm is a conversion (KV heads, pooling), alpha and a seed. Its outcome is a
curve in curves/study/, whose first row is the loss at alpha 0 and whose last is
over all held-out windows. Arms that are there are not run again; one that was
stopped goes on from its checkpoint in build/study/. Several copies may run at
once: each takes the next arm that nobody holds. study_plot.py draws what is done.

Needs gqa-convert (--bin) and, for aligned pooling, gqad and gqa to calibrate.
"""
import argparse
import collections
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = os.path.abspath(os.path.join(HERE, "../../models/demo-mha.gguf"))
CURVES = os.path.join(HERE, "curves/study")
BASE_STEPS = 3000
# Half of the base's tokens a step, so that all arms fit into an afternoon.
BATCH_WINDOWS, EVAL_EVERY, EVAL_WINDOWS = 4, 50, 32
CALIBRATION_TOKENS = 512   # the base's context; 16 times a head's dimensions

# pool: as gqa-convert's, or "similar": aligned, with the heads that are most alike grouped.
Arm = collections.namedtuple("Arm", "kv_heads pool alpha seed")


def arms():
    """In order of importance: what is not reached is missing from the end."""
    main = [(8, "mean"), (2, "mean"), (1, "mean"), (1, "first"), (1, "random"), (2, "first"),
            (2, "random")]
    aligned = [(2, "aligned"), (1, "aligned")]
    out = [Arm(kv, pool, 0.05, 1) for kv, pool in main + aligned]
    out += [Arm(kv, "mean", 0.01, 1) for kv in (8, 2, 1)]
    out += [Arm(kv, pool, 0.05, 2) for kv, pool in main[:4]]
    out += [Arm(kv, "mean", 0.1, 1) for kv in (2, 1, 8)]
    out += [Arm(kv, pool, 0.05, 2) for kv, pool in aligned + main[4:]]
    out += [Arm(4, "mean", 0.05, 1), Arm(2, "similar", 0.05, 1)]
    out += [Arm(kv, pool, 0.05, 3) for kv, pool in main + aligned]
    out += [Arm(4, "mean", 0.05, seed) for seed in (2, 3)]
    out += [Arm(kv, "mean", 0.01, seed) for kv in (8, 2, 1) for seed in (2, 3)]
    out += [Arm(kv, "mean", 0.1, seed) for seed in (2, 3) for kv in (2, 1)]
    out += [Arm(2, "similar", 0.05, seed) for seed in (2, 3)]
    out += [Arm(8, "mean", 0.1, seed) for seed in (2, 3)]
    return out


def name_of(arm):
    kind = {8: "mha", 1: "mqa"}.get(arm.kv_heads, f"gqa{arm.kv_heads}")
    pool = "" if arm.kv_heads == 8 else f"-{arm.pool}"
    return f"{kind}{pool}-a{arm.alpha:g}-s{arm.seed}"


def curve_of(arm):
    return os.path.join(CURVES, name_of(arm) + ".jsonl")


def rows_of(arm):
    """The rows of an arm's curve, if it is whole; else None."""
    try:
        with open(curve_of(arm)) as f:
            rows = [json.loads(line) for line in f]
    except FileNotFoundError:
        return None
    end = BASE_STEPS + round(BASE_STEPS * arm.alpha)
    whole = len(rows) > 1 and rows[-1]["step"] == end and rows[-1]["windows"] > EVAL_WINDOWS
    return rows if whole else None


def run(*command):
    subprocess.run([str(c) for c in command], check=True, stdin=subprocess.DEVNULL)


def calibrate(bin, build):
    """What `gqa kv export` says of the first training tokens: K and V of every head."""
    out = os.path.join(build, "calibration.kv")
    if os.path.exists(out):
        return out
    ids = np.fromfile(os.path.join(build, "..", "train.u16"), "<u2", CALIBRATION_TOKENS)
    folder = tempfile.mkdtemp(prefix="gqad-study-")
    gqa, to = os.path.join(bin, "client/gqa"), ["-m", "base", "--socket", folder + "/s"]
    tokens = os.path.join(folder, "ids.json")
    with open(tokens, "w") as f:
        json.dump(ids.tolist(), f)
    gqad = subprocess.Popen(
        [os.path.join(bin, "daemon/gqad"), "--user", "--socket", folder + "/s", "--models-dir",
         os.path.dirname(BASE), "--cache-dir", folder + "/cache", "-t", "1"],
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        gqad.stdout.readline()   # READY
        run(gqa, "load", BASE, "--name", "base", *to[2:], "-ctk", "f32", "-ctv", "f32")
        run(gqa, "logits", *to, "--tokens", tokens, "-o", os.path.join(folder, "logits"))
        run(gqa, "kv", "export", *to, "--tokens", tokens, "-o", out)
    finally:
        gqad.terminate()
        gqad.wait()
        shutil.rmtree(folder)
    return out


def convert(arm, bin, build):
    """The arm's model before training, in float32 so that no pooling is rounded twice."""
    pool, group = ("aligned", "similar") if arm.pool == "similar" else (arm.pool, "neighbour")
    random = f"-s{arm.seed}" if pool == "random" else ""
    out = os.path.join(build, f"{arm.kv_heads}-{arm.pool}{random}.gguf")
    if not os.path.exists(out):
        more = ["--calibration", calibrate(bin, build)] if pool == "aligned" else []
        part = f"{out}.{os.getpid()}"
        run(os.path.join(bin, "tools/convert/gqa-convert"), "--quiet", "--type", "f32", "--kv-heads",
            arm.kv_heads, "--pool", pool, "--group", group, "--seed", arm.seed, *more, BASE, part)
        os.replace(part, out)
    return out


def uptrain(arm, args, build):
    name = name_of(arm)
    out = os.path.join(build, name + ".pt")
    # Only the first seed and other random heads have a loss at alpha 0 of their own.
    again = arm.alpha != 0.05 or (arm.seed > 1 and arm.pool != "random")
    source = BASE if arm.kv_heads == 8 else convert(arm, args.bin, build)
    run(sys.executable, os.path.join(HERE, "uptrain.py"), "--from", source,
        "--base-steps", BASE_STEPS, "--build", args.build, "--alpha", arm.alpha,
        "--seed", arm.seed, "--threads", args.threads, "--resume",
        "--batch-windows", BATCH_WINDOWS, "--eval-every", EVAL_EVERY,
        "--eval-windows", EVAL_WINDOWS, "--out", out, "--curve", curve_of(arm),
        *(["--no-start"] if again else []))
    os.remove(out)   # 40 MB, and the curve is what was wanted


def take(arm, args, build):
    """Runs the arm and returns True, unless it is done or another copy of this program has it."""
    with open(os.path.join(build, name_of(arm) + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if rows_of(arm):
            return False
        print(f"== {name_of(arm)}", flush=True)
        uptrain(arm, args, build)
    return True


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", default=os.path.join(HERE, "build"), help="corpus, checkpoints")
    ap.add_argument("--bin", default=os.path.join(HERE, "../../build/dev"), help="gqad's build")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--list", action="store_true", help="say what is done, and run nothing")
    args = ap.parse_args()
    if args.list:
        for arm in arms():
            rows = rows_of(arm)
            print(f"{name_of(arm):22} {rows[-1]['heldout'] if rows else '-'}")
        return
    build = os.path.join(args.build, "study")
    os.makedirs(build, exist_ok=True)
    os.makedirs(CURVES, exist_ok=True)
    while any(take(arm, args, build) for arm in arms()):
        pass   # from the top again: an arm may have been given up by another copy


if __name__ == "__main__":
    main()
