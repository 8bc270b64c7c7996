#!/usr/bin/env python3
"""snippets.py PAGE INCLUDE-DIR COMPILER...: compiles every ```c block of a page, all of them together,
as a program outside this tree would: on <gqa/client.h> and libc's headers."""
import re
import subprocess
import sys

HEADERS = ("gqa/client.h", "errno.h", "limits.h", "poll.h", "stdio.h", "stdlib.h", "string.h", "time.h")

page, include_dir, *compiler = sys.argv[1:]
with open(page) as f:
    text = f.read()
source = "".join(f"#include <{h}>\n" for h in HEADERS)
n_blocks = 0
for block in re.finditer(r"^```c\n(.*?)^```$", text, re.M | re.S):
    line = text.count("\n", 0, block.start(1)) + 1
    source += f'#line {line} "{page}"\n{block.group(1)}'
    n_blocks += 1
if n_blocks == 0:
    sys.exit(f"{page}: no block of C")
sys.exit(subprocess.run([*compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unused-function",
                         "-I", include_dir, "-fsyntax-only", "-x", "c", "-"], input=source.encode()).returncode)
