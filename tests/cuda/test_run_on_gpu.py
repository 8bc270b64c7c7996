#!/usr/bin/env python3
"""run-on-gpu.sh on a machine that has only gcc, make and CUDA: from a copy of the sources that it needs, in a
folder with spaces, with nothing else on the PATH and nvcc not where it usually is. Headers of packages that such
a machine need not have are an error. What it builds then runs on the emulated GPU."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NVCC = os.environ["GQAD_TEST_NVCC"]
EMULATED = os.environ.get("GQAD_TEST_EMULATED", "")
SOURCES = ["format", "plugins", "tests/cuda", "tools/plugin-check"]
TOOLS = ["bash", "sh", "dirname", "mkdir", "make", "nproc", "tail", "sed", "uname", "find", "gcc", "as", "ld",
         "sleep", "cat", "rm", "g++", "echo"]  # the last two: nvcc's
# Headers of libc and of compilers: all else that is included must be of the tree, or of CUDA.
SYSTEM = ("/usr/include/", "/usr/lib/gcc/")
LIBC = ("bits/", "sys/", "gnu/", "asm/", "asm-generic/", "linux/")
LIBC_FILES = {"alloca.h", "argp.h", "assert.h", "cpuid.h", "ctype.h", "dlfcn.h", "endian.h", "errno.h", "fcntl.h",
              "features.h", "features-time64.h", "getopt.h", "inttypes.h", "libgen.h", "limits.h", "locale.h", "malloc.h",
              "math.h", "memory.h", "pthread.h", "sched.h", "signal.h", "stdc-predef.h", "stdint.h", "stdio.h",
              "stdlib.h", "string.h", "strings.h", "time.h", "unistd.h", "wchar.h"}


def included(folder):
    """All files that the compiler read, by its own lists."""
    for path in folder.rglob("*.d"):
        words = path.read_text().replace("\\\n", " ").replace("\\ ", "\0").split()
        yield from (w.replace("\0", " ") for w in words if not w.endswith(":"))


@unittest.skipUnless(os.environ.get("GQAD_TEST_LONG"), "SKIPPED: GQAD_TEST_LONG=1 compiles all kernels anew")
class RunOnGpu(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="gqad test ")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.tree = self.folder / "a copy of it"
        for name in SOURCES:
            shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        tools = self.folder / "tools"
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(shutil.which(name))
        nvcc = tools / "nvcc"  # as ccache, or an administrator, puts one
        nvcc.write_text(f'#!/bin/sh\nexec "{NVCC}" "$@"\n')
        nvcc.chmod(0o755)
        self.environment = {"PATH": str(tools), "HOME": str(self.folder), "TMPDIR": str(self.folder),
                            "LANG": "C"}

    def script(self, *parts, **more):
        return subprocess.run([str(self.tree / "tests/cuda/run-on-gpu.sh"), *parts], env=self.environment | more,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")

    def check_includes(self):
        foreign, libc = set(), set()
        for name in included(self.tree / "build"):
            rest = next((name[len(s):] for s in SYSTEM if name.startswith(s)), None)
            if rest is None or name.startswith("/usr/lib/gcc/"):
                continue
            rest = rest.removeprefix("x86_64-linux-gnu/").removeprefix("aarch64-linux-gnu/")
            if not rest.startswith(LIBC) and rest not in LIBC_FILES:
                foreign.add(name)
            else:
                libc.add(rest)
        self.assertIn("stdio.h", libc)
        self.assertEqual(foreign, set())

    def test_it_builds_and_says_what_it_could_not_run(self):
        self.assertEqual(self.script(B="build/a b").returncode, 2)
        without = self.script(NVCC="/nowhere/nvcc")
        self.assertEqual(without.returncode, 2, without.stdout)
        self.assertIn('no CUDA: "/nowhere/nvcc"', without.stdout)

        result = self.script()
        print(result.stdout)
        self.assertIn(result.returncode, (0, 77), result.stdout)
        if result.returncode == 77:
            self.assertIn("NO GPU", result.stdout)
            self.assertIn("Not run, for want of a GPU: floors conform program experts adapters graphs cublaslt bench "
                          "sanitizer racecheck sanitizer-experts racecheck-experts sanitizer-adapters racecheck-adapters",
                          result.stdout)
        log = (self.tree / "build/gpu/out/build.txt").read_text()
        self.assertNotIn("warning:", log)
        self.check_includes()
        if EMULATED:
            self.run_on_the_emulated_gpu()

    def run_on_the_emulated_gpu(self):
        """Some parts; what cannot be run and what takes too long; and the rest when it is called again."""
        emulated = {"LD_LIBRARY_PATH": EMULATED, "BENCH_FLAGS": "--tiny"}
        result = self.script("floors", "graphs", "cublaslt", "sanitizer", **emulated)
        print(result.stdout)
        summary = (self.tree / "build/gpu/out/summary.txt").read_text()
        self.assertEqual(result.returncode, 3, result.stdout)
        for part in ("floors", "graphs"):
            self.assertIn(f"right    {part} (", summary)
        self.assertRegex(summary, "(right|NOT RUN)  *cublaslt")
        self.assertIn("NOT RUN  conform", summary)
        if not os.path.exists(os.path.join(os.path.dirname(NVCC), "compute-sanitizer")):
            self.assertIn("NOT RUN  sanitizer", summary)
        shares = [line for line in summary.splitlines() if "wanted" in line]
        # Two of attention, three of each of two models, and one of cuBLASLt where it is.
        self.assertEqual(len(shares), 8 if "NOT MEASURED" in summary else 9, summary)
        lines = json.loads((self.tree / "build/gpu/out/floors.json").read_text())["lines"]
        self.assertEqual(sum(line["wanted"] > 0 for line in lines), len(shares))

        result = self.script("conform", BUDGET_S="20", **emulated)
        self.assertEqual(result.returncode, 3, result.stdout)
        self.assertIn("STOPPED  conform", result.stdout)
        self.assertIn("right    floors (", result.stdout)  # is remembered
        result = self.script(BUDGET_S="6", **emulated)
        self.assertIn("NOT RUN: its turn is when this is called again", result.stdout)
        result = self.script("what", **emulated)
        self.assertEqual(result.returncode, 2)
        self.assertIn("what: no part; there are floors conform", result.stdout)
        built = self.tree / "build/gpu"
        for check in ("check-program", "check-experts", "check-adapters"):
            subprocess.run([built / check, built / "cpu.so", built / "cuda.so"], check=True,
                           env=self.environment | {"LD_LIBRARY_PATH": EMULATED})


if __name__ == "__main__":
    unittest.main(verbosity=2)
