#!/usr/bin/env python3
"""The public headers against their record: what a program was compiled with must not change by accident.

  abi.py check  RECORD HEADER COMPILER...     compares, and tells each line that differs
  abi.py update RECORD HEADER COMPILER...     writes the record anew
  abi.py keeps  RECORD HEADER COMPILER...     the header still has all that the record of a frozen version has
  abi.py diff   OLD.so NEW.so                 the same by abidiff, from two libraries' debug information
  abi.py symbols LIBRARY VERSION HEADER       a library exports the header's functions, and nothing else
  abi.py symbols LIBRARY - NAME...            a plugin exports these names, and nothing else

The record has every constant, enumerator, member of a struct (offset, size, type) and function of the
header, as the compiler sees them: a new member shows even where it fills a hole. It is made for 64-bit
Linux; elsewhere sizes differ, and the check is skipped."""
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

INCLUDES = ("plugins/include", "client/include")


def read(path):
    """The header without comments, preprocessor lines and what is C++'s; and its macros, numbers and texts."""
    with open(path) as f:
        text = f.read()
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S).replace("\\\n", " ")
    text = re.sub(r"#ifdef __cplusplus.*?#endif", " ", text, flags=re.S)
    numbers = re.findall(r"^#define (GQA_\w+)[ \t]+(?:\(?-?\d\S*|.*<<.*)[ \t]*$", text, flags=re.M)
    texts = re.findall(r'^#define (GQA_\w+)[ \t]+"[^"]*"[ \t]*$', text, flags=re.M)
    return re.sub(r"^#.*$", " ", text, flags=re.M), numbers, texts


def split(text, end):
    """Pieces of text that end with the character, outside of brackets."""
    pieces, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if c == end and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return pieces + [text[start:]]


def declarations(text):
    """The header's declarations; bodies of inline functions end one without a semicolon."""
    text = text.replace("GQA_INLINE ", "static inline ")  # which it is but for CUDA compilers
    while True:
        text = text.strip()
        if not text:
            return
        inline = re.match(r"static inline[^{;]*\{", text)
        if inline:
            depth, i = 1, inline.end()
            while depth > 0:
                depth += (text[i] == "{") - (text[i] == "}")
                i += 1
            yield text[:inline.end() - 1]
            text = text[i:]
            continue
        first = split(text, ";")[0]
        yield first
        text = text[len(first) + 1:]


def squeeze(text):
    return " ".join(text.split())


def members(body, path):
    """(path, type) of each member, those of unnamed structs and unions inside included."""
    for declaration in filter(str.strip, split(body, ";")):
        inner = re.match(r"\s*(?:struct|union)\s*\{(.*)\}\s*(\w+)\s*$", declaration, flags=re.S)
        pointer = re.search(r"\(\*\s*(\w+)\)", declaration)
        if inner:
            yield path + inner[2], "{}"
            yield from members(inner[1], path + inner[2] + ".")
        elif pointer:
            yield path + pointer[1], squeeze(declaration.replace(pointer[0], "(*)"))
        else:
            base = None
            for declarator in split(declaration, ","):
                name = re.search(r"(\w+)\s*((?:\[[^]]*\])*)\s*$", declarator)
                before = declarator[:name.start()]
                stars = before[len(before.rstrip("* ")):]
                base = squeeze(before[:len(before) - len(stars)]) if base is None else base
                yield path + name[1], squeeze(f"{base} {stars.replace(' ', '')}{name[2]}")


