"""Write and read GGUF version 3, little endian: the part that a llama needs."""
import struct

import numpy as np

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
F32, F16 = 0, 1
DTYPES = {F32: np.dtype("<f4"), F16: np.dtype("<f2")}
# Metadata value types: number -> struct format of the fixed-size ones.
FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
         10: "<Q", 11: "<q", 12: "<d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def pack_string(text):
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def pack_value(kind, value):
    if kind == STRING:
        return pack_string(value)
    if kind == ARRAY:
        of, items = value
        return struct.pack("<IQ", of, len(items)) + b"".join(pack_value(of, i) for i in items)
    return struct.pack(FIXED[kind], value)


def aligned(n):
    return -(-n // ALIGNMENT) * ALIGNMENT


def write(path, metadata, tensors):
    """metadata: [(key, type, value)], value of an array (element type, items);
    tensors: [(name, float32 or float16 array)], in the file's order."""
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, kind, value in metadata:
        head += [pack_string(key), struct.pack("<I", kind), pack_value(kind, value)]
    offset = 0
    for name, a in tensors:
        kind = {np.dtype(d): k for k, d in DTYPES.items()}[a.dtype]
        # GGUF counts from the innermost dimension, numpy from the outermost.
        head += [pack_string(name), struct.pack("<I", a.ndim),
                 struct.pack(f"<{a.ndim}Q", *reversed(a.shape)), struct.pack("<IQ", kind, offset)]
        offset = aligned(offset + a.nbytes)
    head = b"".join(head)
    with open(path, "wb") as f:
        f.write(head.ljust(aligned(len(head)), b"\0"))
        for _, a in tensors:
            raw = np.ascontiguousarray(a).tobytes()
            f.write(raw.ljust(aligned(len(raw)), b"\0"))


class Reader:
    """metadata: {key: value}; tensors: {name: array as stored}."""

    def __init__(self, path):
        with open(path, "rb") as f:
            self.raw = f.read()
        self.at = 0
        if self.raw[:4] != MAGIC:
            raise ValueError("not a GGUF file")
        self.at = 4
        version, n_tensors, n_kv = self.take("<I"), self.take("<Q"), self.take("<Q")
        if version != VERSION:
            raise ValueError(f"GGUF version {version}")
        self.metadata = {}
        for _ in range(n_kv):
            key = self.string()
            self.metadata[key] = self.value(self.take("<I"))
        infos = []
        for _ in range(n_tensors):
            name, n = self.string(), self.take("<I")
            dims = [self.take("<Q") for _ in range(n)]
            infos.append((name, dims[::-1], self.take("<I"), self.take("<Q")))
        for name, _, kind, _ in infos:
            if kind not in DTYPES:
                raise ValueError(f"{path}: tensor {name} has type {kind}; only F32 and F16 are read")
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        start = -(-self.at // alignment) * alignment
        self.tensors = {name: np.frombuffer(self.raw, DTYPES[kind], int(np.prod(shape)),
                                            start + offset).reshape(shape)
                        for name, shape, kind, offset in infos}

    def take(self, fmt):
        value = struct.unpack_from(fmt, self.raw, self.at)[0]
        self.at += struct.calcsize(fmt)
        return value

    def string(self):
        n = self.take("<Q")
        self.at += n
        return self.raw[self.at - n:self.at].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, n = self.take("<I"), self.take("<Q")
            return [self.value(of) for _ in range(n)]
        return self.take(FIXED[kind])
