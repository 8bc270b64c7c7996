#include "client/cli/kv_transfer.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_VERSION    1u
#define PIECE_BYTES_MAX (4u << 20) /* of data; the protocol has the same limit */
#define BLOCK_TOKENS    64u
#define ID_CHARS        32u
#define ABOUT_BYTES     128u

enum record_type { HEAD = 0x44414548, PIECE = 0x43454950, END = 0x21444e45 }; /* the letters */

static const char magic[8] = "GQAKVPX\n";

struct file_head {
    char magic[8];
    uint32_t version, zero;
};

struct record_head {
    uint32_t type; /* enum record_type */
    uint32_t bytes;
};

struct head { /* of HEAD */
    char id[ID_CHARS];
    uint32_t layout_version, n_tokens;
    uint64_t bytes;
    char about[ABOUT_BYTES];
};

struct piece { /* of PIECE; its data follows */
    uint32_t layer_class, position, flags, zero;
    uint64_t bytes, checksum, offset;
    int32_t tokens[BLOCK_TOKENS];
};

struct end { /* of END */
    uint64_t n_pieces;
};

_Static_assert(sizeof(struct file_head) == 16 && sizeof(struct record_head) == 8 &&
                   sizeof(struct head) == 176 && sizeof(struct piece) == 296 &&
                   sizeof(struct end) == 8,
               "docs/kv-layout.md says how long they are");
_Static_assert(__BYTE_ORDER == __LITTLE_ENDIAN, "files are little-endian, and so are the structs");

/* ---- export ------------------------------------------------------------------------------ */

struct export
{
    struct cli *c;
    FILE *f;
    bool has_head;
    uint64_t n_pieces;
    const char *fault; /* the daemon's events are not what they should be, or NULL */
    int err;           /* errno of a failed write, or 0 */
};

static void put(struct export *x, const void *data, size_t bytes)
{
    errno = 0;
    if (x->err == 0 && bytes > 0 && fwrite(data, 1, bytes, x->f) != bytes) {
        x->err = errno != 0 ? errno : EIO;
    }
}

static void put_record(struct export *x, enum record_type type, const void *fixed,
                       size_t fixed_bytes, const void *data, size_t data_bytes)
{
    struct record_head head = {type, (uint32_t)(fixed_bytes + data_bytes)};
    put(x, &head, sizeof(head));
    put(x, fixed, fixed_bytes);
    put(x, data, data_bytes);
}

static uint64_t get_u64(const struct gqa_value *map, const char *key, bool *ok)
{
    uint64_t value = 0;
    *ok = *ok && gqa_value_u64(gqa_value_get(map, key), &value) == 0;
    return value;
}

static void copy_text(const struct gqa_value *map, const char *key, char *to, size_t room)
{
    const char *text = "";
    size_t bytes = 0;
    gqa_value_bytes(gqa_value_get(map, key), &text, &bytes);
    memcpy(to, text, bytes < room ? bytes : room);
}

static void put_head(struct export *x, const struct gqa_value *event)
{
    struct file_head file = {.version = FILE_VERSION};
    struct head head = {0};
    bool ok = true;
    memcpy(file.magic, magic, sizeof(magic));
    copy_text(event, "id", head.id, sizeof(head.id));
    copy_text(event, "about", head.about, sizeof(head.about) - 1);
    head.layout_version = (uint32_t)get_u64(event, "layout_version", &ok);
    head.n_tokens = (uint32_t)get_u64(event, "n_tokens", &ok);
    head.bytes = get_u64(event, "bytes", &ok);
    x->fault = ok ? x->fault : "the head of the prefix lacks a number";
    put(x, &file, sizeof(file));
    put_record(x, HEAD, &head, sizeof(head), NULL, 0);
    x->has_head = true;
}

static void put_piece(struct export *x, const struct gqa_value *event)
{
    struct piece p = {0};
    bool ok = true;
    const char *data;
    size_t bytes, n_tokens;
    p.layer_class = (uint32_t)get_u64(event, "layer_class", &ok);
    p.position = (uint32_t)get_u64(event, "position", &ok);
    p.flags = (uint32_t)get_u64(event, "flags", &ok);
    p.bytes = get_u64(event, "bytes", &ok);
    p.checksum = get_u64(event, "checksum", &ok);
    p.offset = get_u64(event, "offset", &ok);
    ok = ok &&
         gqa_value_tokens(gqa_value_get(event, "tokens"), p.tokens, BLOCK_TOKENS, &n_tokens) == 0 &&
         n_tokens == BLOCK_TOKENS;
    ok = ok && gqa_value_bytes(gqa_value_get(event, "data"), &data, &bytes) == 0 &&
         bytes <= PIECE_BYTES_MAX;
    if (!ok) {
        x->fault = "a piece lacks its place, its tokens or its data";
        return;
    }
    put_record(x, PIECE, &p, sizeof(p), data, bytes);
    x->n_pieces++;
}

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct export *x = arg;
    if (!x->has_head) {
        put_head(x, event);
    } else {
        put_piece(x, event);
    }
    if (x->err != 0 || x->fault != NULL) {
        gqa_cancel(x->c->g, id); /* nobody would keep the rest */
    }
}

