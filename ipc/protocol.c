/* ipc/protocol.c - the table of protocol.h as data. */
#include "ipc/protocol.h"

#include <errno.h>
#include <string.h>

/* Which member of a bound a type uses. */
#define MEMBER_BOOL    u
#define MEMBER_U32     u
#define MEMBER_I32     i
#define MEMBER_U64     u
#define MEMBER_F32     f
#define MEMBER_NAME    u
#define MEMBER_TEXT    u
#define MEMBER_TOKENS  u
#define MEMBER_STRINGS u
#define MEMBER_TEXTS   u
#define MEMBER_BIASES  u

/* Holds every bound, signed or not. */
#define WIDE(x) ((__int128)(x))

/* A row whose bounds are the wrong way round, or whose default lies outside, does not build. Sizes
 * have no default (absent is empty, which the bounds need not allow); floats are not constants that
 * a static assertion takes, so tests/unit/ipc checks theirs. */
#define CHECK_ORDER(name, min, max) \
    _Static_assert(WIDE(min) <= WIDE(max), #name ": the lower bound is above the upper one");
#define CHECK_SCALAR(name, min, max, def)                            \
    CHECK_ORDER(name, min, max)                                      \
    _Static_assert(WIDE(def) >= WIDE(min) && WIDE(def) <= WIDE(max), \
                   #name ": the default is out of range");
#define CHECK_BOOL(name, min, max, def) CHECK_SCALAR(name, min, max, def)
#define CHECK_U32(name, min, max, def)  CHECK_SCALAR(name, min, max, def)
#define CHECK_I32(name, min, max, def)  CHECK_SCALAR(name, min, max, def)
#define CHECK_U64(name, min, max, def)  CHECK_SCALAR(name, min, max, def)
#define CHECK_F32(name, min, max, def)
#define CHECK_NAME(name, min, max, def)    CHECK_ORDER(name, min, max)
#define CHECK_TEXT(name, min, max, def)    CHECK_ORDER(name, min, max)
#define CHECK_TOKENS(name, min, max, def)  CHECK_ORDER(name, min, max)
#define CHECK_STRINGS(name, min, max, def) CHECK_ORDER(name, min, max)
#define CHECK_TEXTS(name, min, max, def)   CHECK_ORDER(name, min, max)
#define CHECK_BIASES(name, min, max, def)  CHECK_ORDER(name, min, max)

enum { OPTIONAL = 0, REQUIRED = 1 };

#define CHECK(TYPE, name, req, min, max, def, doc) CHECK_##TYPE(name, min, max, def)
#define ROW(TYPE, name, req, min, max, def, doc) \
    {#name,                                      \
     PROTO_##TYPE,                               \
     req,                                        \
     {.MEMBER_##TYPE = (min)},                   \
     {.MEMBER_##TYPE = (max)},                   \
     {.MEMBER_##TYPE = (def)},                   \
     doc,                                        \
     offsetof(params, name),                     \
     offsetof(params, has_##name)},

/* One block per method, so that each can call its struct "params". The last row is empty: there are
 * methods without fields, and C has no empty arrays. */
const struct proto_method_info *proto_method_info(enum proto_method method)
{
    switch (method) {
#define M(ID, id, method_name, method_access, FIELDS, method_doc)                               \
    case PROTO_##ID: {                                                                          \
        typedef struct proto_##id params;                                                       \
        FIELDS(CHECK)                                                                           \
        _Static_assert(sizeof(params) <= sizeof(union proto_params), "params of " method_name); \
        static const struct proto_field fields[] = {FIELDS(ROW){NULL}};                         \
        static const struct proto_method_info info = {method_name, method_access, fields,       \
                                                      sizeof(fields) / sizeof(fields[0]) - 1,   \
                                                      method_doc};                              \
        return &info;                                                                           \
    }
        GQA_METHODS(M)
#undef M
    case PROTO_METHOD_COUNT:
        break;
    }
    return NULL;
}

int proto_method_by_name(const char *name, size_t bytes, enum proto_method *ret)
{
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        const char *candidate = proto_method_info((enum proto_method)m)->name;
        if (strlen(candidate) == bytes && memcmp(candidate, name, bytes) == 0) {
            *ret = (enum proto_method)m;
            return 0;
        }
    }
    return -ENOENT;
}

const char *proto_field_type_name(enum proto_field_type type)
{
    switch (type) {
#define T(name, ctype, wire, bounds) \
    case PROTO_##name:               \
        return wire;
        GQA_FIELD_TYPES(T)
#undef T
    }
    return "unknown";
}

const char *proto_field_type_bounds(enum proto_field_type type)
{
    switch (type) {
#define T(name, ctype, wire, bounds) \
    case PROTO_##name:               \
        return bounds;
        GQA_FIELD_TYPES(T)
#undef T
    }
    return "unknown";
}

bool proto_field_type_is_scalar(enum proto_field_type type)
{
    return type <= PROTO_F32;
}

_Static_assert(PROTO_BOOL < PROTO_F32 && PROTO_U32 < PROTO_F32 && PROTO_I32 < PROTO_F32 &&
                   PROTO_U64 < PROTO_F32 && PROTO_NAME > PROTO_F32,
               "the scalar types come first");

const char *proto_access_name(enum proto_access access)
{
    switch (access) {
    case PROTO_ANY:
        return "any";
    case PROTO_OWN:
        return "own";
    case PROTO_ADMIN:
        return "admin";
    }
    return "unknown";
}

const char *proto_error_name(enum proto_error_code code)
{
    switch (code) {
#define E(name, number, doc) \
    case PROTO_E_##name:     \
        return #name;
        GQA_ERRORS(E)
#undef E
    case PROTO_OK:
        break;
    }
    return "UNKNOWN";
}

const char *proto_error_doc(enum proto_error_code code)
{
    switch (code) {
#define E(name, number, doc) \
    case PROTO_E_##name:     \
        return doc;
        GQA_ERRORS(E)
#undef E
    case PROTO_OK:
        break;
    }
    return "an error that this version does not know";
}

enum proto_error_code proto_error_at(size_t index)
{
    static const enum proto_error_code codes[] = {
#define E(name, number, doc) PROTO_E_##name,
        GQA_ERRORS(E)
#undef E
    };
    return index < sizeof(codes) / sizeof(codes[0]) ? codes[index] : PROTO_OK;
}
