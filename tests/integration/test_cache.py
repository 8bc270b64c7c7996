#!/usr/bin/env python3
"""The KV cache of a real daemon: restarts, kill -9, full and read-only disks, purges, users."""
import os
import random
import signal
import stat
import subprocess
import sys
import unittest

import wire
from harness import Daemon, Folder, main

CYCLES = int(os.environ.get("GQAD_TEST_KILLS", "200"))
CANARY = "zebra-quartz-41771"
ROOT = os.geteuid() == 0


def tokens(seed, n):
    draw = random.Random(seed)
    return [draw.randrange(3, 500) for _ in range(n)]


def greedy(client, prompt, n=4, **more):
    return client.generate(model="tiny", tokens=prompt, n_predict=n, temperature=0.0, ignore_eos=True, **more)


def files_below(path):
    for folder, _, names in os.walk(path):
        for name in names:
            yield os.path.join(folder, name)


def read(path):
    with open(path, "rb") as f:
        return f.read()


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.cache = os.path.join(self.folder.path, "cache")
        self.daemon = None

    def tearDown(self):
        if self.daemon is not None:
            self.daemon.kill()
        self.folder.remove()

    def start(self, *flags, **more):
        self.daemon = Daemon(self.folder.path, *flags, **more)
        return self.daemon

    def restart(self, *flags, kill=False, **more):
        if kill:
            self.daemon.kill()
        else:
            self.daemon.stop()
        return self.start(*flags, **more)

    def kv(self):
        with self.daemon.connect() as c:
            return c.call("kv.stats")

    def settle(self):
        """Waits until nothing is being saved."""
        wire.wait_until(lambda: self.kv()["store_pending"] == 0, "everything is saved")
        return self.kv()


class Restarts(Case):
    def test_a_prompt_is_found_after_a_restart_and_after_kill_9(self):
        self.start()
        prompt = tokens(1, 300)
        with self.daemon.connect() as c:
            cold = greedy(c, prompt, cache_prompt=False)
            first = greedy(c, prompt)
        self.assertEqual((cold["n_cached"], first["n_cached"]), (0, 0))
        self.assertIn("share", cold["cache"]["miss_reason"])
        self.assertIn("not computed", first["cache"]["miss_reason"])
        with self.daemon.connect() as c:
            self.assertEqual(greedy(c, prompt, numerics="strict")["tokens"], cold["tokens"])
            with self.assertRaises(wire.Refused) as caught:
                greedy(c, prompt, numerics="fast")
            self.assertIn("'strict' is known", caught.exception.message)
        self.settle()
        for kill in (False, True, True):
            self.restart(kill=kill)
            with self.daemon.connect() as c:
                again = greedy(c, prompt)
            self.assertEqual(again["tokens"], cold["tokens"])
            self.assertEqual((again["n_cached"], again["cache"]["source"]), (299 // 64 * 64, "store"))
        self.daemon.stop()

    def test_unloading_a_model_keeps_its_blocks(self):
        self.start()
        prompt = tokens(2, 200)
        with self.daemon.connect() as c:
            first = greedy(c, prompt)
            c.call("model.unload", {"model": "tiny"})
            again = greedy(c, prompt)
            self.assertEqual((again["tokens"], again["n_cached"]), (first["tokens"], 192))
            c.call("model.unload", {"model": "tiny"})
            c.call("model.load", {"model": "tiny", "cache_type_k": "f32"})
            other = greedy(c, prompt)
            self.assertEqual(other["n_cached"], 0, "another cache type is another identity")
        self.daemon.stop()

    def test_another_file_of_the_same_name_shares_nothing(self):
        self.start()
        prompt = tokens(3, 200)
        with self.daemon.connect() as c:
            greedy(c, prompt)
        self.settle()
        path = os.path.join(self.folder.path, "models", "tiny.gguf")
        with open(path, "r+b") as f:
            f.seek(-4096, os.SEEK_END)
            block = bytearray(f.read(4))
            block[0] ^= 1
            f.seek(-4096, os.SEEK_END)
            f.write(block)
        self.restart()
        with self.daemon.connect() as c:
            self.assertEqual(greedy(c, prompt)["n_cached"], 0)
        self.daemon.stop()

    def test_files_are_private(self):
        self.start()
        with self.daemon.connect() as c:
            greedy(c, tokens(4, 200))
        self.settle()
        self.daemon.stop()
        names = list(files_below(os.path.join(self.cache, "kv")))
        self.assertGreaterEqual(len(names), 2)
        for name in names:
            self.assertEqual(stat.S_IMODE(os.stat(name).st_mode), 0o600, name)
            self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(name)).st_mode), 0o700)


