#!/usr/bin/python3
"""Pictures and tables of study.py's curves: docs/gqa/*.svg, and the tables of docs/gqa.md.

Draws whatever arms are there, and curves/decode.jsonl: rows of
`gqa bench --kv-heads -o jsonl`. A point is the mean over the seeds that are done,
its bar their standard deviation. The differences in the tables are between runs
of one seed, which saw the same data in the same order.
"""
import argparse
import json
import os
import statistics

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt

import plot
import study

HEADS = {8: "MHA (8)", 4: "GQA-4", 2: "GQA-2", 1: "MQA (1)"}
POOLS = ("mean", "first", "random", "aligned", "similar")
NAMES = {"similar": "aligned, similar heads"}
COLOURS = {8: "black", 4: "tab:green", 2: "tab:blue", 1: "tab:red"}
LOSS = "held-out loss, nats a token"


class Losses:
    """Final held-out losses, over all windows: {(kv_heads, pool, alpha): {seed: loss}}."""

    def __init__(self):
        self.all = {}
        for arm in study.arms():
            rows = study.rows_of(arm)
            if not rows:
                continue
            self.all.setdefault(arm[:3], {})[arm.seed] = rows[-1]["heldout"]
            whole = max(r["windows"] for r in rows)
            start = [r["heldout"] for r in rows if r["train"] is None and r["windows"] == whole]
            if start:   # exact, so that it needs no seeds, but for random heads
                self.all.setdefault((arm.kv_heads, arm.pool, 0), {})[arm.seed] = start[0]

    def get(self, kv_heads, pool, alpha):
        """(mean, deviation, number of seeds), or None."""
        found = list(self.all.get((kv_heads, pool, alpha), {}).values())
        if not found:
            return None
        return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0, len(found)

    def difference(self, kv_heads, pool, alpha, than):
        """Of the same seeds to those of `than`, a key as (kv_heads, pool, alpha)."""
        a, b = self.all.get((kv_heads, pool, alpha), {}), self.all.get(than, {})
        both = [a[s] - b[s] for s in a if s in b]
        if not both:
            return None
        return statistics.mean(both), statistics.stdev(both) if len(both) > 1 else 0, len(both)


def number(value, sign=""):
    if value is None:
        return "-"
    mean, deviation, n = value
    return f"{mean:{sign}.3f}" + (f" ± {deviation:.3f}" if n > 1 else "")


def quality(losses, path):
    """The paper's figure 3: quality against what a token of context costs."""
    fig, ax = plt.subplots(figsize=(5.5, 3.8))
    width = 2 * 5 * 32 * 2   # bytes of K and V a token and head: 5 layers of 32 values, f16
    for kv, pool in ((8, "mean"), (4, "mean"), (2, "mean"), (1, "mean"), (2, "aligned"),
                     (1, "aligned")):
        value = losses.get(kv, pool, 0.05)
        if value:
            name = HEADS[kv] + (f", {pool}" if kv < 8 else "")
            ax.errorbar(kv * width, value[0], value[1], fmt="o", capsize=4, color=COLOURS[kv],
                        fillstyle="full" if pool == "mean" else "none")
            ax.annotate(name, (kv * width, value[0]), xytext=(7, 3), textcoords="offset points",
                        fontsize="small")
    ax.set_xlabel("KV cache, bytes a token (f16)")
    ax.set_ylabel(LOSS)
    ax.set_xlim(0, 9.6 * width)
    ax.margins(y=0.1)
    ax.grid(alpha=0.3)
    plot.save(fig, path)


def pooling(losses, path):
    """The paper's figure 4: what the heads of a group are replaced by."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for ax, kv in zip(axes, (2, 1)):
        done = [(p, losses.get(kv, p, 0.05)) for p in POOLS]
        done = [(p, v) for p, v in done if v][::-1]
        for at, (pool, (mean, deviation, n)) in enumerate(done):
            ax.errorbar(mean, at, xerr=deviation, fmt="o", capsize=4, color=COLOURS[kv])
        ax.set_yticks(range(len(done)), [NAMES.get(p, p).replace(", ", ",\n") for p, _ in done])
        ax.set_ylim(-0.6, len(done) - 0.4)
        base = losses.get(8, "mean", 0.05)
        if base:
            ax.axvline(base[0], color="black", linestyle=":", label="MHA, the same steps")
            ax.legend(fontsize="small")
        ax.set_title(HEADS[kv])
        ax.set_xlabel(LOSS)
        ax.grid(alpha=0.3)
    plot.save(fig, path)


def against_alpha(losses, path):
    """The paper's figure 5: how much uptraining."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), gridspec_kw={"width_ratios": (1, 1)})
    for ax, least in zip(axes, (0, 0.01)):
        for kv, pool in ((8, "mean"), (4, "mean"), (2, "mean"), (1, "mean"), (2, "aligned"),
                         (1, "aligned")):
            points = [(a, losses.get(kv, pool, a)) for a in (0, 0.01, 0.05, 0.1) if a >= least]
            points = [(a, v) for a, v in points if v]
            if len(points) < 2:
                continue
            ax.errorbar([a for a, _ in points], [v[0] for _, v in points],
                        [v[1] for _, v in points], capsize=3, color=COLOURS[kv],
                        marker="o", linestyle="-" if pool == "mean" else "--",
                        label=HEADS[kv] + (", aligned" if pool == "aligned" else ""))
        ax.set_xlabel("alpha: uptraining, as a part of the base's steps")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(LOSS)
    axes[0].legend(fontsize="small")
    axes[1].set_title("the same without alpha 0", fontsize="medium")
    plot.save(fig, path)


