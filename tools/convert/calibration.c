#include "tools/convert/calibration.h"

#include "format/checked.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK_TOKENS    64u
#define TILE_TOKENS     16u
#define HEAD_BYTES      176u
#define PIECE_BYTES     296u
#define POSITIONS_MAX   65536u
#define LAYOUT_VERSIONS 2u /* up to this one, float32 lies as read here */

struct piece {
    uint32_t position;
    uint64_t offset, bytes; /* in its block */
    const uint8_t *data;
};

struct calibration {
    const uint8_t *base;
    uint64_t bytes;
    struct ck_shape shape;
    uint64_t block_bytes;
    struct piece *pieces; /* (n_pieces), by position and offset */
    size_t n_pieces;
    uint32_t n_blocks;
};

static uint32_t load_u32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

static uint64_t load_u64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

/* ---- reading the file -------------------------------------------------------------------- */

static int add_piece(struct calibration *c, const char *path, const uint8_t *at, uint64_t bytes,
                     struct fmt_error *err)
{
    uint64_t of_block = load_u64(at + 16);
    struct piece p = {load_u32(at + 4), load_u64(at + 32), bytes - PIECE_BYTES, at + PIECE_BYTES};
    uint64_t end;
    if (load_u32(at) != 0) {
        return fmt_fail(err, -ENOTSUP,
                        "%s: the model has layers that see windows: their K and V of a whole text "
                        "are not kept",
                        path);
    }
    if (of_block != c->block_bytes) {
        return fmt_fail(err, -ENOTSUP,
                        "%s: a block of %" PRIu64 " bytes, not %" PRIu64
                        ": another model's, or the cache was not of float32 (-ctk f32 -ctv f32)",
                        path, of_block, c->block_bytes);
    }
    if (p.position >= POSITIONS_MAX || !checked_add_u64(p.offset, p.bytes, &end) ||
        end > c->block_bytes) {
        return fmt_fail(err, -EINVAL, "%s: piece %zu lies outside of its block", path, c->n_pieces);
    }
    struct piece *grown = realloc(c->pieces, (c->n_pieces + 1) * sizeof(*grown));
    if (grown == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", path);
    }
    c->pieces = grown;
    c->pieces[c->n_pieces++] = p;
    return 0;
}

static int read_records(struct calibration *c, const char *path, struct fmt_error *err)
{
    uint64_t at = 16;
    int rc = 0;
    if (c->bytes < 16 || memcmp(c->base, "GQAKVPX\n", 8) != 0 || load_u32(c->base + 8) != 1) {
        return fmt_fail(err, -EINVAL, "%s: no file of `gqa kv export`", path);
    }
    while (rc == 0 && c->bytes - at >= 8) {
        const uint8_t *head = c->base + at;
        uint32_t bytes = load_u32(head + 4);
        if (bytes > c->bytes - at - 8) {
            break;
        }
        if (memcmp(head, "END!", 4) == 0) {
            return 0;
        }
        if (memcmp(head, "PIEC", 4) == 0 && bytes >= PIECE_BYTES) {
            rc = add_piece(c, path, head + 8, bytes, err);
        } else if (memcmp(head, "HEAD", 4) != 0 || bytes != HEAD_BYTES ||
                   load_u32(head + 8 + 32) > LAYOUT_VERSIONS) {
            break;
        }
        at += 8 + (uint64_t)bytes;
    }
    return rc < 0 ? rc
                  : fmt_fail(err, -EINVAL, "%s: the record at offset %" PRIu64 " is not whole",
                             path, at);
}

static int by_place(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;
    int order = (x->position > y->position) - (x->position < y->position);
    return order != 0 ? order : (x->offset > y->offset) - (x->offset < y->offset);
}

/* Every byte of every block from the first on is there once. */
static int check_pieces(struct calibration *c, const char *path, struct fmt_error *err)
{
    uint64_t offset = 0;
    qsort(c->pieces, c->n_pieces, sizeof(*c->pieces), by_place);
    for (size_t i = 0; i < c->n_pieces; i++) {
        const struct piece *p = &c->pieces[i];
        if (p->position != c->n_blocks || p->offset != offset || p->bytes == 0) {
            return fmt_fail(err, -EINVAL, "%s: bytes of block %u are missing, or there twice", path,
                            c->n_blocks);
        }
        offset += p->bytes;
        c->n_blocks += offset == c->block_bytes;
        offset = offset == c->block_bytes ? 0 : offset;
    }
    if (c->n_blocks == 0 || offset != 0) {
        return fmt_fail(err, -EINVAL, "%s: it holds no whole block of %u tokens", path,
                        BLOCK_TOKENS);
    }
    return 0;
}