/* Runs the call; on success the file is whole but for being closed. */
static int run_export(struct cli *c, struct export *x, struct gqa_params *params, const char *path,
                      json_t **ret)
{
    struct cli_call call = {.event = on_event, .arg = x};
    cli_start(c, &call, "kv.export", params);
    cli_finish(c, &call, 1);
    int code;
    if (x->err == 0 && x->fault == NULL && call.status == 0) {
        const struct end end = {x->n_pieces};
        put_record(x, END, &end, sizeof(end), NULL, 0);
        errno = 0;
        x->err = x->err == 0 && fflush(x->f) != 0 ? errno : x->err;
    }
    if (x->err != 0) {
        code = cli_error(EX_IOERR, "%s: %s", path, strerror(x->err));
    } else if (x->fault != NULL) {
        code = cli_error(CLI_FAILED, "kv.export: %s", x->fault);
    } else {
        code = cli_report(&call);
    }
    if (code == CLI_OK) {
        *ret = call.result;
    } else {
        json_decref(call.result);
    }
    return code;
}

static int print_exported(struct cli *c, json_t *result, const char *path)
{
    if (c->json) {
        return cli_print_json(result);
    }
    char bytes[CLI_SIZE_CHARS];
    printf("%.0f tokens, %s exported to %s\n", cli_num(result, "n_tokens", 0),
           cli_bytes(cli_num(result, "bytes", 0), bytes), path);
    json_decref(result);
    return cli_flush();
}

/* What lies in the file was said to the model: nobody else is to read it. */
static FILE *open_private(const char *path)
{
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    FILE *f = fd >= 0 ? fdopen(fd, "wb") : NULL;
    if (f == NULL && fd >= 0) {
        close(fd);
    }
    return f;
}

int cli_kv_export(struct cli *c, struct gqa_params *params, const char *path)
{
    struct export x = {.c = c, .f = stdout};
    struct stat st;
    json_t *result;
    char part[PATH_MAX];
    bool special = stat(path, &st) == 0 && !S_ISREG(st.st_mode); /* a pipe, say: not replaced */
    if (strcmp(path, "-") == 0) {
        int code = run_export(c, &x, params, "standard output", &result);
        if (code == CLI_OK) {
            json_decref(result);
        }
        return code;
    }
    if (snprintf(part, sizeof(part), "%s%s", path, special ? "" : ".part") >= (int)sizeof(part)) {
        gqa_params_destroy(params);
        return cli_error(EX_CANTCREAT, "%s: %s", path, strerror(ENAMETOOLONG));
    }
    x.f = special ? fopen(path, "wbe") : open_private(part);
    if (x.f == NULL) {
        int err = errno;
        gqa_params_destroy(params);
        return cli_error(EX_CANTCREAT, "%s: %s", part, strerror(err));
    }
    int code = run_export(c, &x, params, path, &result);
    bool closed = fclose(x.f) == 0;
    if (code == CLI_OK && (!closed || (!special && rename(part, path) < 0))) {
        code = cli_error(EX_IOERR, "%s: %s", path, strerror(errno));
        json_decref(result);
    }
    if (code != CLI_OK && !special) {
        unlink(part);
    }
    return code != CLI_OK ? code : print_exported(c, result, path);
}

/* ---- import ------------------------------------------------------------------------------ */

struct import {
    struct cli *c;
    const char *model, *path;
    FILE *f;
    struct head head;
    uint64_t n_pieces;
    /* The piece that was read last waits for the next record: only then is it known whether it is
     * the last one. */
    struct piece *waiting, *next; /* (sizeof + PIECE_BYTES_MAX) */
    size_t waiting_bytes;         /* of its data */
    bool has_waiting;
};

/* All of the bytes, or one line that says what is wrong. */
static int read_all(const struct import *im, void *to, size_t bytes)
{
    errno = 0;
    size_t n = fread(to, 1, bytes, im->f);
    if (n == bytes) {
        return CLI_OK;
    }
    if (ferror(im->f)) {
        return cli_error(EX_NOINPUT, "%s: %s", im->path, strerror(errno != 0 ? errno : EIO));
    }
    return cli_error(EX_DATAERR, "%s: it ends in the midst: it was cut off", im->path);
}

static int read_head(struct import *im)
{
    struct file_head file;
    struct record_head record;
    int code = read_all(im, &file, sizeof(file));
    if (code != CLI_OK) {
        return code;
    }
    if (memcmp(file.magic, magic, sizeof(magic)) != 0) {
        return cli_error(EX_DATAERR, "%s: not a file of gqa kv export", im->path);
    }
    if (file.version != FILE_VERSION) {
        return cli_error(EX_DATAERR, "%s: its version is %u; this gqa reads %u", im->path,
                         file.version, FILE_VERSION);
    }
    code = read_all(im, &record, sizeof(record));
    if (code == CLI_OK && (record.type != HEAD || record.bytes != sizeof(im->head))) {
        return cli_error(EX_DATAERR, "%s: it does not begin with a head", im->path);
    }
    code = code == CLI_OK ? read_all(im, &im->head, sizeof(im->head)) : code;
    im->head.about[ABOUT_BYTES - 1] = '\0';
    return code;
}

