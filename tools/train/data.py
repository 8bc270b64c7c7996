#!/usr/bin/python3
"""Make the corpus: Debian's package descriptions and manual-page summaries.

Reads what apt and man-db already keep on the machine, so nothing is fetched
here (recipe.sh runs `apt-get update` for the long descriptions first).
Writes train.txt and heldout.txt (documents separated by a NUL byte, which
neither source contains) and corpus.json with counts and checksums.
"""
import argparse
import glob
import gzip
import hashlib
import json
import os
import random
import re
import subprocess

LISTS = "/var/lib/apt/lists"
# Only the release itself: -security and -updates change weekly, and a corpus
# that changes weekly cannot be made again.
PACKAGES = "*_debian_dists_bookworm_main_binary-*_Packages*"
TRANSLATION = "*_debian_dists_bookworm_main_i18n_Translation-en*"
HELDOUT_PERCENT = 2


def stanzas(pattern):
    """Yield each deb822 stanza of the matching apt lists as a dict."""
    for path in sorted(glob.glob(os.path.join(LISTS, pattern))):
        text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path],
                              check=True, stdout=subprocess.PIPE).stdout
        for block in text.decode("utf-8", "replace").split("\n\n"):
            fields, key = {}, None
            for line in block.split("\n"):
                if line[:1] in (" ", "\t"):
                    if key:
                        fields[key] += "\n" + line
                elif ":" in line:
                    key, _, value = line.partition(":")
                    fields[key] = value.strip()
            if "Package" in fields:
                yield fields


def package_documents():
    """[(source package, text)] in order of name, and {package: its source}."""
    long_texts = {}
    for f in stanzas(TRANSLATION):
        long_texts[f["Package"], f.get("Description-md5")] = f.get("Description-en", "")
    sources, docs = {}, []
    for f in stanzas(PACKAGES):
        name = f["Package"]
        if name in sources:
            continue
        source = sources[name] = f.get("Source", name).split()[0]
        text = long_texts.get((name, f.get("Description-md5"))) or f.get("Description", "")
        if not text:
            continue
        section = f.get("Section", "misc")
        docs.append((source, f"Package: {name}\nSection: {section}\nDescription: {text}\n"))
    docs.sort(key=lambda d: d[1])
    return docs, sources


ROFF_FONT = re.compile(r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\[&|^/,%:]")
ROFF_CHAR = {r"\-": "-", r"\(em": "-", r"\(en": "-", r"\(aq": "'", r"\(dq": '"',
             r"\(co": "(c)", r"\e": "\\", r"\ ": " ", r"\*(--": "-", r"\(hy": "-"}


def manual_summary(text):
    """The 'name - summary' line of one man page's source, or None."""
    lines = iter(text.split("\n"))
    for line in lines:
        if re.match(r'\.S[Hh]\s+"?NAME"?\s*$', line, re.I):
            break
    else:
        return None
    names, summary = [], []
    for line in lines:
        if re.match(r"\.S[HhSs]\b", line):
            break
        if line.startswith(".Nd"):
            summary.append(line[3:].strip().strip('"'))
            break
        if line.startswith(".Nm"):
            names.append(line[3:].strip().replace(" ,", ","))
        elif re.match(r"\.(B|I|BR|BI|IR|IB|RB)\s", line):
            summary.append(line.split(None, 1)[1].replace('"', ""))
        elif line[:1] not in (".", "'"):
            summary.append(line)
    head = " ".join(names) + " - " if names else ""
    out = head + " ".join(summary)
    for roff, plain in ROFF_CHAR.items():
        out = out.replace(roff, plain)
    out = " ".join(ROFF_FONT.sub("", out).split())
    # Whatever markup is still there we do not understand: better no document.
    if "\\" in out or " - " not in out or not 8 < len(out) < 400:
        return None
    return out


def manual_documents(sources):
    """(source package, 'name (section) - summary') for the installed English
    pages, of Debian's own packages only: other pages have other terms."""
    owners = {}
    for path in glob.glob("/var/lib/dpkg/info/*.list"):
        package = os.path.basename(path)[:-len(".list")].split(":")[0]
        if package in sources:
            with open(path, encoding="utf-8") as f:
                for line in f:
                    if line.startswith("/usr/share/man/man"):
                        owners[line.rstrip("\n")] = sources[package]
    docs = {}
    for path in sorted(owners):
        base = re.sub(r"\.gz$", "", os.path.basename(path))
        name, _, section = base.rpartition(".")
        if os.path.islink(path) or not os.path.isfile(path) or not name:
            continue
        try:
            opener = gzip.open if path.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8", errors="strict") as f:
                line = manual_summary(f.read(65536))
        except (OSError, EOFError, UnicodeError):
            continue
        if line:
            summary = line.split(" - ", 1)[1]
            docs[f"{name} ({section}) - {summary}\n"] = owners[path]
    return [(source, text) for text, source in sorted(docs.items())]


def held_out(key):
    """Split by source package: its binary packages share whole paragraphs,
    so a split by binary name would measure memory and not modelling."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELDOUT_PERCENT


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", default="build")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--json", default="corpus.json")
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)

    packages, sources = package_documents()
    manuals = manual_documents(sources)
    if len(packages) < 1000:
        raise SystemExit("apt's lists are missing: run apt-get update (see recipe.sh)")
    docs = [(k, t.replace("\0", "")) for k, t in packages + manuals]
    random.Random(args.seed).shuffle(docs)

    info = {"seed": args.seed, "packages": len(packages), "manual_pages": len(manuals),
            "heldout_percent": HELDOUT_PERCENT, "split_by": "sha256 of the source package's name"}
    for split in ("train", "heldout"):
        part = [t for k, t in docs if held_out(k) == (split == "heldout")]
        raw = "\0".join(part).encode("utf-8")
        with open(os.path.join(args.out, split + ".txt"), "wb") as f:
            f.write(raw)
        info[split] = {"documents": len(part), "bytes": len(raw),
                       "sha256": hashlib.sha256(raw).hexdigest()}
    with open(args.json, "w") as f:
        json.dump(info, f, indent=1)
        f.write("\n")
    print(json.dumps(info, indent=1))


if __name__ == "__main__":
    main()
