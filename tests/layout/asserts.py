#!/usr/bin/env python3
"""Asserts that cannot fail as they read.

criterion 2.4.1 takes gt(T, a, b) for a >= b in C, so that gt(u32, n, 0) always holds. lt(T, b, a)
says what is meant. Prints each offence as file:line and ends with status 1 if there is one."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
GREATER = re.compile(r"\bgt\(\w+,")


def main():
    offences = files = 0
    for path in sorted((ROOT / "tests").rglob("*.[ch]")):
        files += 1
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if GREATER.search(line):
                offences += 1
                print(f"{path.relative_to(ROOT)}:{number}: gt() holds for equals too: use lt()")
    print(f"{files} files, {offences} asserts that say less than they seem to")
    return 1 if offences or files == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