class Kills(Case):
    """Load, kill -9 at any moment, start again: no wrong token, nothing acknowledged lost."""

    def test_kill_9_in_the_midst_of_anything(self):
        draw = random.Random(41)
        prompts = [tokens(100, 128) + tokens(200 + i, draw.randrange(1, 300)) for i in range(24)]
        self.start()
        with self.daemon.connect() as c:
            truth = [greedy(c, p, n=6, cache_prompt=False)["tokens"] for p in prompts]
        hits = wrong = lost = 0
        acknowledged = 0
        for _ in range(CYCLES):
            clients = [self.daemon.connect() for _ in range(4)]
            chosen = [draw.randrange(len(prompts)) for _ in clients]
            ids = [c.send("text.generate", {"model": "tiny", "tokens": prompts[i], "n_predict": 6, "temperature": 0.0,
                                            "ignore_eos": True}) for c, i in zip(clients, chosen)]
            served = False  # then the store is open, and its counts are whole
            for c, i, id in zip(clients, chosen, ids):
                if draw.random() < 0.3:
                    break  # killed while this one runs
                result = c.wait(id)
                served = True
                said = [t for e in c.events[id] for t in e["tokens"]]
                wrong += said != truth[i]
                hits += result["n_cached"]
            if served and draw.random() < 0.5:
                stats = self.kv()
                self.assertEqual(stats["store_state"], "ok")
                lost += stats["store_bytes_synced"] < acknowledged
                acknowledged = max(acknowledged, stats["store_bytes_synced"])
            self.restart(kill=True)
            for c in clients:
                c.close()
        with self.daemon.connect() as c:
            for i, p in enumerate(prompts):
                result = greedy(c, p, n=6)
                wrong += result["tokens"] != truth[i]
                hits += result["n_cached"]
        lost += self.kv()["store_bytes_synced"] < acknowledged
        self.assertEqual(self.kv()["blocks_corrupt"], 0)
        self.daemon.stop()
        print(f"{CYCLES} kills: {hits} tokens from the cache, {wrong} wrong answers, {lost} losses")
        self.assertEqual((wrong, lost), (0, 0))
        self.assertGreater(hits, 0)


class Disks(Case):
    def mount(self, bytes):
        os.makedirs(self.cache, mode=0o700)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={bytes},mode=0700", "tmpfs", self.cache],
                              capture_output=True)
        if done.returncode != 0:
            self.skipTest("no file system may be mounted here")
        self.addCleanup(subprocess.run, ["umount", "-l", self.cache], check=True)

    def tearDown(self):
        if self.daemon is not None:
            self.daemon.kill()
        self.doCleanups()
        self.folder.remove()

    @unittest.skipUnless(ROOT, "only root may mount a file system")
    def test_a_full_disk_costs_persistence_until_there_is_space(self):
        self.mount("2m")
        ballast = os.path.join(self.cache, "ballast")
        with open(ballast, "wb") as f:
            f.write(bytes(1900 << 10))
        self.start("--kv-store-bytes", "64M")
        prompts = [tokens(i, 400) for i in range(4)]
        with self.daemon.connect() as c:
            truth = [greedy(c, p, cache_prompt=False)["tokens"] for p in prompts]
            for p, want in zip(prompts, truth):
                self.assertEqual(greedy(c, p)["tokens"], want)
                self.assertEqual(greedy(c, p)["tokens"], want)
        # A smaller write may fit behind one that did not: the state says what became of the last.
        wire.wait_until(lambda: self.kv()["store_state"] not in ("ok", "off"), "the disk is full")
        self.assertIn("not saved", self.daemon.log_text())
        os.unlink(ballast)
        wire.wait_until(lambda: self.kv()["store_state"] == "ok", "blocks are saved again", 40)
        self.assertGreater(self.settle()["store_bytes"], 0)
        self.daemon.stop()

    @unittest.skipUnless(ROOT, "only root may mount a file system")
    def test_a_read_only_folder_costs_persistence(self):
        self.mount("8m")
        self.start()
        with self.daemon.connect() as c:
            want = greedy(c, tokens(1, 300))
        self.settle()
        self.daemon.stop()
        subprocess.run(["mount", "-o", "remount,ro", self.cache], check=True)
        self.start()
        with self.daemon.connect() as c:
            for _ in range(2):
                self.assertEqual(greedy(c, tokens(1, 300))["tokens"], want["tokens"])
        wire.wait_until(lambda: self.kv()["store_state"] != "ok", "the folder cannot be written")
        self.daemon.stop()

    def test_a_second_daemon_on_the_same_folder_serves_from_memory(self):
        self.start()
        prompt = tokens(1, 300)
        with self.daemon.connect() as c:
            want = greedy(c, prompt)
        self.settle()
        other = Daemon.__new__(Daemon)
        socket = os.path.join(self.folder.path, "second")
        Daemon.__init__(other, self.folder.path, "--socket", socket, listen=False)
        try:
            with wire.Client(socket) as c:
                first, again = greedy(c, prompt), greedy(c, prompt)
                self.assertIn("another process", c.call("kv.stats")["store_state"])
            self.assertEqual((first["tokens"], again["tokens"]), (want["tokens"], want["tokens"]))
            self.assertEqual((first["n_cached"], again["cache"]["source"]), (0, "memory"))
        finally:
            other.stop()
        self.daemon.stop()