def program(header):
    """C that prints the record; and the header's functions."""
    text, numbers, texts = read(header)
    functions = []
    lines = [f'printf("constant  {n} %lld\\n", (long long)({n}));' for n in numbers]
    lines += [f'puts("constant  {t} " {t});' for t in texts]
    for declaration in declarations(text):
        body = re.match(r"(struct|enum)\s+(\w+)\s*\{(.*)\}\s*$", declaration, flags=re.S)
        function = re.search(r"\b(gqa_\w+)\s*\(", declaration)
        if body and body[1] == "enum":
            for value in filter(str.strip, split(body[3], ",")):
                name = value.split("=")[0].strip()
                lines.append(f'printf("constant  {name} %lld  enum {body[2]}\\n", (long long){name});')
        elif body:
            kind = f"struct {body[2]}"
            lines.append(f'printf("struct    {body[2]} %zu bytes, aligned to %zu\\n", sizeof({kind}), _Alignof({kind}));')
            for path, type in members(body[3], ""):
                lines.append(f'printf("member    {body[2]}.{path} at %zu, %zu bytes  {type}\\n", '
                             f'offsetof({kind}, {path}), sizeof((({kind} *)0)->{path}));')
        elif declaration.startswith("static inline") or declaration.startswith("typedef") or function:
            what = "typedef " if declaration.startswith("typedef") else "inline  " if "inline" in declaration else "function"
            if what == "function":
                functions.append(function[1])
            lines.append(f'puts("{what}  {squeeze(declaration)}");')
        elif not re.match(r"struct \w+\s*$", declaration):
            sys.exit(f"{header}: not understood: {squeeze(declaration)}")
    header = os.path.abspath(header)
    name = os.path.relpath(header, include_folder(header))
    return "\n".join([f"#include <{name}>", "#include <stddef.h>", "#include <stdio.h>", "int main(void)", "{",
                      *lines, "return 0;", "}"]), functions


def include_folders():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [os.path.join(root, i) for i in INCLUDES]


def include_folder(header):
    """Where <gqa/...> is of a header that is called so."""
    return os.path.dirname(os.path.dirname(os.path.abspath(header)))


