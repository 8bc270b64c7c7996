#!/usr/bin/env python3
"""That the guards of the ABI see what they are there for: changes of a copy of the header, allowed and not."""
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
COMPILER = sys.argv[1:]
ABI = HERE / "abi.py"


class Guards(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="gqad-test-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        shutil.copytree(HERE / "1.0" / "gqa", self.folder / "gqa")
        self.header = self.folder / "gqa" / "plugin.h"

    def change(self, before, after):
        text = self.header.read_text()
        self.assertIn(before, text)
        self.header.write_text(text.replace(before, after, 1))

    def build(self, includes, name):
        library = self.folder / name
        subprocess.run([*COMPILER, "-g", "-shared", "-fPIC", f"-I{includes}", HERE / "witness.c", "-o", library], check=True)
        return library

    def verdicts(self):
        """What the record and abidiff say: texts, empty where nothing is wrong."""
        keeps = subprocess.run([sys.executable, ABI, "keeps", HERE / "1.0" / "plugin.abi", self.header, *COMPILER],
                               stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        if shutil.which("abidiff") is None:
            print("SKIPPED: no abidiff here")
            return keeps.stderr, None
        old, new = self.build(HERE / "1.0", "old.so"), self.build(self.folder, "new.so")
        diff = subprocess.run([sys.executable, ABI, "diff", old, new], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        return keeps.stderr, diff.stdout if diff.returncode else ""

    def broken(self, *words):
        by_record, by_debug = self.verdicts()
        for word in ("breaks the ABI", "docs/plugin-abi.md", *words):
            self.assertIn(word, by_record)
        if by_debug is not None:
            self.assertIn("breaks the frozen ABI", by_debug)

    def kept(self):
        by_record, by_debug = self.verdicts()
        self.assertEqual(by_record, "")
        self.assertIn(by_debug, ("", None))

    def test_what_is_frozen_is_kept(self):
        self.kept()

    def test_tables_and_batches_grow_at_their_end(self):
        self.change("uint32_t n_votes, float *votes);\n};\n\n#ifdef", "uint32_t n_votes, float *votes);\n"
                    "    int (*trim)(void *context);\n};\n\n#ifdef")
        self.change("const struct gqa_attn_batch *attention;\n};", "const struct gqa_attn_batch *attention;\n"
                    "    const float *more;\n};")
        self.change("GQA_PLUGIN_ABI_MINOR 0u", "GQA_PLUGIN_ABI_MINOR 3u")
        self.kept()

    def test_elements_of_arrays_do_not_grow(self):
        self.change("    const uint64_t *new_mask;\n};", "    const uint64_t *new_mask;\n    uint64_t more;\n};")
        self.broken("must keep its size for good: struct    gqa_attn_seq 32 bytes",
                    "a new member of a struct that must stay")

    def test_growth_fills_no_holes(self):
        self.change("    uint32_t n_shared;\n", "    uint32_t n_shared;\n    uint32_t more;\n")
        self.broken("gqa_attn_batch.more at 36")

    def test_enums_get_more_values(self):
        self.change("    GQA_OP_EXPERTS = 11 ", "    GQA_OP_MORE = 12,\n    GQA_OP_EXPERTS = 11 ")
        self.kept()

    def test_members_do_not_move(self):
        self.change("    uint32_t n_rows, n_out;\n", "    uint32_t n_out, n_rows;\n")
        self.broken("is gone, or another: member    gqa_batch.n_rows at 4")

    def test_types_of_members_and_arguments_stay(self):
        self.change("int (*end)(void *context, void *program);", "int (*end)(void *context, void *program, int how);")
        self.broken("gqa_program.end")

    def test_constants_stay(self):
        self.change("GQA_OP_GATHER = 10,", "GQA_OP_GATHER = 12,")
        self.broken("constant  GQA_OP_GATHER 10")

    def test_nothing_goes(self):
        self.change("    uint64_t packed_bytes;\n", "")
        self.broken("gqa_weight.packed_bytes")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
