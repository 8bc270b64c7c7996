"""Disks that stop answering: who does not need them goes on, and the daemon ends all the same."""
import os
import shutil
import signal
import unittest

import disk
import wire
from harness import Daemon, Folder, main

GENERATE = {"model": "tiny", "prompt": "Once", "n_predict": 4, "temperature": 0.0}


@unittest.skipIf(disk.MISSING, f"{disk.MISSING}: dead disks were NOT tested")
class Dead(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.addCleanup(self.folder.remove)
        try:
            self.disk = self.enterContext(disk.Disk(self.folder.path))
        except disk.NotMounted as e:
            self.skipTest(f"no folder can be mounted here ({e}): dead disks were NOT tested")

    def start(self, *flags, config=""):
        daemon = Daemon(self.folder.path, *flags, "--model", "tiny", config="drain_timeout_ms = 50\n" + config)
        self.addCleanup(daemon.kill)
        self.addCleanup(self.disk.revive)
        return daemon

    def ends_without_it(self, daemon, words):
        """It says that it does not wait any longer. Its last threads are the kernel's to end, when the disk answers."""
        daemon.signal(signal.SIGTERM)
        wire.wait_until(lambda: words in daemon.log_text(), f"it gives up: '{words}'", timeout_s=60)
        self.assertFalse(os.path.exists(daemon.socket))
        self.disk.revive()
        self.assertEqual(daemon.wait(), 0, daemon.log_text())


class Models(Dead):
    def setUp(self):
        super().setUp()
        for name in ("here", "there"):
            shutil.copy(os.path.join(self.folder.path, "models", "tiny.gguf"),
                        os.path.join(self.folder.path, "models" if name == "here" else self.disk.kept, name + ".gguf"))
        self.daemon = self.start("--models-dir", self.disk.path)

    def test_others_are_served(self):
        with self.daemon.connect() as c, self.daemon.connect() as other:
            self.disk.die()
            load = c.send("model.load", {"model": "there"})
            unknown = c.send("model.load", {"model": "nowhere"})
            listed = [c.send("model.list") for _ in range(6)]
            self.disk.wait_for_waiting()
            other.call("text.tokenize", {"model": "tiny", "text": "x" * 5000})  # by the pool, as listing is
            self.assertEqual(other.call("text.generate", GENERATE)["finish"], "length")
            other.call("server.stats")
            other.call("model.load", {"model": "here"})
            self.assertEqual(other.call("text.generate", {**GENERATE, "model": "here"})["finish"], "length")
            other.call("model.unload", {"model": "here"})
            self.disk.revive()
            self.assertEqual(c.wait(load)["name"], "there")
            with self.assertRaises(wire.Refused) as caught:
                c.wait(unknown)
            self.assertEqual(caught.exception.name, "NOT_FOUND")
            for id in listed:
                self.assertIn("there", [m["name"] for m in c.wait(id)["models"]])
        self.daemon.stop()

    def test_the_end_does_not_wait(self):
        with self.daemon.connect() as c:
            self.disk.die()
            c.send("model.load", {"model": "there"})
            self.disk.wait_for_waiting()
            self.ends_without_it(self.daemon, "models are still being loaded")


class Cache(Dead):
    def setUp(self):
        super().setUp()
        self.daemon = self.start("--cache-dir", os.path.join(self.disk.path, "cache"))

    def test_requests_go_on_and_the_end_does_not_wait(self):
        with self.daemon.connect() as c:
            before = c.generate(**{**GENERATE, "prompt": "a " * 200})
            self.disk.die()
            for i in range(4):
                again = c.call("text.generate", {**GENERATE, "prompt": f"{i} " * 300})
                self.assertEqual(again["finish"], "length")
            self.disk.wait_for_waiting()
            again = c.generate(**{**GENERATE, "prompt": "a " * 200})
            self.assertEqual(again["tokens"], before["tokens"])
            self.assertGreater(again["n_cached"], 0)
        self.ends_without_it(self.daemon, "the disk has not done")

    def test_what_was_not_saved_is_saved_when_it_answers(self):
        with self.daemon.connect() as c:
            self.disk.die()
            c.call("text.generate", {**GENERATE, "prompt": "b " * 300})
            self.disk.wait_for_waiting()
            self.disk.revive()
            c.call("kv.pin", {"model": "tiny", "prompt": "b " * 300})  # answers when it is on the disk
        self.daemon.stop()


if __name__ == "__main__":
    main()
