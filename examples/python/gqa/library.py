"""libgqa's functions and structs, as <gqa/client.h> declares them. Only what this package uses."""
import os
from ctypes import (CDLL, CFUNCTYPE, POINTER, Structure, c_bool, c_char, c_char_p, c_double, c_float, c_int,
                    c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p)

NEVER = 2 ** 64 - 1
SPAWN_QUIET = 1
NIL, BOOL, UINT, INT, FLOAT, STR, BIN, ARRAY, MAP = range(9)


class GqaError(Structure):
    _fields_ = [("code", c_int32), ("retry_after_ms", c_uint32), ("name", c_char * 32), ("message", c_char * 480)]


EventFn = CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
DoneFn = CFUNCTYPE(None, c_void_p, c_uint32, c_int, c_void_p, POINTER(GqaError))


class ConnectOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("socket", c_char_p), ("client", c_char_p), ("flags", c_uint32),
                ("fd", c_int), ("timeout_ms", c_uint32)]


class SpawnOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("program", c_char_p), ("cache_dir", c_char_p), ("models_dir", c_char_p),
                ("args", POINTER(c_char_p)), ("client", c_char_p), ("flags", c_uint32), ("timeout_ms", c_uint32)]


class CallOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("timeout_ms", c_uint32), ("event", EventFn), ("done", DoneFn),
                ("arg", c_void_p), ("total_ms", c_uint32)]


class TensorView(Structure):
    _fields_ = [("type", c_void_p), ("type_bytes", c_size_t), ("n_dims", c_size_t), ("shape", c_uint64 * 8),
                ("data", c_void_p), ("bytes", c_size_t)]


_P, _ERR = c_void_p, POINTER(GqaError)
_FUNCTIONS = {
    "gqa_version": (c_char_p,),
    "gqa_connect": (c_int, POINTER(ConnectOptions), POINTER(_P), _ERR),
    "gqa_spawn": (c_int, POINTER(SpawnOptions), POINTER(_P), _ERR),
    "gqa_close": (_P, _P),
    "gqa_server_info": (_P, _P),
    "gqa_is_connected": (c_bool, _P),
    "gqa_reconnect": (c_int, _P, c_uint32, _ERR),
    "gqa_fd": (c_int, _P),
    "gqa_events": (c_int, _P),
    "gqa_timeout_usec": (c_uint64, _P),
    "gqa_process": (c_int, _P),
    "gqa_wait": (c_int, _P, c_uint64),
    "gqa_call_async": (c_int, _P, c_char_p, _P, POINTER(CallOptions), POINTER(c_uint32)),
    "gqa_cancel": (c_int, _P, c_uint32),
    "gqa_params_create": (c_int, POINTER(_P)),
    "gqa_params_destroy": (_P, _P),
    "gqa_params_bool": (c_int, _P, c_char_p, c_bool),
    "gqa_params_i64": (c_int, _P, c_char_p, c_int64),
    "gqa_params_u64": (c_int, _P, c_char_p, c_uint64),
    "gqa_params_f64": (c_int, _P, c_char_p, c_double),
    "gqa_params_text": (c_int, _P, c_char_p, c_char_p, c_size_t),
    "gqa_params_tokens": (c_int, _P, c_char_p, POINTER(c_int32), c_size_t),
    "gqa_params_strings": (c_int, _P, c_char_p, POINTER(c_char_p), c_size_t),
    "gqa_params_biases": (c_int, _P, c_char_p, POINTER(c_int32), POINTER(c_float), c_size_t),
    "gqa_value_type": (c_int, _P),
    "gqa_value_bool": (c_int, _P, POINTER(c_bool)),
    "gqa_value_u64": (c_int, _P, POINTER(c_uint64)),
    "gqa_value_i64": (c_int, _P, POINTER(c_int64)),
    "gqa_value_f64": (c_int, _P, POINTER(c_double)),
    "gqa_value_bytes": (c_int, _P, POINTER(_P), POINTER(c_size_t)),
    "gqa_value_get": (_P, _P, c_char_p),
    "gqa_value_count": (c_size_t, _P),
    "gqa_value_at": (_P, _P, c_size_t),
    "gqa_value_pair": (c_bool, _P, c_size_t, POINTER(_P), POINTER(_P)),
    "gqa_value_tokens": (c_int, _P, POINTER(c_int32), c_size_t, POINTER(c_size_t)),
    "gqa_value_tensor_f32": (c_int, _P, POINTER(TensorView)),
}


def _load():
    library = CDLL(os.environ.get("GQA_LIBRARY") or "libgqa.so.1")
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


lib = _load()


def version():
    """libgqa's own, "0.1.0"."""
    return lib.gqa_version().decode()
