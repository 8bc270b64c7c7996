#!/usr/bin/env python3
"""Checks the units with systemd-analyze: verify UNITS..., or security UNIT with a threshold.

The units name the installed daemon, which need not exist where they are checked: they are copied
to a folder of their own, with a program that does exist in its place. Ends with 77 ("skipped", and
says so) where systemd-analyze is missing."""
import os
import re
import shutil
import subprocess
import sys
import tempfile


# What would take from the daemon what it needs, and says nothing when it is gone.
HARMFUL = {
    "ProcSubset=pid": "hides /proc/sys/kernel/random/boot_id: no backend's self-test would be remembered",
}


def harm(name, text):
    found = [f"{name}: {key} {why}" for key, why in HARMFUL.items() if re.search(rf"^{key}$", text, re.M)]
    for line in found:
        print(line)
    return bool(found)


def main():
    mode, paths = sys.argv[1], sys.argv[2:]
    tool = shutil.which("systemd-analyze")
    if tool is None:
        print("SKIPPED: no systemd-analyze here, the units were NOT checked")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        harmed = False
        for path in paths:
            with open(path) as f:
                text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", f.read(), flags=re.M)
            harmed |= harm(path, text)
            copies.append(os.path.join(folder, os.path.basename(path)))
            with open(copies[-1], "w") as f:
                f.write(text)
        if mode == "security":
            command = [tool, "security", "--offline=yes", "--threshold=6", "--no-pager", copies[0]]
        else:
            command = [tool, "verify", "--man=no", "--recursive-errors=no"]
            command += ["--user"] if mode == "verify-user" else []
            command += copies
        environment = dict(os.environ, XDG_RUNTIME_DIR=folder)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = done.stdout + done.stderr
    print(output)
    # verify ends with 0 for keys that it does not know; it only says so.
    failed = done.returncode != 0 or "nknown" in output or harmed
    print("FAILED" if failed else f"ok: {mode} {' '.join(os.path.basename(p) for p in paths)}")
    return 1 if failed else 0


sys.exit(main())
