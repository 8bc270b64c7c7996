#!/usr/bin/env python3
"""Prefixes carried from one daemon to another: kv.export, kv.import, and the files of gqa kv."""
import ctypes
import os
import random
import struct
import subprocess
import unittest

import wire
from cli import Tool, write_json
from harness import Daemon, Folder, main, synth

ROOT = os.geteuid() == 0
# Two layer classes, of which one sees 100 tokens; and layers that all see 100.
SHAPES = {"mixed": "gemma-2-2b,n_layers=4,n_embd=64,n_heads=4,n_kv_heads=2,head_dim=16,n_ff=64,n_vocab=512,window=100",
          "windowed": "tiny,window=100"}
# Blocks of 4.5 MiB: they do not fit one piece.
SHAPES["large"] = "tiny,n_layers=24,n_heads=12,n_kv_heads=12,head_dim=64,n_vocab=512"
LAYOUT_OF_HEAD = "<32sIIQ128s"
LAYOUT_OF_PIECE = "<IIIIQQQ64i"


def checksum(data):
    xxhash = ctypes.CDLL("libxxhash.so.0")
    xxhash.XXH3_64bits.restype = ctypes.c_uint64
    return xxhash.XXH3_64bits(data, ctypes.c_size_t(len(data)))


def tokens(seed, n):
    draw = random.Random(seed)
    return [draw.randrange(3, 500) for _ in range(n)]


class Place:
    """A daemon with a cache of its own."""

    def __init__(self, models, *flags, **more):
        self.folder = Folder()
        for name, shape in models.items():
            path = os.path.join(self.folder.path, "models", name + ".gguf")
            if name == "other":
                subprocess.run([os.environ["GQAD_TEST_SYNTH"], "--shape", shape, "--type", "f32", "--seed", "7", "-o",
                                path], check=True, stdout=subprocess.DEVNULL)
            else:
                synth(path, shape)
        self.daemon = Daemon(self.folder.path, *flags, **more)
        self.gqa = Tool(self.folder.path, "--socket", self.daemon.socket)

    def connect(self):
        return self.daemon.connect()

    def end(self):
        try:
            self.daemon.stop()
        finally:
            self.folder.remove()


def greedy(client, prompt, model="tiny", n=8, **more):
    return client.generate(model=model, tokens=prompt, n_predict=n, temperature=0.0, ignore_eos=True, **more)


def export(client, prompt, model="tiny"):
    """The head, the pieces and the result."""
    id = client.send("kv.export", {"model": model, "tokens": prompt})
    result = client.wait(id)
    events = client.events.pop(id)
    return events[0], events[1:], result


def params_of(head, piece, model, last):
    keys = ("layer_class", "position", "flags", "tokens", "bytes", "checksum", "offset", "data")
    return {"model": model, "id": head["id"], "about": head["about"], "layout_version": head["layout_version"],
            "last": last, **{k: piece[k] for k in keys}}


def import_all(client, head, pieces, model="tiny"):
    for i, piece in enumerate(pieces):
        result = client.call("kv.import", params_of(head, piece, model, i + 1 == len(pieces)))
    return result


class Case(unittest.TestCase):
    models = {}
    flags_there = ()

    @classmethod
    def setUpClass(cls):
        cls.here = Place(cls.models)
        cls.there = Place(cls.models, *cls.flags_there)

    @classmethod
    def tearDownClass(cls):
        try:
            cls.here.end()
        finally:
            cls.there.end()

    def nothing_kept(self, model="tiny"):
        with self.there.connect() as c:
            wire.wait_until(lambda: self.there.daemon.stats()["kv"]["blocks_used"] == 0, "nothing is held")
            for space in c.call("kv.list")["spaces"]:
                self.assertEqual((space["tokens"], space["memory_bytes"], space["store_bytes"]), (0, 0, 0))

    def carry(self, prompt, model):
        """Computes here, exports, imports there, and returns what became of the prompt there."""
        longer = prompt + tokens(999, 20)  # the last token of a prompt is always computed
        with self.here.connect() as c:
            cold = greedy(c, longer, model, cache_prompt=False)
            greedy(c, prompt, model, n=1)
            head, pieces, exported = export(c, prompt, model)
        with self.there.connect() as c:
            imported = import_all(c, head, pieces, model)
            self.assertEqual(imported, {"n_tokens": exported["n_tokens"], "n_new": exported["n_tokens"]})
            warm = greedy(c, longer, model)
            again = import_all(c, head, pieces, model)
            self.assertEqual(again, {"n_tokens": exported["n_tokens"], "n_new": 0})
            c.call("kv.drop")
        self.assertEqual(warm["tokens"], cold["tokens"])
        self.assertEqual(warm["n_cached"], exported["n_tokens"])
        return head, pieces, exported


