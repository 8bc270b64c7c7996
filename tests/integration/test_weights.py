"""Packed weights: packed by the first start, mapped by the second, with the same results; and what becomes of
a model whose files are cut under it."""
import glob
import json
import os
import unittest

import wire
from harness import Daemon, Folder, main, synth

GENERATE = {"model": "q", "tokens": [1, 40, 41, 42], "n_predict": 24, "temperature": 0, "ignore_eos": True}


class Weights(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.model = os.path.join(self.folder.path, "models", "q.gguf")
        synth(self.model, type="q4_0")
        self.daemons = []

    def tearDown(self):
        for d in self.daemons:
            d.kill()
        self.folder.remove()

    def start(self, *flags, **options):
        d = Daemon(self.folder.path, *flags, **options)
        self.daemons.append(d)
        return d

    def stop(self, d):
        self.daemons.remove(d)
        d.stop()

    def files(self):
        return sorted(os.listdir(self.weights)) if os.path.isdir(self.weights) else []

    @property
    def weights(self):
        return os.path.join(self.folder.path, "cache", "weights")

    def use(self, d):
        """Where the weights came from, and what they compute."""
        with d.connect() as c:
            tokens = c.generate(**GENERATE, cache_prompt=False)["tokens"]
            return c.call("model.info", {"model": "q"})["packed_source"], tokens

    def wait_saved(self, d):
        with d.connect() as c:
            wire.wait_until(lambda: c.call("model.info", {"model": "q"})["packed_in_file"], "the file is whole")

    def test_the_second_start_maps_what_the_first_packed(self):
        d = self.start("-m", "q")
        source, tokens = self.use(d)
        self.assertEqual(source, "packed")
        self.wait_saved(d)
        self.assertEqual(self.use(d)[1], tokens)  # from the file by now
        d.kill()
        self.daemons.remove(d)
        name, = self.files()
        self.assertTrue(name.endswith(".packed"))
        self.assertEqual(os.stat(os.path.join(self.weights, name)).st_mode & 0o777, 0o600)
        d = self.start("-m", "q")
        self.assertEqual(self.use(d), ("file", tokens))
        other = Folder()
        try:  # another process, another file of the same content
            os.symlink(os.path.join(self.folder.path, "cache"), os.path.join(other.path, "cache"))
            synth(os.path.join(other.path, "models", "q.gguf"), type="q4_0")
            second = Daemon(other.path, "-m", "q")
            self.daemons.append(second)
            self.assertEqual(self.use(second), ("file", tokens))
            self.stop(second)
        finally:
            other.remove()
        self.stop(d)

    def test_load_events_tell(self):
        d = self.start()
        for stages in ({"map", "read", "pack", "ready"}, {"map", "ready"}):
            with d.connect() as c:
                id = c.send("model.load", {"model": "q"})
                info = c.wait(id)
                seen = {e["stage"] for e in c.events.get(id, [])}
                self.assertLessEqual(seen, stages)
                self.assertEqual(info["packed_source"], "packed" if "pack" in stages else "file")
                self.wait_saved(d)
                c.call("model.unload", {"model": "q"})
        self.stop(d)

    def test_a_cut_file_costs_a_request_and_is_packed_again(self):
        d = self.start("-m", "q")
        _, tokens = self.use(d)
        self.wait_saved(d)
        os.truncate(os.path.join(self.weights, self.files()[0]), 4096)
        with self.assertRaises(wire.Refused) as caught:
            self.use(d)
        self.assertEqual(caught.exception.name, "IO", caught.exception.message)
        self.assertEqual(self.use(d), ("packed", tokens))
        self.stop(d)

    def test_a_cut_model_is_an_error_and_no_end(self):
        d = self.start("-m", "q")
        self.use(d)
        self.wait_saved(d)
        os.truncate(self.model, 4096)
        with self.assertRaises(wire.Refused) as caught:
            self.use(d)
        self.assertEqual(caught.exception.name, "IO", caught.exception.message)
        with self.assertRaises(wire.Refused) as caught:
            self.use(d)
        self.assertEqual(caught.exception.name, "MODEL_REFUSED", caught.exception.message)
        synth(self.model, type="q4_0")
        self.assertEqual(self.use(d)[0], "file")  # what it holds is known by its content
        self.stop(d)

    def test_a_damaged_file_is_packed_again(self):
        self.stop(self.start("-m", "q"))
        path = os.path.join(self.weights, self.files()[0])
        with open(path, "r+b") as f:
            f.seek(-1, os.SEEK_END)
            last = f.read(1)[0]
            f.seek(-1, os.SEEK_END)
            f.write(bytes([last ^ 1]))
        d = self.start("-m", "q")
        self.assertEqual(self.use(d)[0], "packed")
        self.assertIn("damaged: they are packed anew", d.log_text())
        self.stop(d)

    def test_switched_off(self):
        for _ in range(2):
            d = self.start("-m", "q", config="weights_cache = off\n")
            self.assertEqual(self.use(d)[0], "packed")
            self.stop(d)
        self.assertEqual(self.files(), [])

    def test_bounded(self):
        d = self.start("-m", "q", "--weights-cache-bytes", "4096")
        self.assertEqual(self.use(d)[0], "packed")
        self.stop(d)
        self.assertIn("more than weights_cache_bytes allows", d.log_text())
        self.assertEqual(self.files(), [])

    def test_a_folder_that_is_none(self):
        os.mkdir(os.path.join(self.folder.path, "cache"), 0o700)
        with open(self.weights, "w"):
            pass
        d = self.start("-m", "q")
        self.assertEqual(self.use(d)[0], "packed")
        self.stop(d)
        self.assertEqual(d.log_text().count("every start packs them again"), 1)


if __name__ == "__main__":
    main()
