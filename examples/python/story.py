#!/usr/bin/env python3
"""story.py MODEL PROMPT: prints what the model writes, as it comes; Ctrl-C ends it early.

Run from this folder, or with it in PYTHONPATH. The daemon is found as gqa finds it (GQA_SOCKET).
"""
import sys

import gqa


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: story.py MODEL PROMPT")
    model, prompt = sys.argv[1:]
    try:
        with gqa.connect() as daemon, daemon.generate(model, prompt, n_predict=256, temperature=0.7) as story:
            try:
                for piece in story:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                story.cancel()
                print(story.read(), end="")  # what was made until then
            print(f"\n[{story.result['finish']}: {story.result['n_generated']} tokens, "
                  f"{len(daemon.tokenize(model, prompt))} in the prompt]")
    except gqa.Error as e:
        sys.exit(f"story.py: {e}")


if __name__ == "__main__":
    main()
