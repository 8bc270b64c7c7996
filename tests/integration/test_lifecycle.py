"""Starting, reloading, ending; sockets that are passed; configuration that is wrong."""
import grp
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

import forbid
import wire
from harness import GQAD, SYNTH, Daemon, Folder, main, synth
from test_hostile import STRANGER, as_stranger

LONG = {"model": "tiny", "tokens": [1, 40, 41], "n_predict": 2000, "ignore_eos": True}


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Folder()
        self.daemons = []

    def tearDown(self):
        try:
            for d in self.daemons:
                d.stop()
        finally:
            for d in self.daemons:
                d.kill()
            self.folder.remove()

    def start(self, *flags, **options):
        d = Daemon(self.folder.path, *flags, **options)
        self.daemons.append(d)
        return d

    def ended(self, d, status=0):
        self.daemons.remove(d)
        self.assertEqual(d.wait(), status, d.log_text())


class Ending(Case):
    def test_sigterm_lets_requests_end_and_removes_the_socket(self):
        d = self.start("--model", "tiny")
        with d.connect() as c, d.connect() as watcher:
            watcher.call("gqa.ping")
            id = c.send("text.generate", LONG)
            c.wait_events(id, 1)
            d.signal(signal.SIGTERM)
            self.assertEqual(c.wait(id)["n_generated"], 2000)
            self.assertIn(("gqa.draining", []), c.notifications)
            watcher.wait_end()
            self.assertIn(("gqa.draining", []), watcher.notifications)
        self.ended(d)
        self.assertFalse(os.path.exists(d.socket))

    def test_what_takes_too_long_is_cut(self):
        d = self.start("--model", "tiny", "--drain-timeout-ms", "50", "-c", "32768")
        with d.connect() as c:
            id = c.send("text.generate", {**LONG, "n_predict": 30000})
            c.wait_events(id, 1)
            d.signal(signal.SIGTERM)
            with self.assertRaises(wire.Refused) as caught:
                c.wait(id)
            self.assertEqual(caught.exception.name, "DRAINING")
        self.ended(d)

    def test_sigint_ends_as_well(self):
        d = self.start()
        d.signal(signal.SIGINT)
        self.ended(d)
        self.assertFalse(os.path.exists(d.socket))

    def test_a_second_signal_ends_at_once(self):
        d = self.start("--model", "tiny", "-c", "32768")
        with d.connect() as c:
            id = c.send("text.generate", {**LONG, "n_predict": 30000})
            c.wait_events(id, 1)
            d.signal(signal.SIGTERM)
            while not c.notifications:
                c.receive()
            d.signal(signal.SIGTERM)
            self.ended(d, 128 + signal.SIGTERM)
        self.assertFalse(os.path.exists(d.socket))

    def test_drain_refuses_new_work_and_answers_at_the_end(self):
        d = self.start("--model", "tiny")
        with d.connect() as c, d.connect() as other:
            id = c.send("text.generate", LONG)
            c.wait_events(id, 1)
            drain = other.send("server.drain")
            while not other.notifications:
                other.receive()
            with self.assertRaises(wire.Refused) as caught:
                c.call("text.generate", LONG)
            self.assertEqual(caught.exception.name, "DRAINING")
            self.assertEqual(c.call("gqa.ping"), {})
            self.assertEqual(c.wait(id)["n_generated"], 2000)
            self.assertEqual(other.wait(drain), {})
        self.ended(d)


