#!/usr/bin/python3
"""Draw curves/*.jsonl: held-out loss against tokens, all and the uptraining."""
import json

import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt

RUNS = [("base", "MHA, 8 KV heads (base)"), ("mha-more", "MHA, the same steps more"),
        ("gqa", "GQA, 2 KV heads: converted, then uptrained")]


def main():
    matplotlib.rcParams["svg.hashsalt"] = "gqad"   # the same file each time
    fig, (whole, end) = plt.subplots(1, 2, figsize=(10, 4))
    for name, label in RUNS:
        with open(f"curves/{name}.jsonl") as f:
            rows = [json.loads(line) for line in f]
        # Points of the curve are over 64 windows; the ends over all of them
        # would not be comparable with those, and are left to the tables.
        small = min(r["windows"] for r in rows)
        x = [r["tokens"] / 1e6 for r in rows if r["windows"] == small]
        y = [r["heldout"] for r in rows if r["windows"] == small]
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
    fig.tight_layout()
    fig.savefig("curves/loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
