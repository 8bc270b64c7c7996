/* client/embed.c - text.embed, with its tensors put together. */
#include "client/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Rows of one text as an event brought them. */
struct rows {
    uint64_t input, first_row;
    size_t n_rows;
    float *values;
};

struct collecting {
    struct gqa *g;
    struct rows *parts; /* in the order of their coming, which mixes texts */
    size_t n_parts, capacity;
    uint64_t n_dims;
    int error; /* the first thing that went wrong in an event */
};

/* Copies a tensor of two dimensions; the data inside a message is not aligned. */
static int copy_tensor(const struct gqa_value *v, float **ret, uint64_t *ret_rows,
                       uint64_t *ret_dims)
{
    struct gqa_tensor_view t;
    if (gqa_value_tensor_f32(v, &t) < 0 || t.n_dims != 2) {
        return -EPROTO;
    }
    float *values = malloc(t.bytes > 0 ? t.bytes : 1);
    if (values == NULL) {
        return -ENOMEM;
    }
    memcpy(values, t.data, t.bytes);
    *ret = values;
    *ret_rows = t.shape[0];
    *ret_dims = t.shape[1];
    return 0;
}

static int add_part(struct collecting *c, const struct gqa_value *event)
{
    struct rows part = {0};
    uint64_t n_rows = 0, n_dims = 0;
    if (c->n_parts == c->capacity) {
        size_t capacity = c->capacity > 0 ? 2 * c->capacity : 16;
        struct rows *parts = realloc(c->parts, capacity * sizeof(*parts));
        if (parts == NULL) {
            return -ENOMEM;
        }
        c->parts = parts;
        c->capacity = capacity;
    }
    if (gqa_value_u64(gqa_value_get(event, "input"), &part.input) < 0 ||
        gqa_value_u64(gqa_value_get(event, "first_row"), &part.first_row) < 0) {
        return -EPROTO;
    }
    int r = copy_tensor(gqa_value_get(event, "embeddings"), &part.values, &n_rows, &n_dims);
    if (r == 0 && c->n_parts > 0 && n_dims != c->n_dims) {
        free(part.values);
        r = -EPROTO;
    }
    if (r < 0) {
        return r;
    }
    c->n_dims = n_dims;
    part.n_rows = n_rows;
    c->parts[c->n_parts++] = part;
    return 0;
}

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct collecting *c = arg;
    if (c->error == 0) {
        c->error = add_part(c, event);
        if (c->error < 0) {
            gqa_cancel(c->g, id);
        }
    }
}

/* Where the rows of each text begin among all, and how many there are; n_tokens is the result's. */
static int find_places(const struct gqa_value *n_tokens, size_t **ret_first, size_t *ret_total)
{
    size_t n = gqa_value_count(n_tokens), total = 0;
    size_t *first = calloc(n + 1, sizeof(*first));
    if (first == NULL) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < n; i++) {
        uint64_t of_text = 0;
        first[i] = total;
        if (gqa_value_u64(gqa_value_at(n_tokens, i), &of_text) < 0 || of_text > UINT32_MAX) {
            free(first);
            return -EPROTO;
        }
        total += of_text;
    }
    first[n] = total;
    *ret_first = first;
    *ret_total = total;
    return 0;
}

/* Whether a part lies where nothing has come before: rows of one text come in order. */
static bool part_fits(const struct rows *part, const size_t *first, const size_t *next,
                      size_t n_texts)
{
    return part->input < n_texts && part->first_row == next[part->input] &&
           part->n_rows <= first[part->input + 1] - first[part->input] - next[part->input];
}

/* Puts the parts in the order of texts. */
static int join_parts(const struct collecting *c, const struct gqa_value *n_tokens,
                      float **ret_values, size_t *ret_rows)
{
    size_t n_texts = gqa_value_count(n_tokens), total = 0, placed = 0;
    size_t *first = NULL;
    int r = find_places(n_tokens, &first, &total);
    if (r < 0) {
        return r;
    }
    size_t *next = calloc(n_texts + 1, sizeof(*next));
    size_t dims = c->n_dims;
    float *values = total <= SIZE_MAX / sizeof(float) / (dims + 1)
                        ? malloc(total * dims * sizeof(float) + 1)
                        : NULL;
    r = next == NULL || values == NULL ? -ENOMEM : 0;
    for (size_t i = 0; r == 0 && i < c->n_parts; i++) {
        const struct rows *part = &c->parts[i];
        if (!part_fits(part, first, next, n_texts)) {
            r = -EPROTO;
            break;
        }
        memcpy(values + (first[part->input] + part->first_row) * dims, part->values,
               part->n_rows * dims * sizeof(float));
        next[part->input] += part->n_rows;
        placed += part->n_rows;
    }
    r = r == 0 && placed != total ? -EPROTO : r;
    free(first);
    free(next);
    if (r < 0) {
        free(values);
        return r;
    }
    *ret_values = values;
    *ret_rows = total;
    return 0;
}

static int take_result(const struct collecting *c, const struct gqa_value *result,
                       float **ret_values, size_t *ret_rows, size_t *ret_dims)
{
    const struct gqa_value *tensor = gqa_value_get(result, "embeddings");
    const struct gqa_value *n_tokens = gqa_value_get(result, "n_tokens");
    float *values = NULL;
    uint64_t rows = 0, dims = c->n_dims;
    size_t n_rows = 0;
    int r;
    if (tensor != NULL) {
        r = copy_tensor(tensor, &values, &rows, &dims);
        n_rows = rows;
        if (r == 0 && n_rows != gqa_value_count(n_tokens)) {
            free(values);
            r = -EPROTO;
        }
    } else {
        r = join_parts(c, n_tokens, &values, &n_rows);
    }
    if (r == 0) {
        *ret_values = values;
        *ret_rows = n_rows;
        *ret_dims = dims;
    }
    return r;
}

int gqa_embed(struct gqa *g, const struct gqa_params *params,
              const struct gqa_call_options *options, float **ret_values, size_t *ret_n_rows,
              size_t *ret_n_dims, struct gqa_reply **ret, struct gqa_error *ret_error)
{
    struct collecting c = {.g = g};
    struct gqa_reply *reply = NULL;
    struct gqa_call_options o;
    int r = client_call_options(options, &o);
    if (r < 0) {
        return client_fail(ret_error, r, "gqa_embed(): options without their struct_size");
    }
    o.event = on_rows;
    o.arg = &c;
    r = gqa_call(g, "text.embed", params, &o, &reply, ret_error);
    int taken = c.error;
    if (r == 0 && taken == 0) {
        taken = take_result(&c, gqa_reply_value(reply), ret_values, ret_n_rows, ret_n_dims);
    }
    for (size_t i = 0; i < c.n_parts; i++) {
        free(c.parts[i].values);
    }
    free(c.parts);
    if (taken < 0) {
        r = client_fail(ret_error, taken,
                        taken == -ENOMEM ? "no memory for the vectors"
                                         : "text.embed: the result is not what the protocol says");
    }
    if (r == 0 && ret != NULL) {
        *ret = reply;
    } else {
        gqa_reply_destroy(reply);
    }
    return r;
}