class Carried(Case):
    models = SHAPES

    def test_a_prefix_is_found_where_it_was_carried_to(self):
        for n in (64, 65, 128, 300, 1000):
            head, pieces, exported = self.carry(tokens(n, n), "tiny")
            self.assertEqual(exported["n_tokens"], n // 64 * 64)
            self.assertEqual(len(pieces), n // 64)
            self.assertEqual(head["n_tokens"], exported["n_tokens"])
            self.assertEqual([p["tokens"] for p in pieces], [tokens(n, n)[i:i + 64] for i in range(0, n - 63, 64)])

    def test_windowed_layers_bring_what_their_window_needs(self):
        for n in (100, 640, 700):
            head, pieces, exported = self.carry(tokens(n, n), "mixed")
            self.assertEqual(exported["n_tokens"], n // 64 * 64)
            self.assertEqual(len(head["classes"]), 2)
            window = [c["window"] for c in head["classes"]].index(100)
            end = exported["n_tokens"]
            needed = [p for p in range(end // 64) if (p + 1) * 64 > end - 99]
            self.assertEqual([p["position"] for p in pieces if p["layer_class"] == window], needed)
            self.assertEqual([p["position"] for p in pieces if p["layer_class"] != window], list(range(end // 64)))

    def test_positions_before_all_windows_bring_their_tokens(self):
        _, pieces, _ = self.carry(tokens(9, 640), "windowed")
        self.assertEqual([p["position"] for p in pieces], list(range(10)))
        self.assertEqual([p["bytes"] > 0 for p in pieces], [False] * 8 + [True] * 2)

    def test_a_block_may_be_larger_than_a_piece(self):
        head, pieces, exported = self.carry(tokens(3, 140), "large")
        size = head["classes"][0]["block_bytes"]
        self.assertGreater(size, 4 << 20)
        self.assertEqual(sum(len(p["data"]) for p in pieces), 2 * size)
        self.assertLessEqual(max(len(p["data"]) for p in pieces), 4 << 20)

    def test_after_a_restart_it_comes_from_the_store(self):
        prompt = tokens(77, 300)
        with self.here.connect() as c:
            cold = greedy(c, prompt, n=8)
        wire.wait_until(lambda: self.stats(self.here)["store_pending"] == 0, "everything is saved")
        self.here.daemon.stop()
        self.here.daemon = Daemon(self.here.folder.path)
        with self.here.connect() as c:
            head, pieces, exported = export(c, prompt)
        with self.there.connect() as c:
            import_all(c, head, pieces)
        wire.wait_until(lambda: self.stats(self.there)["store_pending"] == 0, "everything is saved")
        self.there.daemon.kill()
        self.there.daemon = Daemon(self.there.folder.path)
        with self.there.connect() as c:
            warm = greedy(c, prompt, n=8)
            c.call("kv.drop")
        self.assertEqual((warm["n_cached"], warm["cache"]["source"]), (256, "store"))
        self.assertEqual(warm["tokens"], cold["tokens"])

    def stats(self, place):
        with place.connect() as c:
            return c.call("kv.stats")


class Exports(Case):
    models = SHAPES

    def test_what_is_not_cached_is_not_exported(self):
        with self.here.connect() as c:
            for prompt, word in ((tokens(1000, 200), "not computed before"), (tokens(1, 63), "fills no block")):
                with self.assertRaises(wire.Refused) as caught:
                    export(c, prompt)
                self.assertEqual(caught.exception.name, "NOT_FOUND")
                self.assertIn(word, caught.exception.message)

    def test_only_what_is_cached_is_exported(self):
        prompt = tokens(1001, 200)
        with self.here.connect() as c:
            greedy(c, prompt)
            _, _, exported = export(c, prompt[:150] + tokens(5, 500))
        self.assertEqual(exported["n_tokens"], 128)

    def test_a_purge_does_not_wait_for_a_reader_that_sleeps(self):
        prompt = tokens(1002, 400)
        with self.here.connect() as c:
            greedy(c, prompt, "large")
            ids = [c.send("kv.export", {"model": "large", "tokens": prompt}) for _ in range(2)]
            self.begin(c, ids[0])
            with self.here.connect() as other:  # who says nothing is not waited for
                removed = other.call("kv.purge")
            self.assertGreaterEqual(removed["tokens"], 384)
            for id in ids:
                with self.assertRaises(wire.Refused) as caught:
                    c.wait(id)
                self.assertEqual(caught.exception.name, "NOT_FOUND")
                self.assertIn("purged", caught.exception.message)
            self.assertEqual(greedy(c, prompt, "large")["n_cached"], 0)

    def test_exports_of_a_user_are_few_and_end_with_the_connection(self):
        prompt = tokens(1003, 400)
        with self.here.connect() as c:
            greedy(c, prompt, "large")
        for _ in range(5):
            with self.here.connect() as c:
                ids = [c.send("kv.export", {"model": "large", "tokens": prompt}) for _ in range(6)]
                self.begin(c, ids[0])
                for id in ids[2:]:
                    with self.assertRaises(wire.Refused) as caught:
                        c.wait(id)
                    self.assertEqual(caught.exception.name, "BUSY")
            wire.wait_until(lambda: self.here.daemon.stats()["kv"]["blocks_used"] == 0, "nothing is held")
        with self.here.connect() as c:
            self.assertEqual(export(c, prompt, "large")[2]["n_tokens"], 384)

    def begin(self, c, id):
        """Takes the head of an export and little more."""
        c.wait_events(id, 1)
        self.assertEqual(c.events[id][0]["n_tokens"], 384)

    def test_cancelled_exports_let_go(self):
        prompt = tokens(1004, 400)
        with self.here.connect() as c:
            greedy(c, prompt, "large")
            for _ in range(5):
                id = c.send("kv.export", {"model": "large", "tokens": prompt})
                self.begin(c, id)
                c.cancel(id)
                with self.assertRaises(wire.Refused) as caught:
                    c.wait(id)
                self.assertEqual(caught.exception.name, "CANCELLED")
            wire.wait_until(lambda: self.here.daemon.stats()["kv"]["blocks_used"] == 0, "nothing is held")


class Refusals(Case):
    """Whatever is wrong with what comes, a sentence says so, and nothing of it is kept."""
    models = {"other": "tiny", **SHAPES}

    def setUp(self):
        prompt = tokens(1, 400)
        with self.here.connect() as c:
            greedy(c, prompt)
            self.head, self.pieces, _ = export(c, prompt)
            greedy(c, prompt, "large")
            self.large_head, self.large, _ = export(c, prompt, "large")
            greedy(c, prompt, "mixed")
            self.mixed_head, self.mixed, _ = export(c, prompt, "mixed")

    def refused(self, head, pieces, *words, model="tiny", name="INVALID_PARAMS", finish=True):
        with self.there.connect() as c:
            with self.assertRaises(wire.Refused) as caught:
                import_all(c, head, pieces, model)
            self.assertEqual(caught.exception.name, name, caught.exception.message)
            for word in words:
                self.assertIn(str(word), caught.exception.message)
            # The import is over: its next piece is not the next one of anything.
            if pieces[-1]["position"] > 0:
                with self.assertRaises(wire.Refused):
                    c.call("kv.import", params_of(head, pieces[-1], model, True))
            self.nothing_kept()
            self.assertEqual(greedy(c, tokens(1, 400), model)["n_cached"], 0)
            c.call("kv.drop")

    def change(self, i, **values):
        return [{**p, **values} if k == i else p for k, p in enumerate(self.pieces)]

    def test_another_model(self):
        self.refused(self.head, self.pieces, self.head["id"], self.head["about"][:8], "other", "id", model="other")
        self.refused({**self.head, "layout_version": 99}, self.pieces, "layout_version", 99)

    def test_flipped_bytes(self):
        for i in (0, 3, 5):
            data = bytearray(self.pieces[i]["data"])
            data[len(data) // 2] ^= 4
            self.refused(self.head, self.change(i, data=bytes(data)), "checksum", f"position {i}")
        self.refused(self.head, self.change(2, checksum=self.pieces[2]["checksum"] ^ 1), "checksum")

    def test_what_are_no_numbers(self):
        """Their checksum is right: whoever makes a block makes it, too."""
        for i, at, value in ((0, 0, 0x7e00), (3, 700, 0x7c00), (5, -2, 0xfc00)):
            data = bytearray(self.pieces[i]["data"])
            at %= len(data)
            data[at:at + 2] = struct.pack("<H", value)
            self.refused(self.head, self.change(i, data=bytes(data), checksum=checksum(bytes(data))), "data",
                         "numbers", f"position {i}")

    def test_a_flipped_byte_in_one_of_several_pieces(self):
        for i in range(5):
            bad = list(self.large)
            data = bytearray(bad[i]["data"])
            data[7] ^= 1
            bad[i] = {**bad[i], "data": bytes(data)}
            self.refused(self.large_head, bad, "checksum", "position 0", model="large")

    def test_tokens_that_are_none(self):
        self.refused(self.head, self.change(1, tokens=[512] * 64), "tokens", 512)
        self.refused(self.head, self.change(1, tokens=[1] * 63), "tokens", 64)

    def test_other_tokens_are_found_by_other_prompts_alone(self):
        """The sender says what blocks are of; whoever imports trusts them, for his own prompts."""
        with self.there.connect() as c:
            import_all(c, self.head, self.change(0, tokens=tokens(8, 64)))
            self.assertEqual(greedy(c, tokens(1, 400))["n_cached"], 0)
            c.call("kv.drop")

    def test_pieces_out_of_place(self):
        p = self.pieces
        self.refused(self.head, [p[0], p[2]], "position")
        self.refused(self.head, [p[0], p[1], p[1]], "position")
        self.refused(self.head, p[1:], "position")
        self.refused(self.head, self.change(1, layer_class=1), "layer_class")
        self.refused(self.head, [{**q, "position": 40 + q["position"]} for q in p], "position", "31")
        self.refused(self.head, self.change(2, flags=2), "flags")

    def test_pieces_of_other_sizes(self):
        n = self.pieces[0]["bytes"]
        self.refused(self.head, self.change(1, bytes=n - 64), "bytes", n)
        self.refused(self.head, self.change(1, bytes=0, data=b""), "bytes")
        self.refused(self.head, self.change(1, data=self.pieces[1]["data"] + b"x"), "data", n)
        self.refused(self.head, self.change(1, data=self.pieces[1]["data"][:-1]), f"{n - 1} of {n}")
        self.refused(self.head, self.change(1, data=b""), "data")
        self.refused(self.head, self.change(5, data=self.pieces[5]["data"][:100]), f"100 of {n}")

    def test_pieces_of_one_block(self):
        a, b = self.large[0], self.large[1]
        rest = self.large[2:]
        self.refused(self.large_head, [b], "offset", model="large")
        self.refused(self.large_head, [a, a], "position", model="large")
        self.refused(self.large_head, [a, {**b, "offset": b["offset"] + 1}, *rest], "offset", model="large")
        self.refused(self.large_head, [a, b, {**b}, *rest], "offset", model="large")
        self.refused(self.large_head, [a, {**b, "checksum": 5}, *rest], "checksum", model="large")
        self.refused(self.large_head, [a, {**b, "tokens": tokens(4, 64)}, *rest], "tokens", model="large")

    def test_windows_with_holes(self):
        window = [c["window"] for c in self.mixed_head["classes"]].index(100)
        own = [i for i, p in enumerate(self.mixed) if p["layer_class"] == window]
        for i in own:
            without = self.mixed[:i] + self.mixed[i + 1:]
            self.refused(self.mixed_head, without, "class", model="mixed")
        self.refused(self.mixed_head, [p for p in self.mixed if p["layer_class"] == window], "position", model="mixed")

    def test_the_end_of_the_connection_leaves_nothing(self):
        for n in (1, 3, 5):
            with self.there.connect() as c:
                for piece in self.pieces[:n]:
                    c.call("kv.import", params_of(self.head, piece, "tiny", False))
            self.nothing_kept()
        with self.there.connect() as c:  # also while a piece is under way
            c.send("kv.import", params_of(self.large_head, self.large[0], "large", False))
        self.nothing_kept()

    def test_one_import_a_user_and_one_piece_at_a_time(self):
        with self.there.connect() as c, self.there.connect() as other:
            c.call("kv.import", params_of(self.head, self.pieces[0], "tiny", False))
            with self.assertRaises(wire.Refused) as caught:
                other.call("kv.import", params_of(self.head, self.pieces[0], "tiny", False))
            self.assertEqual(caught.exception.name, "BUSY")
            for piece in self.pieces[1:]:
                result = c.call("kv.import", params_of(self.head, piece, "tiny", piece is self.pieces[-1]))
            self.assertEqual(result["n_tokens"], 384)
            self.assertEqual(import_all(other, self.head, self.pieces)["n_new"], 0)
            c.call("kv.drop")
        self.nothing_kept()

    def test_running_requests_do_not_mind(self):
        prompt = tokens(50, 100)
        with self.there.connect() as c, self.there.connect() as other:
            cold = greedy(c, prompt, n=200, cache_prompt=False)
            id = c.send("text.generate", {"model": "tiny", "tokens": prompt, "n_predict": 200, "temperature": 0.0,
                                          "ignore_eos": True})
            for _ in range(10):
                import_all(other, self.head, self.pieces)
                other.call("kv.drop")
            c.wait(id)
            got = [t for e in c.events.pop(id) for t in e["tokens"]]
            self.assertEqual(got, cold["tokens"])
            c.call("kv.drop")


class Bounds(Case):
    flags_there = ("--kv-bytes", "16M")
    models = SHAPES

    def test_an_import_takes_half_of_the_memory_at_most(self):
        prompt = tokens(1, 400)
        with self.here.connect() as c:
            greedy(c, prompt, "large")
            head, pieces, _ = export(c, prompt, "large")
        with self.there.connect() as c:
            with self.assertRaises(wire.Refused) as caught:
                import_all(c, head, pieces, "large")
            self.assertEqual(caught.exception.name, "NO_MEMORY")
            self.assertIn(str(8 << 20), caught.exception.message)
        self.nothing_kept("large")


class SharedRealm(Case):
    flags_there = ("--kv-realm", "house")

    def test_the_daemons_own_user_may_import(self):
        with self.here.connect() as c:
            greedy(c, tokens(1, 200))
            head, pieces, _ = export(c, tokens(1, 200))
        with self.there.connect() as c:
            self.assertEqual(import_all(c, head, pieces)["n_tokens"], 192)
            self.assertEqual(c.call("kv.list")["spaces"][0]["realm"], "shared-house")

    @unittest.skipUnless(ROOT, "only root may become another user")
    def test_others_may_not(self):
        place = Place({}, "--group", "root", "--kv-realm", "house", user=False)
        try:
            os.chmod(place.daemon.socket, 0o666)
            os.chmod(place.folder.path, 0o755)
            pid = os.fork()
            if pid == 0:  # the child is another user until it ends
                status = 1
                try:
                    os.setgroups([])
                    os.setgid(1000)
                    os.setuid(1000)
                    c = wire.Client(place.daemon.socket)
                    piece = {"model": "tiny", "id": "0" * 32, "layout_version": 1, "layer_class": 0, "position": 0,
                             "tokens": [1] * 64, "bytes": 0, "checksum": 0, "data": b""}
                    c.call("kv.import", piece)
                except wire.Refused as e:
                    status = 0 if e.name == "ACCESS_DENIED" and "administrators" in e.message else 2
                finally:
                    os._exit(status)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        finally:
            place.end()


class Files(Case):
    """gqa kv export and import."""
    models = {"other": "tiny", **SHAPES}

    def path(self, name):
        return os.path.join(self.here.folder.path, name)

    def exported(self, prompt, model="tiny"):
        given = write_json(self.path("ids.json"), prompt)
        self.here.gqa("run", "-m", model, "--tokens", given, "-n", 1)
        path = self.path(model + ".prefix")
        said = self.here.gqa("kv", "export", "-m", model, "--tokens", given, "-o", path).text
        self.assertIn(f"{len(prompt) // 64 * 64} tokens", said)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        with open(path, "rb") as f:
            return path, f.read()

    def write(self, data):
        path = self.path("bad.prefix")
        with open(path, "wb") as f:
            f.write(data)
        return path

    def refused(self, data, *words, status=65, model="tiny"):
        outcome = self.there.gqa("kv", "import", "-m", model, self.write(data), status=status)
        for word in words:
            self.assertIn(str(word), outcome.err)
        self.nothing_kept()

    def test_a_file_carries_a_prefix(self):
        for model in ("tiny", "mixed", "windowed", "large"):
            prompt = tokens(31, 400)
            path, data = self.exported(prompt, model)
            said = self.there.gqa("kv", "import", "-m", model, path).text
            self.assertIn("384 tokens imported, 384 of them new", said)
            self.assertIn("384 of them new", said)
            result = self.there.gqa("kv", "import", "--json", "-m", model, path).json
            self.assertEqual(result, {"n_tokens": 384, "n_new": 0})
            given = write_json(self.path("ids.json"), prompt)
            run = ("run", "-m", model, "--tokens", given, "-n", 6, "--temperature", 0, "--ignore-eos", "--json")
            warm, cold = self.there.gqa(*run).json, self.here.gqa(*run).json
            self.assertEqual((warm["tokens"], warm["n_cached"]), (cold["tokens"], 384))
            self.there.gqa("kv", "drop")
            self.assertEqual(self.here.gqa("kv", "export", "-m", model, "--tokens", given).out, data)
            self.there.gqa("kv", "import", "-m", model, "-", input=data)
            self.there.gqa("kv", "drop")

    def test_the_format_is_what_its_document_says(self):
        prompt = tokens(32, 200)
        _, data = self.exported(prompt)
        self.assertEqual(data[:16], b"GQAKVPX\n" + struct.pack("<II", 1, 0))
        at, records = 16, []
        while at < len(data):
            kind, size = struct.unpack_from("<4sI", data, at)
            records.append((kind, data[at + 8:at + 8 + size]))
            at += 8 + size
        self.assertEqual([kind for kind, _ in records], [b"HEAD", b"PIEC", b"PIEC", b"PIEC", b"END!"])
        id, layout, n_tokens, size, about = struct.unpack(LAYOUT_OF_HEAD, records[0][1])
        self.assertEqual(n_tokens, 192)
        self.assertGreater(layout, 0)
        self.assertTrue(about.startswith(b"tiny") or b" " in about, about)
        int(id, 16)
        total = 0
        for i, (_, body) in enumerate(records[1:-1]):
            fixed = struct.calcsize(LAYOUT_OF_PIECE)
            layer_class, position, flags, zero, block, _, offset, *ids = struct.unpack(LAYOUT_OF_PIECE, body[:fixed])
            self.assertEqual((layer_class, position, flags, zero, offset), (0, i, 0, 0, 0))
            self.assertEqual(ids, prompt[64 * i:64 * i + 64])
            self.assertEqual(len(body) - fixed, block)
            total += block
        self.assertEqual((total, struct.unpack("<Q", records[-1][1])), (size, (3,)))

    def test_hostile_files(self):
        _, data = self.exported(tokens(33, 400))
        draw = random.Random(5)
        for n in [0, 5, 16, 20, 100, 200, 204, 300, len(data) - 1] + [draw.randrange(len(data)) for _ in range(8)]:
            self.refused(data[:n], "cut off")
        self.refused(b"X" + data[1:], "not a file")
        self.refused(data[:8] + struct.pack("<I", 2) + data[12:], "version")
        self.refused(data + b"x", "follows")
        self.refused(data[:16] + b"PIEC" + data[20:], "head")
        self.refused(data[:-8] + struct.pack("<Q", 7), "pieces")
        first = 16 + 8 + struct.calcsize(LAYOUT_OF_HEAD)
        self.refused(data[:first] + b"WHAT" + data[first + 4:], "unknown type")
        self.refused(data[:first + 4] + struct.pack("<I", 0xffffffff) + data[first + 8:], "bytes")
        self.refused(data[:first] + b"END!" + struct.pack("<IQ", 8, 0), "pieces")
        piece = first + 8
        self.refused(data[:piece + 400] + bytes([data[piece + 400] ^ 16]) + data[piece + 401:], "checksum", status=1)
        self.refused(data[:24] + b"f" * 32 + data[56:], "id", "f" * 32, status=1)
        self.refused(data, "other", status=1, model="other")

    def test_a_file_that_cannot_be_written_is_told(self):
        given = write_json(self.path("ids.json"), tokens(34, 200))
        self.here.gqa("run", "-m", "tiny", "--tokens", given, "-n", 1)
        nowhere = self.path("no/such/place")
        self.assertIn("No such file", self.here.gqa("kv", "export", "-m", "tiny", "--tokens", given, "-o", nowhere,
                                                    status=73).err)
        if os.path.exists("/dev/full"):
            self.assertIn("No space", self.here.gqa("kv", "export", "-m", "tiny", "--tokens", given, "-o", "/dev/full",
                                                    status=74).err)
        missing = write_json(self.path("ids.json"), tokens(35, 200))
        target = self.path("kept.prefix")
        with open(target, "w") as f:
            f.write("what was there")
        self.here.gqa("kv", "export", "-m", "tiny", "--tokens", missing, "-o", target, status=1)
        with open(target) as f:
            self.assertEqual(f.read(), "what was there")
        self.assertFalse(os.path.exists(target + ".part"))


if __name__ == "__main__":
    main()