static int send_waiting(struct import *im, bool last, json_t **ret)
{
    const struct piece *p = im->waiting;
    struct gqa_params *params = cli_model_params(im->model);
    gqa_params_text(params, "id", im->head.id, sizeof(im->head.id));
    gqa_params_str(params, "about", im->head.about);
    gqa_params_u64(params, "layout_version", im->head.layout_version);
    gqa_params_u64(params, "layer_class", p->layer_class);
    gqa_params_u64(params, "position", p->position);
    gqa_params_u64(params, "flags", p->flags);
    gqa_params_tokens(params, "tokens", p->tokens, BLOCK_TOKENS);
    gqa_params_u64(params, "bytes", p->bytes);
    gqa_params_u64(params, "checksum", p->checksum);
    gqa_params_u64(params, "offset", p->offset);
    gqa_params_text(params, "data", p + 1, im->waiting_bytes);
    gqa_params_bool(params, "last", last);
    im->has_waiting = false;
    int code = cli_call(im->c, "kv.import", params, NULL, NULL, ret);
    return code == CLI_OK && cli_interrupted() ? CLI_INTERRUPTED : code;
}

static int take_piece(struct import *im, size_t bytes)
{
    if (bytes < sizeof(struct piece) || bytes > sizeof(struct piece) + PIECE_BYTES_MAX) {
        return cli_error(EX_DATAERR, "%s: piece %llu has %zu bytes; %zu to %zu are legal", im->path,
                         (unsigned long long)im->n_pieces, bytes, sizeof(struct piece),
                         sizeof(struct piece) + PIECE_BYTES_MAX);
    }
    int code = read_all(im, im->next, bytes);
    if (code == CLI_OK && im->has_waiting) {
        json_t *nothing;
        code = send_waiting(im, false, &nothing);
        if (code == CLI_OK) {
            json_decref(nothing);
        }
    }
    struct piece *swap = im->waiting;
    im->waiting = im->next;
    im->next = swap;
    im->waiting_bytes = bytes - sizeof(struct piece);
    im->has_waiting = true;
    im->n_pieces++;
    return code;
}

static int take_end(struct import *im, size_t bytes, json_t **ret)
{
    struct end end;
    if (bytes != sizeof(end)) {
        return cli_error(EX_DATAERR, "%s: its end has %zu bytes, not %zu", im->path, bytes,
                         sizeof(end));
    }
    int code = read_all(im, &end, sizeof(end));
    if (code != CLI_OK) {
        return code;
    }
    if (end.n_pieces != im->n_pieces || !im->has_waiting) {
        return cli_error(EX_DATAERR, "%s: it holds %llu pieces, and its end says %llu", im->path,
                         (unsigned long long)im->n_pieces, (unsigned long long)end.n_pieces);
    }
    if (fgetc(im->f) != EOF) {
        return cli_error(EX_DATAERR, "%s: something follows its end", im->path);
    }
    return send_waiting(im, true, ret);
}

static int run_import(struct import *im, json_t **ret)
{
    int code = read_head(im);
    while (code == CLI_OK) {
        struct record_head record;
        code = read_all(im, &record, sizeof(record));
        if (code != CLI_OK) {
            break;
        }
        if (record.type == END) {
            return take_end(im, record.bytes, ret);
        }
        code = record.type == PIECE ? take_piece(im, record.bytes)
                                    : cli_error(EX_DATAERR, "%s: record %llu is of an unknown type",
                                                im->path, (unsigned long long)im->n_pieces + 1);
    }
    return code;
}

int cli_kv_import(struct cli *c, const char *model, const char *path)
{
    bool is_stdin = strcmp(path, "-") == 0;
    struct import im = {
        .c = c,
        .model = model,
        .path = is_stdin ? "standard input" : path,
        .f = is_stdin ? stdin : fopen(path, "rbe"),
        .waiting = malloc(sizeof(struct piece) + PIECE_BYTES_MAX),
        .next = malloc(sizeof(struct piece) + PIECE_BYTES_MAX),
    };
    json_t *result;
    int code;
    if (im.f == NULL) {
        code = cli_error(EX_NOINPUT, "%s: %s", path, strerror(errno));
    } else if (im.waiting == NULL || im.next == NULL) {
        code = cli_error(EX_OSERR, "%s: no memory", path);
    } else {
        code = run_import(&im, &result);
    }
    if (im.f != NULL && !is_stdin) {
        fclose(im.f);
    }
    free(im.waiting);
    free(im.next);
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(result);
    }
    printf("%.0f tokens imported, %.0f of them new\n", cli_num(result, "n_tokens", 0),
           cli_num(result, "n_new", 0));
    json_decref(result);
    return cli_flush();
}