def curves(path):
    """Losses while uptraining: the first seed of every arm at alpha 0.05."""
    fig, ax = plt.subplots(figsize=(6.5, 4))
    lines = {"mean": "-", "first": ":", "random": "-.", "aligned": "--"}
    for arm in study.arms():
        if arm.seed != 1 or arm.alpha != 0.05 or arm.pool not in lines or not study.rows_of(arm):
            continue
        tokens, loss = plot.curve(study.curve_of(arm))
        ax.plot([t - tokens[0] for t in tokens], loss, lines[arm.pool], marker=".",
                color=COLOURS[arm.kv_heads],
                label=HEADS[arm.kv_heads] + (f", {arm.pool}" if arm.kv_heads < 8 else ""))
    ax.set_xlabel("million tokens of uptraining")
    ax.set_ylabel(LOSS + f"\n({study.EVAL_WINDOWS} windows)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small", handlelength=4)
    plot.save(fig, path)


def decode_rows():
    """{(depth, KV heads): rows}, each with the time of a token, and of reading its bytes alone.

    Every run measures the memory's bandwidth itself; the best of them serves for all.
    """
    path = os.path.join(study.HERE, "curves", "decode.jsonl")
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    limits = [r["roofline"] for r in rows if "roofline" in r]
    bandwidth = max(r["limit"] * 1e9 for r in limits if r["kind"] == "bandwidth")
    out = {}
    for row in sorted(rows, key=lambda r: (r["depth"], r["kv_heads"])):
        row["ms"] = 1e3 / row["tps_mean"]
        row["bytes_ms"] = row["bytes_per_token"] / bandwidth * 1e3
        out.setdefault((row["depth"], row["kv_heads"]), []).append(row)
    return out


def groups(path):
    """The paper's figure 6: time per token against the number of groups."""
    rows = decode_rows()
    fig, ax = plt.subplots(figsize=(6, 4))
    for colour, depth in zip(("tab:blue", "tab:orange", "tab:green"), sorted({d for d, _ in rows})):
        x = [kv for d, kv in rows if d == depth]
        ax.plot(x, [min(r["ms"] for r in rows[depth, kv]) for kv in x], color=colour,
                label=f"after {depth} tokens, fastest run")
        ax.plot([kv for kv in x for _ in rows[depth, kv]],
                [r["ms"] for kv in x for r in rows[depth, kv]], ".", color=colour)
        ax.plot(x, [rows[depth, kv][0]["bytes_ms"] for kv in x], linestyle=":", color=colour,
                label="reading its bytes")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(v) for v in x])
    ax.set_ylim(0)
    ax.set_xlabel("KV heads (of 32 query heads)")
    ax.set_ylabel("ms per generated token")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    plot.save(fig, path)


def loss_table(losses):
    out = ["| model | seeds | alpha 0 | alpha 0.01 | alpha 0.05 | alpha 0.1 | more than MHA at 0.05 |",
           "|---|---|---|---|---|---|---|"]
    for kv in HEADS:
        for pool in POOLS if kv < 8 else ("mean",):
            row = [losses.get(kv, pool, a) for a in (0, 0.01, 0.05, 0.1)]
            if not row[2]:
                continue
            more = losses.difference(kv, pool, 0.05, (8, "mean", 0.05)) if kv < 8 else None
            name = HEADS[kv] + (f", {NAMES.get(pool, pool)}" if kv < 8 else "")
            out.append(f"| {name} | {row[2][2]} | " + " | ".join(map(number, row)) +
                       f" | {number(more, '+')} |")
    return out


def decode_table():
    out = ["| depth | KV heads | runs | ms a token, fastest run | MB a token | reading them, ms |",
           "|---|---|---|---|---|---|"]
    for (depth, kv), rows in decode_rows().items():
        best = min(rows, key=lambda r: r["ms"])
        slowest = max(r["ms"] for r in rows)
        out.append(f"| {depth} | {kv} | {len(rows)} | {best['ms']:.1f} (to {slowest:.1f}) | "
                   f"{best['bytes_per_token'] / 1e6:.0f} | {best['bytes_ms']:.1f} |")
    return out


def write_tables(path, tables):
    """Puts each table between its comments, <!-- NAME --> and <!-- end of NAME -->."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    for name, lines in tables.items():
        first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not end:
            raise SystemExit(f"{path}: no place for the table of {name}")
        text = before + first + "\n".join(lines) + "\n" + end + after
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--docs", default=os.path.join(study.HERE, "../../docs"))
    args = ap.parse_args()
    out = os.path.join(args.docs, "gqa")
    os.makedirs(out, exist_ok=True)
    losses = Losses()
    quality(losses, os.path.join(out, "quality.svg"))
    pooling(losses, os.path.join(out, "pooling.svg"))
    against_alpha(losses, os.path.join(out, "alpha.svg"))
    curves(os.path.join(out, "curves.svg"))
    groups(os.path.join(out, "groups.svg"))
    tables = {"losses": loss_table(losses), "decode": decode_table()}
    write_tables(os.path.join(args.docs, "gqa.md"), tables)
    for lines in tables.values():
        print("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