static int map_file(struct calibration *c, const char *path, struct fmt_error *err)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = fd < 0 || fstat(fd, &st) < 0 ? -errno : st.st_size == 0 ? -ENODATA : 0;
    if (rc == 0) {
        void *base = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        rc = base == MAP_FAILED ? -errno : 0;
        c->base = rc < 0 ? NULL : base;
        c->bytes = (uint64_t)st.st_size;
    }
    if (fd >= 0) {
        close(fd);
    }
    return rc < 0 ? fmt_fail(err, rc, "%s: %s", path, strerror(-rc)) : 0;
}

static uint64_t head_bytes(uint32_t dim)
{
    return BLOCK_TOKENS * sizeof(float) * dim;
}

static uint64_t layer_bytes(const struct ck_shape *s)
{
    return s->n_kv_heads * (head_bytes(s->k_dim) + head_bytes(s->v_dim));
}

int calibration_open(const char *path, const struct ck_shape *shape, struct calibration **ret,
                     struct fmt_error *err)
{
    struct calibration *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", path);
    }
    c->shape = *shape;
    c->block_bytes = shape->n_layers * layer_bytes(shape);
    int rc = map_file(c, path, err);
    rc = rc < 0 ? rc : read_records(c, path, err);
    rc = rc < 0 ? rc : check_pieces(c, path, err);
    if (rc < 0) {
        calibration_close(c);
        return rc;
    }
    *ret = c;
    return 0;
}

void calibration_close(struct calibration *c)
{
    if (c == NULL) {
        return;
    }
    if (c->base != NULL) {
        munmap((void *)c->base, (size_t)c->bytes);
    }
    free(c->pieces);
    free(c);
}

uint32_t calibration_n_tokens(const struct calibration *c)
{
    return c->n_blocks * BLOCK_TOKENS;
}

/* ---- one head ---------------------------------------------------------------------------- */

/* Copies a range of a block, whatever pieces it came in. first: the block's first piece. */
static void copy_range(const struct piece *first, uint64_t offset, uint64_t bytes, uint8_t *ret)
{
    for (const struct piece *p = first; bytes > 0; p++) {
        if (offset >= p->offset + p->bytes) {
            continue;
        }
        uint64_t skip = offset - p->offset, n = p->bytes - skip;
        n = n < bytes ? n : bytes;
        memcpy(ret, p->data + skip, n);
        ret += n;
        offset += n;
        bytes -= n;
    }
}

void calibration_head(const struct calibration *c, uint32_t layer, enum ck_role role, uint32_t head,
                      float *ret)
{
    const struct ck_shape *s = &c->shape;
    const uint32_t dim = role == CK_K ? s->k_dim : s->v_dim;
    const uint64_t n = (uint64_t)BLOCK_TOKENS * dim;
    uint64_t offset = layer * layer_bytes(s) + head * head_bytes(dim);
    offset += role == CK_V ? s->n_kv_heads * head_bytes(s->k_dim) : 0;
    const struct piece *p = c->pieces;
    for (uint32_t block = 0; block < c->n_blocks; block++, ret += n) {
        while (p->position < block) {
            p++;
        }
        if (role == CK_V) {
            copy_range(p, offset, n * sizeof(float), (uint8_t *)ret);
            continue;
        }
        /* K: tiles of 16 tokens, one dimension after the other. */
        for (uint32_t i = 0; i < BLOCK_TOKENS / TILE_TOKENS * dim; i++) {
            float of_tokens[TILE_TOKENS];
            copy_range(p, offset + i * sizeof(of_tokens), sizeof(of_tokens), (uint8_t *)of_tokens);
            for (uint32_t t = 0; t < TILE_TOKENS; t++) {
                ret[(i / dim * TILE_TOKENS + t) * dim + i % dim] = of_tokens[t];
            }
        }
    }
}
