"""gqa bench, whatever the times are: it ends well, and says what scripts rely on."""
import os
import re
import xml.etree.ElementTree

from cli import Tool, ToolCase
from harness import GQAD, main, synth

BENCH_KEYS = {"model", "backend", "isa", "threads", "test", "depth", "streams", "tps_mean", "tps_sd",
              "bytes_per_token", "flops_per_token", "roofline"}
KV_KEYS = {"ttft_cold_ms", "ttft_again_ms", "ttft_restart_ms", "ttft_kill_ms", "decode_step_ms", "n_prompt", "n_left",
           "tail_ms", "ratio_again", "ratio_restart", "ratio_kill", "speedup", "prefix_shared", "store",
           "store_overhead"}
IPC_KEYS = {"test", "transport", "wait", "bytes", "n", "p50_us", "p99_us", "gb_per_s"}


class Bench(ToolCase):
    @classmethod
    def make_models(cls, folder):
        synth(os.path.join(folder, "q8.gguf"), "tiny", "q8_0")

    def bench(self, *arguments):
        return self.gqa("bench", "-m", "q8", "-p", 32, "-n", 8, "-r", 1, *arguments)

    def test_rows_in_every_format(self):
        rows = self.bench("-o", "json", "-d", 16, "-npl", "1,2").json
        self.assertEqual([(r["test"], r["depth"], r["streams"]) for r in rows],
                         [("pp32", 16, 1), ("tg8", 16, 1), ("pp32", 16, 2), ("tg8", 16, 2)])
        for r in rows:
            self.assertEqual(set(r), BENCH_KEYS)
            self.assertEqual(set(r["roofline"]), {"kind", "limit", "share", "bandwidth"})
            self.assertIn(r["roofline"]["kind"], ("bandwidth", "compute"))
            self.assertTrue(all(x > 0 for x in (r["tps_mean"], r["bytes_per_token"], r["flops_per_token"],
                                                r["roofline"]["limit"], r["roofline"]["share"])), r)
            self.assertEqual(r["threads"], 1)
        head, rule, *rows = self.bench("-o", "md").text.splitlines()
        self.assertEqual([c.strip() for c in head.split("|")[1:8]],
                         ["model", "size", "params", "backend", "threads", "test", "t/s"])
        self.assertEqual([r.split("|")[6].strip() for r in rows], ["pp32", "tg8"])

    def test_a_daemon_of_its_own_has_a_place_for_every_stream(self):
        """Or they would run one batch after the other, and be told as if side by side."""
        told, recorder = self.path("told"), self.path("recorder")
        with open(recorder, "w") as f:
            f.write(f'#!/bin/sh\necho "$*" > {told}\nexec {GQAD} "$@"\n')
        os.chmod(recorder, 0o700)
        own = Tool(self.folder.path, "--spawn", "-t", 1)
        for streams, places in (("2,40,3", "-np 40"), ("1", "")):
            row = own("bench", "-m", self.path("models/q8.gguf"), "-p", 0, "-n", 2, "-r", 1, "-o", "json", "-npl", streams,
                      variables={"GQAD_PATH": recorder}).json[0]
            self.assertEqual(row["streams"], int(streams.split(",")[0]))
            with open(told) as f:
                self.assertEqual(" ".join(re.findall(r"-np \d+", f.read())), places)

    def test_comma_separated_and_lines(self):
        head, *rows = self.gqa("bench", "-m", "q8", "-p", 0, "-n", 8, "-r", 1, "-o", "csv").text.splitlines()
        self.assertEqual([len(r.split(",")) for r in rows], [len(head.split(","))])
        self.assertEqual(head.split(",")[-1], "kv_heads")
        self.assertGreater(int(rows[0].split(",")[-1]), 0)
        row, = self.gqa("bench", "-m", "q8", "-p", 16, "-n", 0, "-r", 2, "-o", "jsonl").lines
        self.assertEqual(set(row), BENCH_KEYS)

    def test_time_of_each_op(self):
        # A daemon of its own: the context of the others' model is as short as their tests.
        own = Tool(self.folder.path, "--spawn", "-t", 1)
        model = self.path("models/q8.gguf")
        rows = own("bench", "-m", model, "-p", 32, "-n", 8, "-r", 1, "-o", "json", "-d", "0,128", "-npl", "1,2",
                   "--ops").json
        self.assertEqual(len(rows), 8)
        for r in rows:
            self.assertEqual(set(r), BENCH_KEYS | {"ops"})
            ops = {o["kind"]: o for o in r["ops"]}
            self.assertLessEqual({"linear", "attention", "norm", "rope", "glu", "add", "embed"}, set(ops))
            self.assertEqual(sorted((o["ms"] for o in r["ops"]), reverse=True), [o["ms"] for o in r["ops"]])
            self.assertAlmostEqual(sum(o["share"] for o in r["ops"]), 1, places=6)
            self.assertGreater(ops["linear"]["gb_per_s"], 0)
            if r["test"] == "tg8" and r["streams"] == 1:  # the context before the test is not among them
                self.assertLess(ops["embed"]["rows"], 128)
        text = self.bench("--ops").text
        self.assertIn("of bandwidth", text)
        self.assertRegex(text, r"\| tg8 +\| +calls")

    def test_many_users_at_once(self):
        load = ("bench", "serve", "-m", "q8", "-p", "8-16", "-n", "4-6", "--duration", 1, "--seed", 3)
        r = self.gqa(*load, "--processes", 2, "--concurrency", 3, "--prefix", 8, "--json").json
        self.assertGreater(r["requests"], 1)
        self.assertEqual((r["failed"], r["ttft_ms"]["count"]), (0, r["requests"]))
        self.assertTrue(0 < r["ttft_ms"]["p50"] <= r["ttft_ms"]["p90"] <= r["ttft_ms"]["p99"])
        self.assertGreaterEqual(r["inter_token_ms"]["count"], 3 * r["requests"])
        self.assertEqual(([u["uid"] for u in r["users"]], r["jain"]), ([os.getuid()], 1))
        r = self.gqa(*load, "--rate", 50, "--json").json
        self.assertEqual(r["failed"], 0)
        self.assertGreater(r["generated_tokens_per_second"], 0)
        self.gqa(*load, "--processes", 0, status=64)
        self.refused("bench", "serve", "-m", "q8", "--concurrency", 1000, words=["--concurrency", "256"], status=64)
        own = Tool(self.folder.path, "--spawn", "-t", 1)
        model = self.path("models/q8.gguf")
        r = own("bench", "serve", "-m", model, "--streams", 2, "--long", 64, "--json").json
        self.assertEqual((r["n_streams"], r["one"]["whole_ratio"]), (2, 1))
        self.assertTrue(all(r[k]["whole_tps"] > 0 for k in ("one", "streams", "streams_shared")))
        self.assertGreater(r["long_prompt"]["worst_gap_ms"], 0)

    def test_time_against_the_number_of_groups(self):
        home = self.path("groups")
        os.mkdir(home)
        bench = Tool(home, "--spawn", "-t", 1)
        rows = bench("bench", "-m", "tiny", "--kv-heads", "1,2,4", "-p", 0, "-n", 4, "-d", "0,64", "-r", 1,
                     "-o", "json", "--plot", "p.svg").json
        self.assertEqual([(r["kv_heads"], r["test"], r["depth"]) for r in rows],
                         [(h, "tg4", d) for h in (1, 2, 4) for d in (0, 64)])
        self.assertTrue(all(set(r) == BENCH_KEYS | {"kv_heads"} for r in rows))
        kv = {r["kv_heads"]: r["bytes_per_token"] for r in rows if r["depth"] == 64}
        self.assertTrue(kv[1] < kv[2] < kv[4])
        svg = xml.etree.ElementTree.parse(os.path.join(home, "p.svg")).getroot()
        tag = "{http://www.w3.org/2000/svg}"
        self.assertEqual(len(svg.findall(f".//{tag}polyline")), 2)  # a line for each depth
        self.assertEqual([len(p.get("points").split()) for p in svg.findall(f".//{tag}polyline")], [3, 3])
        texts = [t.text for t in svg.findall(f".//{tag}text")]
        for text in ("tg4", "tg4 @ d64", "KV heads (groups)", "ms per token and stream", "1", "2", "4"):
            self.assertIn(text, texts)
        left = [n for n in os.listdir(home) if n not in ("gqad", "p.svg")]
        self.assertEqual(left, [])
        bench("bench", "-m", "no-such-shape", "--kv-heads", 1, status=1)

    def test_pictures(self):
        svg = self.path("p.svg")
        self.bench("--plot", svg, "-npl", "1,2", "-o", "jsonl")
        root = xml.etree.ElementTree.parse(svg).getroot()
        texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
        self.assertEqual(texts.count("tokens per second"), 2)  # prompts, generation
        self.assertEqual(texts.count("streams"), 2)
        self.refused("bench", "-m", "q8", "-p", 0, "-n", 4, "-r", 1, "-o", "jsonl", "--plot", "/absent/p.svg",
                     words=["/absent/p.svg"], status=73)

    def test_starts(self):
        model = self.path("models/q8.gguf")
        bench = Tool(self.folder.path, "--cache-dir", self.path("own"), "-t", 1)
        rows = bench("bench", "start", "--json", "-m", model, "-r", 2).json
        self.assertEqual([(r["weights"], r["n"]) for r in rows], [("packed", 2), ("file", 2)])
        for r in rows:
            self.assertEqual(set(r), {"weights", "n", "serves_ms", "load_ms", "ready_ms", "ready_ms_max",
                                      "first_token_ms"})
            self.assertTrue(0 < r["serves_ms"] <= r["ready_ms"] <= r["first_token_ms"], r)
        self.assertIn("ready ms", bench("bench", "start", "-m", model, "-r", 1).text)

    def test_calls(self):
        rows = self.gqa("bench", "ipc", "-n", 20, "--json").json
        self.assertTrue(all(set(r) - {"of_bare"} == IPC_KEYS for r in rows))
        # Empty calls are compared with a bare waking after the same pause, of the same run.
        p50 = {(r["test"], r["transport"], r["wait"]): r["p50_us"] for r in rows if r["bytes"] == 0}
        for call, bare in ((("socket", ""), ("socket", "")), (("socket", "asleep"), ("socket", "asleep")),
                           (("ring", "asleep"), ("eventfd", "asleep")), (("ring", "futex"), ("eventfd", ""))):
            of_bare = [r["of_bare"] for r in rows if (r["test"], r["transport"], r["wait"], r["bytes"]) == ("ping", *call, 0)]
            self.assertEqual(len(of_bare), 1)
            self.assertAlmostEqual(of_bare[0], p50["ping", *call] / p50["waking", *bare], places=6)
        self.assertIn(("ping", "socket", 0), [(r["test"], r["transport"], r["bytes"]) for r in rows])
        self.assertIn("p50 us", self.gqa("bench", "ipc", "-n", 5).text)

    def test_the_cache_over_restarts(self):
        """What must be so whatever the times are: it ends well, and says what scripts rely on."""
        model = self.path("models/tiny.gguf")
        bench = Tool(self.folder.path, "--cache-dir", self.folder.path, "-t", 1)
        j = bench("bench", "kv", "--json", "-m", model, "-p", 200, "-r", 1).json
        self.assertEqual(set(j), KV_KEYS)
        self.assertEqual((j["n_prompt"], j["n_left"]), (200, 200 - 192))
        shared = j["prefix_shared"]
        self.assertEqual((shared["n_requests"], shared["tokens_if_separate"]), (8, 8 * 2050))
        # All of one prompt, and of the others what no whole block of the prefix holds.
        self.assertLessEqual(shared["tokens_computed"], 2050 + 7 * (2050 - 1984))
        self.assertGreaterEqual(shared["tokens_computed"], 2050 + 7 * 50)
        self.assertGreater(j["store"]["bytes_saved"], 0)
        self.assertGreaterEqual(j["store"]["ratio"], 1)
        self.assertEqual(set(j["store_overhead"]), {"prefill", "decode"})
        self.assertEqual([n for n in os.listdir(self.folder.path) if n.startswith("gqa-bench")], [])


if __name__ == "__main__":
    main()
