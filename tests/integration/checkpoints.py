"""Reads GGUF files and safetensors, writes both; nothing is shared with the code under test."""
import json
import os
import struct
from array import array

import gguf

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}


def floats(type_name, data):
    """Values of packed bytes, as Python's floats."""
    if type_name == "F32":
        return list(array("f", data))
    if type_name == "F16":
        return list(struct.unpack(f"<{len(data) // 2}e", data))
    if type_name == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]
    if type_name == "Q8_0":
        values = []
        for i in range(0, len(data), 34):
            d, = struct.unpack_from("<e", data, i)
            values += [d * q for q in struct.unpack_from("<32b", data, i + 2)]
        return values
    raise ValueError(type_name)


class Tensor:
    def __init__(self, type_name, shape, data):
        self.type, self.shape, self.data = type_name, tuple(shape), data  # shape: slowest first

    @property
    def rows(self):
        """(n_rows, values); a vector is a column."""
        values = floats(self.type, self.data)
        width = self.shape[-1] if len(self.shape) > 1 else 1
        return [values[i:i + width] for i in range(0, len(values), width)]

    def __eq__(self, other):
        return (self.type, self.shape, self.data) == (other.type, other.shape, other.data)


def read_gguf(path):
    with open(path, "rb") as f:
        data = f.read()
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values if len(values) != 1 else values[0]

    def text():
        n = take("Q")
        return take(f"{n}s").decode("utf-8", "surrogateescape") if n else ""

    def value(kind):
        if kind == 8:
            return text()
        if kind != 9:
            return take(SCALARS[kind])
        element, n = take("I"), take("Q")
        return [value(element) for _ in range(n)]

    assert take("4s") == b"GGUF"
    _, n_tensors, n_keys = take("I"), take("Q"), take("Q")
    keys = {}
    for _ in range(n_keys):
        name = text()
        keys[name] = value(take("I"))
    table = []
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        ne = [take("Q") for _ in range(n_dims)]
        table.append((name, ne, take("I"), take("Q")))
    align = keys.get("general.alignment", 32)
    start = (at + align - 1) // align * align
    tensors = {}
    for name, ne, kind, offset in table:
        if kind not in TYPES:
            continue
        type_name, block, block_bytes = TYPES[kind]
        n = block_bytes
        for d in ne:
            n *= d
        n //= block
        tensors[name] = Tensor(type_name, ne[::-1], data[start + offset:start + offset + n])
    return keys, tensors


def vocabulary(n):
    """Keys of a tokenizer of n entries, bytes among them."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens += [f"\u2581w{i}" for i in range(n - len(tokens))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (n - 259)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * n, "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


def write_gguf(path, keys, tensors):
    """tensors: name to (shape, slowest first, floats); all F32."""
    head = struct.pack("<IIQQ", 0x46554747, 3, len(tensors), len(keys))
    head += b"".join(gguf.text(k) + gguf.value(v) for k, v in keys.items())
    data = b""
    for name, (shape, values) in tensors.items():
        head += gguf.text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 0, len(data))
        data += array("f", values).tobytes()
        data += bytes(-len(data) % 32)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % 32) + data)


def bf16(values):
    """Truncated: for values that are exact in 16 bits."""
    return b"".join(struct.pack("<f", x)[2:] for x in values)


def write_safetensors(path, tensors):
    """tensors: name to (dtype, shape, bytes)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    with open(path, "rb") as f:
        data = f.read()
    n, = struct.unpack_from("<Q", data)
    header, start = json.loads(data[8:8 + n]), 8 + n
    assert start % 8 == 0
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        tensors[name] = Tensor(about["dtype"], about["shape"], data[start + begin:start + end])
    assert max(a["data_offsets"][1] for a in header.values()) == len(data) - start
    return tensors


def read_folder(path):
    tensors = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            tensors.update(read_safetensors(os.path.join(path, name)))
    return tensors
