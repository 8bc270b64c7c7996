#!/usr/bin/python3
"""Draw curves/*.jsonl: held-out loss against tokens, all and the uptraining."""
import json
import os

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt

RUNS = [("base", "MHA, 8 KV heads (base)"), ("mha-more", "MHA, the same steps more"),
        ("gqa", "GQA, 2 KV heads: converted, then uptrained")]


def curve(path):
    """(million tokens, held-out loss) of a file's rows.

    Points of the curve are over some windows; the ends over all of them would
    not be comparable with those, and are left to the tables.
    """
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    small = min(r["windows"] for r in rows)
    rows = [r for r in rows if r["windows"] == small]
    return [r["tokens"] / 1e6 for r in rows], [r["heldout"] for r in rows]


def save(fig, path):
    """As SVG or PNG, by the name; the same file each time."""
    matplotlib.rcParams.update({"svg.hashsalt": "gqad", "svg.fonttype": "none"})
    fig.tight_layout()
    svg = os.path.splitext(path)[1] == ".svg"
    fig.savefig(path, dpi=150, metadata={"Date": None} if svg else None)
    plt.close(fig)


def draw(path, runs):
    """runs: [(curve's file, label)] in one picture."""
    fig, ax = plt.subplots(figsize=(6, 4))
    for file, label in runs:
        ax.plot(*curve(file), marker=".", label=label)
    ax.set_xlabel("million tokens")
    ax.set_ylabel("held-out loss, nats a token")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    save(fig, path)


def main():
    fig, (whole, end) = plt.subplots(1, 2, figsize=(10, 4))
    for name, label in RUNS:
        x, y = curve(f"curves/{name}.jsonl")
        whole.plot(x, y, label=label)
        end.plot(x, y, label=label, marker="." if name != "base" else None)
        if name == "gqa":
            end.set_xlim(x[0] - (x[-1] - x[0]), x[-1] + 0.02)
    with open("curves/base.jsonl") as f:
        last = [json.loads(line)["heldout"] for line in f][-8:]
    end.set_ylim(min(last) - 0.25, max(last) + 0.35)
    for ax in (whole, end):
        ax.set_xlabel("million tokens")
        ax.grid(alpha=0.3)
    whole.set_ylabel("held-out loss, nats a token")
    whole.legend(loc="lower left", fontsize="small")
    end.set_title("the end, enlarged")
    save(fig, "curves/loss.svg")


if __name__ == "__main__":
    main()
