"""A disk that can stop answering: a folder seen through FUSE, whose every operation waits while it is dead.

    with disk.Disk(folder) as d:    # d.path is the mounted folder
        d.die()
        ...
        d.revive()

Needs root and Debian's python3-fusepy; MISSING tells what is not there. This file is also the program that serves the
folder, run by the system's Python, which has that module."""
import os
import subprocess
import sys
import threading

PYTHON = "/usr/bin/python3"


def _missing():
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs root and /dev/fuse"
    if subprocess.run([PYTHON, "-c", "import fusepy"], stderr=subprocess.DEVNULL).returncode != 0:
        return f"needs python3-fusepy for {PYTHON}"
    return None


MISSING = _missing()


class NotMounted(Exception):
    """The system does not let us."""


class Disk:
    """folder/disk, kept in folder/on-disk."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "disk")
        self.kept = os.path.join(folder, "on-disk")
        os.mkdir(self.path)
        os.mkdir(self.kept)
        self.process = subprocess.Popen([PYTHON, __file__, self.kept, self.path], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        try:
            self._say("live")
        except (AssertionError, BrokenPipeError) as e:
            self.process.kill()
            self.process.communicate()
            raise NotMounted(str(e))

    def _say(self, word):
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer != word.encode() + b"\n":
            raise AssertionError(f"the disk answers {answer!r}, status {self.process.poll()}")

    def die(self):
        self._say("die")

    def revive(self):
        self._say("live")

    def wait_for_waiting(self):
        """Until somebody waits for the dead disk."""
        self._say("wait")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.revive()
        self.process.stdin.close()  # it unmounts
        self.process.wait(60)
        self.process.stdout.close()


# ---- the program -------------------------------------------------------------------------------------------------


def serve(kept, mounted):
    import fusepy

    is_mounted, alive, waited_for = threading.Event(), threading.Event(), threading.Event()

    class Folder(fusepy.Operations):
        use_ns = True

        def __call__(self, operation, path, *arguments):
            if operation == "init":
                is_mounted.set()
            elif not alive.is_set():
                waited_for.set()
                alive.wait()
            return super().__call__(operation, kept + path, *arguments)

        def access(self, path, mode):
            return 0

        def chmod(self, path, mode):
            return os.chmod(path, mode)

        def chown(self, path, uid, gid):
            return os.chown(path, uid, gid)

        def create(self, path, mode, fi=None):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

        def fsync(self, path, datasync, fd):
            return os.fdatasync(fd) if datasync else os.fsync(fd)

        def getattr(self, path, fd=None):
            s = os.lstat(path)
            return {"st_mode": s.st_mode, "st_nlink": s.st_nlink, "st_uid": s.st_uid, "st_gid": s.st_gid,
                    "st_size": s.st_size, "st_blocks": s.st_blocks, "st_atime": s.st_atime_ns,
                    "st_mtime": s.st_mtime_ns, "st_ctime": s.st_ctime_ns}

        def mkdir(self, path, mode):
            return os.mkdir(path, mode)

        def open(self, path, flags):
            return os.open(path, flags)

        def read(self, path, size, offset, fd):
            return os.pread(fd, size, offset)

        def readdir(self, path, fd):
            return [".", "..", *os.listdir(path)]

        def release(self, path, fd):
            return os.close(fd)

        def rename(self, old, new):
            return os.rename(old, kept + new)

        def rmdir(self, path):
            return os.rmdir(path)

        def statfs(self, path):
            s = os.statvfs(path)
            return {key: getattr(s, key) for key in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail",
                                                     "f_ffree", "f_files", "f_flag", "f_frsize", "f_namemax")}

        def truncate(self, path, length, fd=None):
            return os.truncate(path if fd is None else fd, length)

        def unlink(self, path):
            return os.unlink(path)

        def utimens(self, path, times=None):
            return os.utime(path, ns=times)

        def write(self, path, data, offset, fd):
            return os.pwrite(fd, data, offset)

    def obey():
        for line in sys.stdin:
            word = line.strip()
            if word == "live":
                is_mounted.wait()
                alive.set()
            elif word == "die":
                waited_for.clear()
                alive.clear()
            elif word == "wait":
                waited_for.wait()
            print(word, flush=True)
        alive.set()
        subprocess.run(["umount", "-l", mounted])

    threading.Thread(target=obey, daemon=True).start()
    fusepy.FUSE(Folder(), mounted, foreground=True, allow_other=True, default_permissions=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
