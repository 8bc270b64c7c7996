"""Runs gqa as a user would, and looks at all that a user sees: status, output, complaints."""
import json
import math
import os
import subprocess
from array import array

from harness import SharedDaemon

GQA = os.environ["GQAD_TEST_GQA"]
TIMEOUT_S = 60


class Outcome:
    def __init__(self, arguments, status, out, err):
        self.arguments, self.status, self.out, self.err = arguments, status, out, err

    def __str__(self):
        return f"gqa {' '.join(map(str, self.arguments))}: status {self.status}\n{self.out[-2000:]!r}\n{self.err[-2000:]!r}"

    @property
    def text(self):
        return self.out.decode()

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


def environment(folder):
    """Nothing of this user's own is found or touched; names are the variables that matter."""
    own = {name: folder for name in ("HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME",
                                     "XDG_CONFIG_HOME")}
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("GQA_", "GQAD_"))}
    return {**rest, **own}


class Tool:
    """gqa with fixed first arguments: a socket, or --spawn."""

    def __init__(self, folder, *first):
        self.folder, self.first = folder, [str(a) for a in first]

    def __call__(self, *arguments, input=None, status=0, variables=None):
        """Runs to the end. A failure must be one line on standard error, `gqa: what: why`."""
        arguments = self.first + [str(a) for a in arguments]
        stdin = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
        done = subprocess.run([GQA, *arguments], capture_output=True, timeout=TIMEOUT_S,
                              env={**environment(self.folder), **(variables or {})}, cwd=self.folder, **stdin)
        outcome = Outcome(arguments, done.returncode, done.stdout, done.stderr.decode())
        assert outcome.status == status, str(outcome)
        if status == 0 and "--stats" not in arguments:
            assert outcome.err == "", str(outcome)
        elif status != 0 and status != 130:
            assert_one_line(outcome)
        return outcome

    def start(self, *arguments, **options):
        """Begins; the caller reads, signals and waits."""
        return subprocess.Popen([GQA, *self.first, *[str(a) for a in arguments]], stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder,
                                env=environment(self.folder), **options)


def assert_one_line(outcome):
    line, end, more = outcome.err.partition("\n")
    assert end and not more and line.startswith("gqa: ") and line.count(": ") >= 2, str(outcome)


class ToolCase(SharedDaemon):
    """Tests that run gqa against one daemon."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.gqa = Tool(cls.folder.path, "--socket", cls.daemon.socket)

    def refused(self, *arguments, words, status=1, **options):
        """It fails with that status and a line that holds the words."""
        outcome = self.gqa(*arguments, status=status, **options)
        for word in words:
            self.assertIn(str(word), outcome.err)
        self.assertEqual(outcome.out, b"")

    def logits(self, model, ids, *more):
        """Of all rows, one behind the other."""
        file, out = write_json(self.path("ids.json"), ids), self.path("out.f32")
        self.gqa("logits", "-m", model, "--tokens", file, "-o", out, *more)
        return read_f32(out)


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f)
    return path


def read_f32(path):
    values = array("f")
    with open(path, "rb") as f:
        values.frombytes(f.read())
    return values


def rows_of(values, n_columns):
    return [values[i:i + n_columns] for i in range(0, len(values), n_columns)]


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


def mean_kl(truth, candidate, n_columns):
    """KL(truth || candidate) in nats, averaged over rows."""
    sums = []
    for t, c in zip(rows_of(truth, n_columns), rows_of(candidate, n_columns)):
        p, q = log_softmax(t), log_softmax(c)
        sums.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)))
    return math.fsum(sums) / len(sums)
