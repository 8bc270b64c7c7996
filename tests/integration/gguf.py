"""Writes small GGUF files: keys, and float32 tensors with random values."""
import random
import struct
from array import array

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def text(s):
    data = s.encode()
    return struct.pack("<Q", len(data)) + data


def value(v):
    if isinstance(v, bool):
        return struct.pack("<I?", BOOL, v)
    if isinstance(v, int):
        return struct.pack("<II", U32, v)
    if isinstance(v, float):
        return struct.pack("<If", F32, v)
    if isinstance(v, str):
        return struct.pack("<I", STRING) + text(v)
    if isinstance(v[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(v)) + b"".join(map(text, v))
    kind, form = (F32, "f") if isinstance(v[0], float) else (I32, "i")
    return struct.pack(f"<IIQ{len(v)}{form}", ARRAY, kind, len(v), *v)


def write(path, keys, shapes, seed=1):
    """shapes: name to (n_in,) or (n_in, n_out). Norms lie about 1, everything else about 0."""
    draw = random.Random(seed)
    head = struct.pack("<IIQQ", 0x46554747, 3, len(shapes), len(keys))
    head += b"".join(text(k) + value(v) for k, v in keys.items())
    data = b""
    for name, shape in shapes.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        n = shape[0] * (shape[1] if len(shape) > 1 else 1)
        about, scale = (1, 0.2) if len(shape) == 1 and name.endswith(".weight") else (0, 2 / shape[0] ** 0.5)
        data += array("f", [about + scale * draw.uniform(-1, 1) for _ in range(n)]).tobytes()
        data += bytes(-len(data) % 32)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % 32) + data)


WORDS = "the cat sat on a mat and dog ran to you who what is where in at up".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP = 2, 3


def bert(path, arch="bert", n_embd=32, n_layers=2, n_ctx=64, n_scores=0, **more):
    """A random encoder with a WordPiece vocabulary of WORDS (with ids from 5) and letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = SPECIAL + ["\u2581" + w for w in WORDS] + ["\u2581" + c for c in letters] + letters
    keys = {"general.architecture": arch, f"{arch}.context_length": n_ctx, f"{arch}.embedding_length": n_embd,
            f"{arch}.block_count": n_layers, f"{arch}.feed_forward_length": 48, f"{arch}.attention.head_count": 4,
            f"{arch}.attention.layer_norm_epsilon": 1e-12, f"{arch}.attention.causal": False,
            "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.bos_token_id": CLS, "tokenizer.ggml.cls_token_id": CLS, "tokenizer.ggml.seperator_token_id": SEP,
            "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.padding_token_id": 0, **more}
    shapes = {"token_embd.weight": (n_embd, len(tokens)), "token_types.weight": (n_embd, 2),
              "position_embd.weight": (n_embd, n_ctx)}

    def norm(name):
        shapes.update({name + ".weight": (n_embd,), name + ".bias": (n_embd,)})

    def product(name, n_in, n_out):
        shapes.update({name + ".weight": (n_in, n_out), name + ".bias": (n_out,)})
    norm("token_embd_norm")
    for i in range(n_layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            product(f"blk.{i}.{part}", n_embd, n_embd)
        norm(f"blk.{i}.attn_output_norm")
        product(f"blk.{i}.ffn_up", n_embd, 48)
        product(f"blk.{i}.ffn_down", 48, n_embd)
        norm(f"blk.{i}.layer_output_norm")
    if n_scores:
        product("cls", n_embd, n_embd)
        product("cls.output", n_embd, n_scores)
    write(path, keys, shapes)
