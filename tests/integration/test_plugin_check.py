#!/usr/bin/env python3
"""gqa-plugin-check as people and scripts run it: every way in which a fixture is wrong, told in words."""
import json
import os
import subprocess
import unittest

from harness import main

CHECK = os.environ["GQAD_TEST_CHECK"]
PLUGINS = os.environ["GQAD_TEST_PLUGINS"]
CPU = os.environ["GQAD_TEST_CPU"]
PASSED, WRONG, UNUSABLE, USAGE = 0, 1, 2, 64


def fixture(name):
    return os.path.join(PLUGINS, name + ".so")


def run(*arguments):
    return subprocess.run([CHECK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class PluginCheck(unittest.TestCase):
    def test_version(self):
        done = run("--version")
        self.assertEqual((done.returncode, done.stderr), (PASSED, ""))
        self.assertRegex(done.stdout, r"^gqa-plugin-check \d+\.\d+\.\d+\n$")

    def document(self, status, *arguments):
        done = run("--json", *arguments)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return json.loads(done.stdout)

    def test_what_is_wrong_is_told(self):
        for name, words in (("crash_constructor", "crashed with signal 11 (Segmentation fault) in loading"),
                                     ("crash_probe", "crashed with signal 11 (Segmentation fault) in probe"),
                                     ("no_symbol", "no symbol gqa_plugin of ABI 1"),
                                     ("incomplete", "it has no complete gqa.attention.0"),
                                     ("quits", "the plugin ended the process in self-test 'one token, multi-head, f32', status 0"),
                                     ("wrong", "': wrong by 0.0"),
                                     ("nan", "': wrong by inf"),
                                     ("chunky", "other bits than the same rows gave alone")):
            told = self.document(WRONG, fixture(name))
            self.assertEqual(told["verdict"], "refused", name)
            self.assertIn(words, told["reason"])
        told = self.document(WRONG, fixture("idle_program"))
        self.assertIn("norm, linear, glu, F32: wrong by", told["reason"])
        self.assertEqual((told["selftest"][-1]["name"], told["selftest"][-1]["verdict"]), ("norm, linear, glu, F32", "wrong"))
        self.assertIn("cannot open shared object", self.document(WRONG, "/nonexistent.so")["reason"])

    def test_a_name_without_a_folder_is_a_file_here(self):
        done = subprocess.run([CHECK, "--selftest", "good.so"], cwd=PLUGINS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, PASSED, done.stderr)

    def test_one_that_hangs_is_given_up(self):
        for name, phase in (("hang_probe", "probe"), ("hang_silent", "probe"), ("slow", "self-test '.*'")):
            told = self.document(WRONG, "--timeout", "1", fixture(name))
            self.assertEqual(told["verdict"], "refused")
            self.assertRegex(told["reason"], f"^{phase} did not end within 1 s$")

    def test_one_that_says_no_is_no_failure_of_ours(self):
        told = self.document(UNUSABLE, fixture("unusable"))
        self.assertEqual((told["verdict"], told["reason"]), ("unusable", "needs a machine of the year 2040"))

    def test_threads_that_stay_are_counted(self):
        told = self.document(PASSED, "--selftest", fixture("leaks_thread"))
        self.assertGreater(told["threads_left"], 0)
        self.assertEqual(self.document(PASSED, "--selftest", fixture("good"))["threads_left"], 0)

    def test_what_it_cannot_do_is_not_supported(self):
        told = self.document(PASSED, fixture("good"))
        self.assertEqual((told["verdict"], told["interfaces"], told["attention"]), ("passed", ["gqa.attention.0"], []))
        families = {f["family"]: f for f in told["matrix"]}
        self.assertEqual(families["same bits, with a shared prefix"]["verdict"], "not supported")
        types = families["KV types, plain, windowed, capped, sinks"]
        self.assertEqual((types["run"], types["not_supported"]), (4, 36))  # float32 without sinks
        self.assertEqual(families["views: sinks, recent, dropped, turned"]["why"], "its caps are without GQA_ATTN_CAP_SPARSE")
        self.assertNotEqual(types["why"], "")
        self.assertEqual({f["interface"] for f in told["matrix"]}, {"gqa.attention.0"})

    def test_the_document_of_a_backend_with_all(self):
        told = self.document(PASSED, CPU)
        self.assertEqual((told["file"], told["name"], told["usable"], told["devices"]), (CPU, "cpu", 1, 0))
        self.assertIn("c", told["isas"])
        self.assertTrue(all(c["verdict"] == "ok" and c["error"] < 5e-4 and c["why"] == "" for c in told["selftest"]))
        for f in told["matrix"]:
            self.assertEqual((f["verdict"], f["not_supported"]), ("ok", 0), f)
            self.assertGreater(f["run"], 0)
            self.assertLessEqual(f["error"], f["tolerance"])
        names = [f["family"] for f in told["matrix"] if f["interface"] == "gqa.program.0"]
        self.assertEqual(names[:10], ["norm", "linear, every type", "logits of some rows", "rope", "glu",
                                      "add, scale, softcap", "embed, every type", "experts", "adapters", "a chain of ops"])

    def test_the_lines_of_the_daemon_end_with_a_verdict(self):
        done = run("--report", fixture("good"))
        self.assertEqual(done.returncode, PASSED)
        self.assertEqual(done.stdout.splitlines()[-1], "verdict=done")
        self.assertNotIn("matrix", done.stdout)

    def test_arguments(self):
        for arguments in ((), ("a.so", "b.so"), ("--threads", "0", "a.so"), ("--timeout", "x", "a.so"), ("--what", "a.so")):
            self.assertEqual(run(*arguments).returncode, USAGE, arguments)

    def test_a_bench_has_rates_and_limits(self):
        told = self.document(PASSED, "--bench", "--threads", "1", fixture("good"))
        self.assertEqual(len(told["bench"]), 2)  # float32: decode, prefill
        for line in told["bench"]:
            self.assertGreater(line["rate"], 0)
            self.assertGreater(line["limit"], 0)
            self.assertAlmostEqual(line["share"], line["rate"] / line["limit"], places=5)
            self.assertGreater(line["us"], 0)
        self.assertEqual([line["unit"] for line in told["bench"]], ["GB/s", "GFLOP/s"])


if __name__ == "__main__":
    main()
