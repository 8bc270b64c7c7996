#!/usr/bin/env python3
"""gqa-plugin-check's whole matrix on the emulated GPU: every family is run and right, and what is not run is what
the cuda backend says that it has not, caches of float32. Some minutes, so with GQAD_TEST_LONG=1 only; test
cuda-conform runs the families of attention that are quick."""
import json
import os
import subprocess
import unittest

CHECK = os.environ["GQAD_TEST_CHECK"]
CUDA = os.environ["GQAD_TEST_CUDA"]
EMULATED = os.environ["GQAD_TEST_EMULATED"]
# The types that are refused: F32 is one of five of K and V.
REFUSED = "K is F16, BF16, Q8_0 or Q4_0 here, not of type: 0"


@unittest.skipUnless(os.environ.get("GQAD_TEST_LONG"), "SKIPPED: GQAD_TEST_LONG=1 runs the whole matrix")
class Conform(unittest.TestCase):
    def test_the_whole_matrix(self):
        done = subprocess.run([CHECK, "--json", "--timeout", "1700", CUDA], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"LD_LIBRARY_PATH": EMULATED})
        told = json.loads(done.stdout)
        for f in told["matrix"]:
            print(f"{f['interface']:<16} {f['family']:<48} {f['run']:4} run {f['not_supported']:4} not supported  "
                  f"{f['error']:.3g} of {f['tolerance']:.3g}")
        self.assertEqual((done.returncode, told["verdict"]), (0, "passed"), told.get("reason"))
        self.assertEqual(set(told["attention"]), {"shared", "sparse", "tree", "no_commit", "observe", "mutual"})
        for f in told["matrix"]:
            self.assertEqual(f["verdict"], "ok", f)
            if f["not_supported"] > 0:
                self.assertEqual((f["interface"], f["why"]), ("gqa.attention.0", REFUSED), f)
        self.assertEqual(sum(f["interface"] == "gqa.program.0" for f in told["matrix"]), 15)
        self.assertEqual(sum(f["interface"] == "gqa.attention.0" for f in told["matrix"]), 13)


if __name__ == "__main__":
    unittest.main(verbosity=2)
