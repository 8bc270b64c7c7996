"""Python's values as a call's parameters, and a message's values as Python's."""
import ctypes
from array import array
from ctypes import byref, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p

from . import errors
from .library import ARRAY, BIN, BOOL, FLOAT, INT, MAP, STR, UINT, TensorView, lib


# ---- parameters ------------------------------------------------------------------------------------------------------

def _encode(text):
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)


def _set_tokens(p, key, ids):
    ids = ids if isinstance(ids, array) and ids.typecode == "i" else array("i", ids)
    n = len(ids)
    return lib.gqa_params_tokens(p, key, (c_int32 * n).from_buffer(ids) if n else (c_int32 * 1)(), n)


def _set_strings(p, key, texts):
    data = [_encode(t) for t in texts]
    if any(b"\0" in d for d in data):
        raise ValueError(f"{key.decode()}: a text in a list cannot hold a NUL")
    return lib.gqa_params_strings(p, key, (c_char_p * max(len(data), 1))(*data), len(data))


def _set_biases(p, key, biases):
    n = len(biases)
    ids, values = (c_int32 * max(n, 1))(*biases.keys()), (c_float * max(n, 1))(*biases.values())
    return lib.gqa_params_biases(p, key, ids, values, n)


def _set(p, key, value):
    if isinstance(value, bool):
        return lib.gqa_params_bool(p, key, value)
    if isinstance(value, int):
        if not -2 ** 63 <= value < 2 ** 64:
            raise OverflowError(f"{key.decode()}: {value} has more than 64 bits")
        return lib.gqa_params_i64(p, key, value) if value < 0 else lib.gqa_params_u64(p, key, value)
    if isinstance(value, float):
        return lib.gqa_params_f64(p, key, value)
    if isinstance(value, (str, bytes, bytearray)):
        data = _encode(value)
        return lib.gqa_params_text(p, key, data, len(data))
    if isinstance(value, dict):
        return _set_biases(p, key, value)
    items = value if isinstance(value, array) else list(value)
    if len(items) and isinstance(items[0], (str, bytes)):
        return _set_strings(p, key, items)
    return _set_tokens(p, key, items)


class Params:
    """A struct gqa_params for a with block. Values: bool, int, float, str or bytes, a sequence of token ids or of
    texts, a dict of token to bias. None: left out."""

    def __init__(self, values):
        self.values, self.pointer = values, c_void_p()

    def __enter__(self):
        status = lib.gqa_params_create(byref(self.pointer))
        if status < 0:
            raise errors.make(status)
        try:
            for key, value in self.values.items():
                status = 0 if value is None else _set(self.pointer, key.encode(), value)
                if status < 0:
                    raise errors.make(status, what=key)
        except BaseException:
            self.__exit__()
            raise
        return self.pointer

    def __exit__(self, *_):
        self.pointer = c_void_p(lib.gqa_params_destroy(self.pointer))


# ---- results ---------------------------------------------------------------------------------------------------------

def bytes_of(value):
    data, n = c_void_p(), c_size_t()
    return ctypes.string_at(data, n.value) if lib.gqa_value_bytes(value, byref(data), byref(n)) == 0 else b""


def tensor_of(value):
    """A tensor's (shape, bytes), copied; None where value is none."""
    view = TensorView()
    if lib.gqa_value_tensor_f32(value, byref(view)) < 0:
        return None
    return tuple(view.shape[:view.n_dims]), ctypes.string_at(view.data, view.bytes) if view.bytes else b""


def floats(data, shape):
    """bytes as a memoryview of 32-bit floats with that shape. numpy.asarray() takes it without a copy; tolist() makes
    lists. Python knows no empty view of several dimensions: without elements it has one."""
    view = memoryview(data)
    return view.cast("f", shape) if view.nbytes else view.cast("f")


def _scalar(value, ctype, read):
    x = ctype()
    read(value, byref(x))
    return x.value


def _array_of(value):
    n, count = lib.gqa_value_count(value), c_size_t()
    if n and lib.gqa_value_type(lib.gqa_value_at(value, 0)) in (UINT, INT):
        ids = array("i", bytes(4 * n))
        if lib.gqa_value_tokens(value, (c_int32 * n).from_buffer(ids), n, byref(count)) == 0:
            return ids.tolist()
    return [python(lib.gqa_value_at(value, i)) for i in range(n)]


def _map_of(value):
    tensor = tensor_of(value)
    if tensor is not None:
        return floats(tensor[1], tensor[0])
    key, item, result, i = c_void_p(), c_void_p(), {}, 0
    while lib.gqa_value_pair(value, i, byref(key), byref(item)):
        result[bytes_of(key).decode("utf-8", "replace")] = python(item)
        i += 1
    return result


_READERS = {
    BOOL: lambda v: _scalar(v, c_bool, lib.gqa_value_bool),
    UINT: lambda v: _scalar(v, c_uint64, lib.gqa_value_u64),
    INT: lambda v: _scalar(v, c_int64, lib.gqa_value_i64),
    FLOAT: lambda v: _scalar(v, c_double, lib.gqa_value_f64),
    STR: lambda v: bytes_of(v).decode("utf-8", "surrogateescape"),
    BIN: bytes_of,
    ARRAY: _array_of,
    MAP: _map_of,
}


def python(value):
    """A message's value, copied: None, bool, int, float, str, bytes, list, dict; a tensor of floats is a memoryview."""
    reader = _READERS.get(lib.gqa_value_type(value))
    return reader(value) if reader else None