class Places(Case):
    def test_a_second_daemon_does_not_take_the_socket(self):
        first = self.start()
        done = subprocess.run([GQAD, "--user", "--socket", first.socket, "--cache-dir", self.folder.path + "/c2"],
                              capture_output=True, timeout=60)
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertIn(b"another daemon", done.stderr)
        with first.connect() as c:
            self.assertEqual(c.call("gqa.ping"), {})

    def test_a_stale_socket_is_replaced(self):
        first = self.start()
        first.signal(signal.SIGKILL)
        self.ended(first, -signal.SIGKILL)
        self.assertTrue(os.path.exists(first.socket))
        second = self.start()
        with second.connect() as c:
            self.assertEqual(c.call("gqa.ping"), {})

    def test_a_file_that_is_no_socket_stays(self):
        path = os.path.join(self.folder.path, "s")
        with open(path, "w") as f:
            f.write("precious")
        done = subprocess.run([GQAD, "--user", "--socket", path, "--cache-dir", self.folder.path + "/c"],
                              capture_output=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        with open(path) as f:
            self.assertEqual(f.read(), "precious")

    def test_a_path_that_is_too_long_is_told(self):
        done = subprocess.run([GQAD, "--user", "--socket", "/tmp/" + "x" * 200, "--cache-dir", self.folder.path + "/c"],
                              capture_output=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(b"107", done.stderr)

    def test_socket_and_cache_are_private(self):
        d = self.start()
        self.assertEqual(os.stat(d.socket).st_mode & 0o777, 0o600)
        self.assertEqual(os.stat(os.path.join(self.folder.path, "cache")).st_mode & 0o777, 0o700)


class Passed(Case):
    def test_socket_activation(self):
        tool = shutil.which("systemd-socket-activate")
        if tool is None:
            self.skipTest("no systemd-socket-activate here: socket activation was NOT tested")
        d = self.start(prefix=[tool, "-l", os.path.join(self.folder.path, "activated")], ready=False)
        path = os.path.join(self.folder.path, "activated")
        with wire.connect_when_listening(path) as c:
            self.assertEqual(c.call("gqa.ping"), {})
            self.assertFalse(os.path.exists(d.socket))
            d.signal(signal.SIGTERM)
            c.wait_end()
        self.ended(d)
        self.assertTrue(os.path.exists(path), "the manager's socket is the manager's")

    def test_one_connection_and_a_lifetime(self):
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        d = self.start("--serve-fd", str(theirs.fileno()), "--lifetime-fd", str(read_end), listen=False,
                       fds=(theirs.fileno(), read_end))
        theirs.close()
        os.close(read_end)
        with wire.Client(sock=ours) as c:
            self.assertEqual(c.generate(model="tiny", tokens=[1, 5], n_predict=2, ignore_eos=True)["n_generated"], 2)
            os.close(write_end)
            c.wait_end()
        self.ended(d)

    def test_the_only_client_leaving_ends_the_daemon(self):
        ours, theirs = socket.socketpair()
        d = self.start("--serve-fd", str(theirs.fileno()), listen=False, fds=(theirs.fileno(),))
        theirs.close()
        with wire.Client(sock=ours) as c:
            c.call("gqa.ping")
        self.ended(d)

    def test_an_only_client_that_is_refused_ends_the_daemon(self):
        """Nobody else could ever come."""
        with socket.create_server(("127.0.0.1", 0)) as listener:  # of whose clients nobody knows the uid
            with socket.create_connection(listener.getsockname()) as ours:
                theirs, _ = listener.accept()
                with theirs:
                    done = subprocess.run([GQAD, "--user", "--serve-fd", str(theirs.fileno())],
                                          pass_fds=(theirs.fileno(),), capture_output=True, text=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("its connection was refused", done.stderr)

    def test_a_private_daemon_leaves_nothing_behind(self):
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryDirectory() as base:
            process = subprocess.Popen([GQAD, "--user", "--serve-fd", str(theirs.fileno())],
                                       pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env={**os.environ, "TMPDIR": base})
            theirs.close()
            self.assertEqual(process.stdout.readline(), b"READY\n")
            ours.close()
            process.communicate(timeout=60)
            self.assertEqual((process.returncode, os.listdir(base)), (0, []))


class Configuration(Case):
    def check(self, text, *flags, environment=None):
        path = os.path.join(self.folder.path, "c.conf")
        with open(path, "w") as f:
            f.write(text)
        done = subprocess.run([GQAD, "--user", "--socket", "/nowhere/s", "--check-config", "--config", path, *flags],
                              capture_output=True, text=True, timeout=60, env={**os.environ, **(environment or {})})
        return done.returncode, done.stderr

    def test_errors_name_file_line_and_key(self):
        for text, line, *words in (
                ("ctx_size = many\n", 1, "ctx_size", "many"), ("\n\nbatch_size = 0\n", 3, "batch_size"),
                ("# fine\nlog_level = loud\n", 2, "log_level", "loud"), ("kv_bytes = 8X\n", 1, "kv_bytes"),
                ("colour = red\n", 1, "colour"), ("io_uring = perhaps\n", 1, "io_uring"),
                ("cache_type_k = q17\n", 1, "cache_type_k", "q17")):
            with self.subTest(text):
                status, err = self.check(text)
                self.assertEqual(status, 78, err)
                self.assertIn(f"c.conf:{line}:", err)
                for word in words:
                    self.assertIn(word, err)

    def test_names_that_are_unknown_here(self):
        for text, *words in (('user_weight = {"root=2",\n"root=0"}\n', "user_weight", "root=0", "1 and 1000"),
                             ('\nadmin_group = "no group of that name"\n', "admin_group", "no such group"),
                             ('\nkv_realm = "../a"\n', "kv_realm", "../a")):
            with self.subTest(text):
                status, err = self.check(text)
                self.assertEqual(status, 78, err)
                self.assertIn("c.conf:2: ", err)
                for word in words:
                    self.assertIn(word, err)

    def test_what_is_missing_is_told_at_the_start(self):
        d = self.start("--models-dir", "/nowhere/models", "--backend", "fast:isa=x", "--attention", "cpu")
        self.assertIn("models_dir /nowhere/models: No such file or directory\n", d.log_text())
        self.assertIn("backend = fast:isa=x: no plugin is called 'fast'", d.log_text())
        self.assertNotIn("attention = ", d.log_text())

    def test_a_plugin_that_is_not_usable_is_told_once(self):
        folder = os.path.join(self.folder.path, "plugins")
        os.mkdir(folder)
        shutil.copy(os.environ["GQAD_TEST_CPU"], os.path.join(folder, "open.so"))
        os.chmod(os.path.join(folder, "open.so"), 0o666)
        log = self.start("--plugin-dir", folder).log_text()
        self.assertEqual(log.count("mode 0666"), 1, log)
        self.assertIn(f"plugin {folder}/open.so is not usable: mode 0666", log)

    def test_version(self):
        for program in (GQAD, SYNTH):
            done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertRegex(done.stdout, rf"^{os.path.basename(program)} \d+\.\d+\.\d+\n$")

    def test_closed_standard_descriptors(self):
        """The log must not end in a file that happens to get the number."""
        d = self.start("--model", "tiny", prefix=("sh", "-c", 'exec "$@" 0<&- 2>&-', "sh"))
        at = [os.readlink(f"/proc/{d.process.pid}/fd/{fd}") for fd in (0, 2)]
        self.assertEqual(at, ["/dev/null"] * 2)

    def test_errors_of_environment_and_flags_name_those(self):
        status, err = self.check("", environment={"GQAD_CTX_SIZE": "x"})
        self.assertEqual(status, 78)
        self.assertIn("GQAD_CTX_SIZE", err)
        status, err = self.check("", "-c", "x")
        self.assertEqual(status, 78)
        self.assertIn("ctx_size", err)
        self.assertEqual(self.check("", "--no-such-flag")[0], 64)
        self.assertEqual(self.check("", "argument")[0], 64)

    def test_good_values_of_every_kind(self):
        self.assertEqual(self.check('ctx_size = 4096\nkv_bytes = 8GiB\nmodels_dir = {"/a", "/b"}\nio_uring = off\n',
                                    "-np", "4", "-ctk", "f32", "--ctv", "bf16"), (0, ""))
        self.assertEqual(self.check("cache_type_k = q8_0\n", "-ctv", "q4_0"), (0, ""))

    def test_a_missing_file_is_an_error_when_it_was_named(self):
        done = subprocess.run([GQAD, "--user", "--check-config", "--config", "/nowhere/gqad.conf"],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 78)
        self.assertIn("/nowhere/gqad.conf", done.stderr)

    def test_flag_beats_environment_beats_file(self):
        d = self.start("-c", "192", config="ctx_size = 64\nbatch_size = 32\n",
                       environment={"GQAD_CTX_SIZE": "128"})
        with d.connect() as c:
            self.assertEqual(c.call("model.load", {"model": "tiny"})["n_ctx"], 192)

    def test_environment_beats_file(self):
        d = self.start(config="ctx_size = 64\n", environment={"GQAD_CTX_SIZE": "128"})
        with d.connect() as c:
            self.assertEqual(c.call("model.load", {"model": "tiny"})["n_ctx"], 128)

    def test_reload_moves_to_other_folders_of_models(self):
        d = self.start(models=False, config='models_dir = {"%s/models"}\n' % self.folder.path)
        with d.connect() as c:
            self.assertEqual([m["name"] for m in c.call("model.list")["models"]], ["tiny"])
            c.call("model.load", {"model": "tiny"})
            os.mkdir(os.path.join(self.folder.path, "more"))
            shutil.copy(os.path.join(self.folder.path, "models", "tiny.gguf"),
                        os.path.join(self.folder.path, "more", "other.gguf"))
            with open(os.path.join(self.folder.path, "gqad.conf"), "w") as f:
                f.write('models_dir = {"%s/more"}\n' % self.folder.path)
            c.call("server.reload")
            states = {m["name"]: m["state"] for m in c.call("model.list")["models"]}
            self.assertEqual(states, {"tiny": "loaded", "other": "available"})

    def test_reload_changes_what_it_can_and_keeps_the_rest(self):
        d = self.start(config="max_calls_per_user = 1000\n")
        path = os.path.join(self.folder.path, "gqad.conf")
        with d.connect() as c:
            with open(path, "w") as f:
                f.write("max_calls_per_user = 77\nctx_size = 99\n")
            d.signal(signal.SIGHUP)
            wire.wait_until(lambda: c.call("gqa.hello")["limits"]["calls_per_user"] == 77, "the limit has changed")
            self.assertIn("ctx_size has changed: it needs a restart", d.log_text())

            with open(path, "w") as f:
                f.write("max_calls_per_user = 5\nnonsense = 1\n")
            with self.assertRaises(wire.Refused) as caught:
                c.call("server.reload")
            self.assertIn("gqad.conf:2", caught.exception.message)
            self.assertEqual(c.call("gqa.hello")["limits"]["calls_per_user"], 77)


@unittest.skipUnless(os.geteuid() == 0, "needs root: a system daemon and other users")
class System(Case):
    def test_strangers_use_it_but_do_not_govern(self):
        d = self.start("--group", "", user=False)
        os.chmod(d.socket, 0o666)
        os.chmod(self.folder.path, 0o711)
        os.chmod(os.path.join(self.folder.path, "log"), 0o644)

        def action():
            with wire.Client("s") as c:
                return govern(c)

        def govern(c):
            hello = c.call("gqa.hello")
            if hello["admin"] or hello["uid"] != STRANGER or hello["realm"] != str(STRANGER):
                return 1
            if c.generate(model="tiny", tokens=[1, 5], n_predict=2, ignore_eos=True)["n_generated"] != 2:
                return 2
            for method, params in (("model.load", {"model": "tiny"}), ("model.unload", {"model": "tiny"}),
                                   ("server.drain", {}), ("server.reload", {})):
                try:
                    c.call(method, params)
                    return 3
                except wire.Refused as e:
                    if e.name != "ACCESS_DENIED":
                        return 4
            if any("path" in m for m in (*c.call("model.list")["models"], *c.call("backend.list")["backends"],
                                         c.call("model.info", {"model": "tiny"}))):
                return 5
            for model, words in (("broken", "broken.gguf: "), ("absent", "'absent' in the models folders")):
                try:
                    c.call("text.tokenize", {"model": model, "text": "x"})
                    return 8
                except wire.Refused as e:
                    if words not in e.message or "/" in e.message:
                        return 9
            try:
                c.call("text.tokenize", {"model": "/etc/passwd", "text": "x"})
                return 6
            except wire.Refused as e:
                return 0 if e.name != "MODEL_REFUSED" else 7
        with open(os.path.join(self.folder.path, "models", "broken.gguf"), "wb") as f:
            f.write(b"GGUF" + bytes(60))
        self.assertEqual(as_stranger(self.folder.path, action), 0)
        self.assertIn(f.name, d.log_text())
        with d.connect() as c:
            entries = (c.call("model.info", {"model": "tiny"}), *c.call("backend.list")["backends"])
            self.assertTrue(all(os.path.isabs(e["path"]) for e in entries))

    def test_members_of_admin_group_govern(self):
        group = next((g for g in grp.getgrall() if g.gr_gid not in (0, STRANGER)), None)
        if group is None:
            self.skipTest("no group but root's here: admin_group was NOT tested")
        d = self.start("--group", "", "--admin-group", group.gr_name, user=False)
        os.chmod(d.socket, 0o666)
        os.chmod(self.folder.path, 0o711)

        def is_admin():
            with wire.Client("s") as c:
                return 0 if c.call("gqa.hello")["admin"] else 1
        self.assertEqual(as_stranger(self.folder.path, is_admin), 1)
        self.assertEqual(as_stranger(self.folder.path, is_admin, groups=[group.gr_gid]), 0)

    def test_a_namespace_that_hides_users_is_refused(self):
        tool = shutil.which("unshare")
        if tool is None or subprocess.run([tool, "-U", "-r", "true"]).returncode != 0:
            self.skipTest("no user namespaces here: uid_map was NOT tested")
        done = subprocess.run([tool, "-U", "-r", GQAD, "--socket", os.path.join(self.folder.path, "s"),
                               "--cache-dir", os.path.join(self.folder.path, "c"),
                               "--config", "/dev/null"], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 78, done.stderr)
        self.assertIn("user namespace", done.stderr)


class Filtered(Case):
    """What a unit's or a container's filter of system calls may refuse."""

    def test_without_short_slices_it_serves_and_says_so_once(self):
        if os.uname().machine not in forbid.NUMBERS:
            self.skipTest("the number of sched_setattr is not known here: NOT tested")
        d = self.start(prefix=(sys.executable, forbid.__file__, "sched_setattr"))
        with d.connect() as c:
            self.assertEqual(c.call("gqa.ping"), {})
        self.assertEqual(d.log_text().count("usual time slices"), 1, d.log_text())


class Memory(Case):
    def anonymous_bytes(self, d):
        with open(f"/proc/{d.process.pid}/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon:"))

    def test_weights_that_are_not_packed_stay_in_the_file(self):
        """Activations and KV of a few rows may grow; 50 MB of weights may not turn up a second time."""
        path = os.path.join(self.folder.path, "models", "mapped.gguf")
        synth(path, "tiny,n_embd=512,n_ff=2048,n_layers=6", "f16")
        d = self.start()
        before = self.anonymous_bytes(d)
        with d.connect() as c:
            c.call("model.load", {"model": "mapped"})
            c.call("text.generate", {"model": "mapped", "tokens": [1, 40, 41], "n_predict": 2, "stream": False})
        self.assertLess(self.anonymous_bytes(d) - before, os.path.getsize(path) / 2)


if __name__ == "__main__":
    main()