def describe(header, compiler):
    with tempfile.TemporaryDirectory() as folder:
        source, binary = os.path.join(folder, "abi.c"), os.path.join(folder, "abi")
        with open(source, "w") as f:
            f.write(program(header)[0])
        includes = [f"-I{i}" for i in (include_folder(header), *include_folders())]
        subprocess.run([*compiler, "-std=c11", *includes, source, "-o", binary], check=True)
        return subprocess.run([binary], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def check(record, header, compiler):
    with open(record) as f:
        before = f.read().splitlines()
    now = describe(header, compiler)
    differences = [f"- {line}" for line in before if line not in now] + [f"+ {line}" for line in now if line not in before]
    if before != now and not differences:
        differences = ["only the order differs"]
    for line in differences:
        print(line)
    if differences:
        sys.exit(f"{header} is not what {record} says. If that is meant: raise the version that goes with it "
                 f"(docs/plugin-abi.md, docs/client.md), then run\n"
                 f"    python3 tests/abi/abi.py update {record} {header} cc")
    print(f"{len(now)} lines of {record} hold")


# ---- what a frozen version keeps ----------------------------------------------------------------------------------

# Structs that may grow at their end: those that begin with their size, but for one that plugins assign as a whole,
# and what an op's room holds.
GROW = {"gqa_host", "gqa_plugin", "gqa_attn_layer", "gqa_attn_batch", "gqa_attention", "gqa_program_desc", "gqa_batch",
        "gqa_program"}
ROOM = {"gqa_op_experts": 128}  # bytes that it may have, in gqa_op.u
RULES = """
Whoever was built with the frozen version would read something else there. What may grow does so at its end;
what cannot gets an interface of another name. docs/plugin-abi.md, "Versions", has the rules."""


def size_of(line):
    return int(re.match(r"struct\s+\w+ (\d+) bytes", line)[1])


def broken_line(line, now):
    """What is wrong with a line of the record, or None."""
    if line in now:
        return None
    if line.startswith("constant  GQA_PLUGIN_ABI_MINOR "):
        later = next((n for n in now if n.startswith("constant  GQA_PLUGIN_ABI_MINOR ")), "x -1")
        return None if int(later.split()[-1]) >= int(line.split()[-1]) else f"is gone, or less: {line}"
    if line.startswith("struct "):
        name = line.split()[1]
        grown = next((n for n in now if n.startswith("struct ") and n.split()[1] == name), None)
        if grown is None:
            return f"is gone: struct {name}"
        same_alignment = grown.split()[-1] == line.split()[-1]
        if same_alignment and size_of(line) < size_of(grown) and (name in GROW or size_of(grown) <= ROOM.get(name, 0)):
            return None
        return f"must keep its size for good: {line.strip()}; now {grown.split(maxsplit=2)[2]}"
    return f"is gone, or another: {line}"


def stranger(line, sizes):
    """What is wrong with a line that the record has not, or None: members come behind all others, in no hole."""
    member = re.match(r"member\s+(\w+)\.(\S+) at (\d+)", line)
    if not member or member[1] not in sizes or (member[1] == "gqa_op" and member[2].startswith("u.")):
        return None
    if member[1] not in GROW and member[1] not in ROOM:
        return f"a new member of a struct that must stay as it is: {line}"
    return None if int(member[3]) >= sizes[member[1]] else f"a new member within what was there, maybe in a hole: {line}"


def keeps(record, header, compiler):
    with open(record) as f:
        before = f.read().splitlines()
    now = describe(header, compiler)
    sizes = {line.split()[1]: size_of(line) for line in before if line.startswith("struct ")}
    wrong = [w for w in (broken_line(line, set(now)) for line in before) if w]
    wrong += [w for w in (stranger(line, sizes) for line in now if line not in before) if w]
    if wrong:
        sys.exit("\n".join([f"{header} breaks the ABI that {record} has frozen:", *wrong]) + RULES)
    print(f"{len(before)} lines of {record} are kept")


def may_change(block):
    """Whether a change that abidiff tells is growth: members behind all others, or another enumerator."""
    name = re.match(r"'(?:struct|enum) (\w+) at ", block[0])
    end = re.search(r"type size changed from (\d+) to", "\n".join(block))
    grows = name and (name[1] in GROW or (end and name[1] in ROOM))
    part = ""
    for line in block[1:]:
        if line.startswith("    ") and part == "member":
            offset = re.search(r"at offset (\d+)", line)
            if not (grows and end and offset and int(offset[1]) >= int(end[1])):
                return False
        elif line.startswith("    "):
            if part != "enumerator":
                return False
        else:
            kind = re.match(r"  \d+ (?:data )?(member|enumerator) insertions?:", line)
            part = kind[1] if kind else ""
            if not kind and not re.match(r"  type size (?:hasn't changed|changed from)", line):
                return False
    return True


def diff(old, new):
    if shutil.which("abidiff") is None:
        print("SKIPPED: no abidiff here (Debian: abigail-tools)")
        sys.exit(77)
    r = subprocess.run(["abidiff", "--leaf-changes-only", "--no-added-syms", old, new], stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, text=True)
    blocks = []
    for line in r.stdout.splitlines():
        if re.match(r"'.*' changed:$", line):
            blocks.append([line])
        elif blocks and line.strip():
            blocks[-1].append(line)
    broken = [line for block in blocks if not may_change(block) for line in block]
    told = re.search(r"^Removed/Changed/Added functions summary: (\d+) Removed, (\d+) Changed", r.stdout, flags=re.M)
    failed = r.returncode & 3 or (r.returncode and not told) or (told and int(told[1]) + int(told[2]) > 0)
    if broken or failed:
        sys.exit("\n".join([f"abidiff says that {new} breaks the frozen ABI of {old}:",
                            *(broken or r.stdout.splitlines())]) + RULES)
    print(f"abidiff: {len(blocks)} structs or enums have grown, nothing else has changed")


def exported(library):
    out = subprocess.run(["nm", "-D", "--defined-only", "--with-symbol-versions", library], check=True,
                         stdout=subprocess.PIPE, text=True).stdout
    return {tuple(line.split()[1:3]) for line in out.splitlines()}


def symbols(library, version, names):
    if version != "-":
        names = [f"{n}@@{version}" for n in program(names[0])[1]]
    found = {name for kind, name in exported(library) if kind != "A"}
    missing, more = sorted(set(names) - found), sorted(found - set(names))
    if missing or more:
        sys.exit(f"{library}: not exported, but promised: {missing}; exported, but not promised: {more}")
    print(f"{library} exports {len(found)} symbols")


def main():
    action, *rest = sys.argv[1:]
    if action == "symbols":
        symbols(rest[0], rest[1], rest[2:])
    elif struct.calcsize("P") != 8:
        print("SKIPPED: the record is of 64-bit machines")
        sys.exit(77)
    elif action == "diff":
        diff(*rest)
    elif action in ("check", "keeps"):
        (check if action == "check" else keeps)(rest[0], rest[1], rest[2:])
    else:
        with open(rest[0], "w") as f:
            f.write("\n".join(describe(rest[1], rest[2:])) + "\n")


main()
