#!/usr/bin/env python3
"""Who may include whom: greps every #include against the table of docs/architecture.md.

Prints each offence as file:line and ends with status 1 if there is one."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')

# Folder -> prefixes of our own headers that its files may include. The longest folder wins.
ALLOWED = {
    "format": ["format/"],
    "ipc": ["ipc/"],
    "client": ["ipc/", "client/", "gqa/client.h"],
    "client/cli": ["client/cli/", "gqa/client.h"],
    "plugins/include": ["gqa/tensor.h", "gqa/plugin.h", "gqa/host_x86.h"],
    "plugins/common": ["plugins/common/", "gqa/tensor.h", "gqa/plugin.h", "format/"],
    "plugins/cpu": ["plugins/cpu/", "plugins/common/", "gqa/tensor.h", "gqa/plugin.h", "format/"],
    "plugins/cuda": ["plugins/cuda/", "plugins/common/", "gqa/tensor.h", "gqa/plugin.h",
                     "format/"],
    "daemon": ["daemon/", "ipc/", "format/", "gqa/tensor.h", "gqa/plugin.h", "gqa/host_x86.h"],
    "tools": ["tools/", "format/", "plugins/cpu/", "gqa/"],
    "examples": ["gqa/"],
    "tests": ["tests/", "daemon/", "ipc/", "format/", "client/", "plugins/", "tools/", "gqa/"],
}

# Whoever tells a share of what the machine can do measures that there.
for folder in ("client/cli", "tools", "roofline", "tests"):
    ALLOWED.setdefault(folder, []).append("roofline/")

# Inside the daemon: a layer may include itself and the ones below it; news travels up by callback.
LAYERS = [
    ["daemon/main", "daemon/process"],
    ["daemon/server"],
    ["daemon/peer"],
    ["daemon/handlers"],
    ["daemon/sched/"],
    ["daemon/request", "daemon/area"],
    ["daemon/model/"],
    ["daemon/kv/", "daemon/backend/"],
    ["daemon/io/"],
]
# Seen from everywhere in the daemon.
COMMON = ["daemon/log.h"]
# The outer layers (main to handlers) share the settings and the host's notifications.
OUTER_COMMON = ["daemon/config", "daemon/options", "daemon/penalty", "daemon/quota", "daemon/stats", "daemon/notify",
                "daemon/task_queue"]

# Library header -> the only places that may include it.
LIBRARIES = {
    "uv.h": ["daemon/main", "daemon/server", "daemon/peer", "examples/async/uv", "tests/"],
    "liburing.h": ["daemon/io/"],
    "msgpack": ["ipc/codec", "tests/"],
    "confuse.h": ["daemon/config"],
    "pcre2.h": ["daemon/model/tokenizer"],
    "utf8proc.h": ["daemon/model/tokenizer_wordpiece"],
    "jansson.h": ["client/cli/", "daemon/model/grammar_schema", "tools/convert/",
                  "tools/plugin-check/", "tests/"],
    "curses.h": ["client/cli/top_screen"],
    "systemd/": ["daemon/log", "daemon/notify", "daemon/server"],
    "argp.h": ["daemon/", "client/cli/", "tools/", "tests/"],
}


def layer_of(name):
    for i, prefixes in enumerate(LAYERS):
        if any(name.startswith(p) for p in prefixes):
            return i
    return None


def check_layers(name, included):
    """A sentence about an include that points upwards inside the daemon, or None."""
    if any(included.startswith(c) for c in COMMON):
        return None
    here, there = layer_of(name), layer_of(included)
    if here is None:
        return None
    if there is None:
        outer = here <= layer_of("daemon/handlers")
        known = any(included.startswith(c) for c in OUTER_COMMON)
        return None if outer and known else f"{included} is not of a layer that it may know"
    return f"{included} is a layer above" if there < here else None


def check_line(name, quote, included):
    for library, places in LIBRARIES.items():
        if included.startswith(library) and not any(name.startswith(p) for p in places):
            return f"<{included}> belongs to {', '.join(places)}"
    if quote == "<" and not included.startswith("gqa/"):
        return None
    folder = max((f for f in ALLOWED if name.startswith(f + "/")), key=len, default=None)
    if folder is None:
        return None
    if quote == '"' and "/" not in included:
        if folder in ("tests", "examples"):
            return None  # helpers of one folder; an example compiles wherever its folder is copied to
        return f'"{included}": our own headers are named by their path from the root'
    if not any(included.startswith(p) for p in ALLOWED[folder]):
        return f"{folder}/ may not include {included}"
    if name.startswith("daemon/") and included.startswith("daemon/"):
        return check_layers(name, included)
    return None


def main():
    offences = files = 0
    for folder in sorted({f.split("/")[0] for f in ALLOWED}):
        for path in sorted((ROOT / folder).rglob("*.[ch]")):
            files += 1
            name = str(path.relative_to(ROOT))
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                match = INCLUDE.match(line)
                problem = check_line(name, *match.groups()) if match else None
                if problem:
                    offences += 1
                    print(f"{name}:{number}: {problem}")
    print(f"{files} files, {offences} includes out of place")
    return 1 if offences or files == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