class Owners(Case):
    def test_a_purge_removes_every_byte(self):
        self.start()
        ids = None
        with self.daemon.connect() as c:
            ids = c.call("text.tokenize", {"model": "tiny", "text": (CANARY + " ") * 60})["tokens"]
            greedy(c, ids[:500])
            self.settle()
            pattern = b"".join(i.to_bytes(4, "little") for i in ids[64:80])
            before = [f for f in files_below(self.cache) if pattern in read(f)]
            self.assertEqual(len(before), 1, "the index names the tokens")
            removed = c.call("kv.purge")
            self.assertGreater(removed["bytes"], 0)
            self.assertEqual(c.call("kv.list")["spaces"][0]["tokens"], 0)
        for name in files_below(self.cache):
            data = read(name)
            self.assertNotIn(pattern, data, name)
            if name.endswith(".c0"):
                self.assertEqual(data.strip(b"\0"), b"", "K and V are gone too")
        self.assertNotIn(CANARY, self.daemon.log_text())
        with self.daemon.connect() as c:
            self.assertEqual(greedy(c, ids[:500])["n_cached"], 0)
        self.daemon.stop()

    def test_pinned_prompts_outlive_a_drop_and_a_full_store(self):
        self.start("--kv-store-bytes", "1M")
        prompt = tokens(9, 256)
        with self.daemon.connect() as c:
            self.assertEqual(c.call("kv.pin", {"model": "tiny", "tokens": prompt})["n_pinned"], 256)
            self.settle()
            for i in range(20):
                greedy(c, tokens(50 + i, 500))
            c.call("kv.drop")
            listed, = c.call("kv.list")["spaces"]
            self.assertEqual((listed["tokens"], listed["tokens_pinned"]), (256, 256))
            self.assertEqual(greedy(c, prompt + [5])["n_cached"], 256)
            self.assertLessEqual(self.kv()["store_bytes"], 1 << 20)
        self.restart(kill=True)
        with self.daemon.connect() as c:
            self.assertEqual(greedy(c, prompt + [5])["n_cached"], 256)
            c.call("kv.pin", {"model": "tiny", "tokens": prompt, "pinned": False})
            c.call("kv.drop")
            self.assertEqual(c.call("kv.list")["spaces"][0]["tokens"], 0)
        self.daemon.stop()

    @unittest.skipUnless(ROOT, "only root may become another user")
    def test_one_user_never_hits_what_another_has_computed(self):
        """System mode: the socket's peers are uids 0 and 1000."""
        self.start("--group", "root", user=False, prefix=())
        os.chmod(self.daemon.socket, 0o666)
        os.chmod(self.folder.path, 0o755)
        prompt = tokens(7, 300)
        with self.daemon.connect() as c:
            greedy(c, prompt)
            self.assertGreater(greedy(c, prompt)["n_cached"], 0)
        program = ("import sys; sys.path.insert(0, sys.argv[1]); import wire, random\n"
                   "d = random.Random(7); prompt = [d.randrange(3, 500) for _ in range(300)]\n"
                   "c = wire.Client(sys.argv[2])\n"
                   "for _ in range(2):\n"
                   "    r = c.generate(model='tiny', tokens=prompt, n_predict=1, temperature=0.0)\n"
                   "    print(r['n_cached'])\n")
        source = os.path.dirname(os.path.abspath(wire.__file__))
        copy = os.path.join(self.folder.path, "py")
        os.mkdir(copy)
        with open(os.path.join(source, "wire.py")) as f, open(os.path.join(copy, "wire.py"), "w") as to:
            to.write(f.read())
        python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
        try:
            done = subprocess.run([python, "-c", program, copy, self.daemon.socket], capture_output=True,
                                  text=True, user=1000, group=1000, extra_groups=[])
        except PermissionError:
            self.skipTest("another user cannot run python here")
        self.assertEqual((done.returncode, done.stdout.split()), (0, ["0", "256"]), done.stderr)
        with self.daemon.connect() as c:
            realms = {s["realm"] for s in c.call("kv.list", {"all": True})["spaces"]}
            self.assertEqual(realms, {"uid-0", "uid-1000"})
            self.assertEqual({s["realm"] for s in c.call("kv.list")["spaces"]}, {"uid-0"})
        self.daemon.stop()

    def test_a_shared_realm_is_one_for_all(self):
        self.start("--kv-realm", "house")
        with self.daemon.connect() as c:
            greedy(c, tokens(1, 200))
            self.assertEqual(c.call("kv.list")["spaces"][0]["realm"], "shared-house")
        self.daemon.stop()


if __name__ == "__main__":
    main()
