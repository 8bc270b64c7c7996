#!/usr/bin/env python3
"""results.py [--failed] FOLDER - what a run of meson's tests found, for ./check.

Reads FOLDER/testlog.json and, of the tests that were run a second time, FOLDER/again.json. Prints
"passed failed skipped"; with --failed, the names of the tests that failed.
"""
import json
import os
import sys


def read(path):
    """The results by name, empty where there is no such file: then no test ran."""
    try:
        with open(path) as f:
            return {test["name"]: test["result"] for test in map(json.loads, f)}
    except FileNotFoundError:
        return {}


def short(name):
    """The name that `meson test` takes: without the project and the suites before it."""
    return name.split(" / ")[-1]


def main():
    folder = sys.argv[-1]
    first = read(os.path.join(folder, "testlog.json"))
    again = read(os.path.join(folder, "again.json"))
    good = ("OK", "EXPECTEDFAIL")
    failed = [n for n, r in first.items() if r not in good and r != "SKIP"]
    if "--failed" in sys.argv[1:-1]:
        print(" ".join(map(short, failed)))
        return
    unstable = [n for n in failed if again.get(n) in good]
    for name in failed:
        if name in unstable:
            print(f"UNSTABLE: {name}: failed ({first[name]}), passed when it was run again", file=sys.stderr)
        else:
            print(f"FAILED: {name} {first[name]}", file=sys.stderr)
    skipped = [n for n, r in first.items() if r == "SKIP"]
    for name in skipped:
        print(f"SKIPPED: {name}", file=sys.stderr)
    n_failed = len(failed) - len(unstable)
    print(len(first) - n_failed - len(skipped), n_failed, len(skipped))


if __name__ == "__main__":
    main()
