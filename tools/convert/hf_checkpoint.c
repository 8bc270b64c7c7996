#include "tools/convert/hf_checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

static int out_of_memory(const char *path, struct fmt_error *err)
{
    return fmt_fail(err, -ENOMEM, "%s: out of memory", path);
}

/* ---- config.json ------------------------------------------------------------------------- */

static int read_number(const struct hf_checkpoint *h, const char *key, uint32_t fallback,
                       uint32_t max, uint32_t *ret, struct fmt_error *err)
{
    const json_t *j = json_object_get(hf_text_config(h->config), key);
    json_int_t value = json_is_integer(j) ? json_integer_value(j) : 0;
    bool absent = j == NULL || json_is_null(j);
    if (absent && fallback > 0) {
        *ret = fallback;
        return 0;
    }
    if (value < 1 || value > (json_int_t)max) {
        return fmt_fail(err, -EINVAL, "%s/config.json: %s must be there and lie in 1..%u", h->path,
                        key, max);
    }
    *ret = (uint32_t)value;
    return 0;
}

/* The share of a head's dimensions that RoPE turns. */
static int read_rotary(const struct hf_checkpoint *h, struct ck_shape *s, struct fmt_error *err)
{
    static const char key[] = "partial_rotary_factor";
    const json_t *config = hf_text_config(h->config), *share = json_object_get(config, key);
    if (share == NULL) {
        share = json_object_get(json_object_get(config, "rope_parameters"), key);
    }
    double factor = json_is_number(share) ? json_number_value(share) : 1;
    s->n_rot = factor > 0 && factor <= 1 ? (uint32_t)(factor * s->k_dim) : 0;
    if ((share != NULL && !json_is_number(share) && !json_is_null(share)) || s->n_rot == 0 ||
        s->n_rot % 2 != 0) {
        return fmt_fail(err, -EINVAL,
                        "%s/config.json: %s must be above 0, at most 1, and turn whole pairs of a "
                        "head's %u dimensions",
                        h->path, key, s->k_dim);
    }
    return 0;
}

static int read_config(struct hf_checkpoint *h, struct fmt_error *err)
{
    struct ck_shape *s = &h->base.shape;
    char *path;
    json_error_t why;
    uint32_t n_embd, dim;
    if (asprintf(&path, "%s/config.json", h->path) < 0) {
        return out_of_memory(h->path, err);
    }
    h->config = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    free(path);
    if (!json_is_object(h->config)) {
        return fmt_fail(err, -EINVAL, "%s/config.json: %s, line %d", h->path,
                        h->config == NULL ? why.text : "not an object",
                        h->config == NULL ? why.line : 1);
    }
    const char *type = json_string_value(json_object_get(hf_text_config(h->config), "model_type"));
    snprintf(s->architecture, sizeof(s->architecture), "%s", type != NULL ? type : "unnamed");
    int rc = read_number(h, "num_hidden_layers", 0, CK_MAX_LAYERS, &s->n_layers, err);
    rc = rc < 0 ? rc : read_number(h, "hidden_size", 0, 1u << 20, &n_embd, err);
    rc = rc < 0 ? rc : read_number(h, "num_attention_heads", 0, CK_MAX_HEADS, &s->n_heads, err);
    rc = rc < 0
             ? rc
             : read_number(h, "num_key_value_heads", s->n_heads, s->n_heads, &s->n_kv_heads, err);
    rc = rc < 0 ? rc : read_number(h, "head_dim", n_embd / s->n_heads, 1u << 14, &dim, err);
    if (rc < 0) {
        return rc;
    }
    s->k_dim = s->v_dim = dim;
    s->cache_pairs = ck_gguf_pairs(s->architecture);
    s->rope_pairs = CK_PAIRS_HALVES; /* of every model_type that is known there */
    return read_rotary(h, s, err);
}

/* ---- the folder's files ------------------------------------------------------------------ */

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct hf_file *)a)->name, ((const struct hf_file *)b)->name);
}

static int add_file(struct hf_checkpoint *h, const char *name, struct fmt_error *err)
{
    if (h->n_files == HF_MAX_FILES) {
        return fmt_fail(err, -EFBIG, "%s: more than %u files of tensors", h->path, HF_MAX_FILES);
    }
    struct hf_file *grown = realloc(h->files, (h->n_files + 1) * sizeof(*grown));
    if (grown == NULL) {
        return out_of_memory(h->path, err);
    }
    h->files = grown;
    h->files[h->n_files] = (struct hf_file){.name = strdup(name)};
    if (h->files[h->n_files].name == NULL) {
        return out_of_memory(h->path, err);
    }
    h->n_files++;
    return 0;
}

/* Whether the index (NULL: there is none) names the file. */
static bool is_indexed(const json_t *index, const char *name)
{
    const char *tensor;
    json_t *file;
    json_object_foreach(json_object_get(index, "weight_map"), tensor, file)
    {
        if (json_is_string(file) && strcmp(json_string_value(file), name) == 0) {
            return true;
        }
    }
    return index == NULL;
}

static json_t *load_index(const struct hf_checkpoint *h)
{
    char *path;
    if (asprintf(&path, "%s/" HF_INDEX_NAME, h->path) < 0) {
        return NULL;
    }
    json_t *index = json_load_file(path, 0, NULL);
    free(path);
    return index;
}

/* The files that the index names; without one, all that end so. */
static int list_files(struct hf_checkpoint *h, struct fmt_error *err)
{
    int rc = 0;
    DIR *folder = opendir(h->path);
    if (folder == NULL) {
        return fmt_fail(err, -errno, "%s: %s", h->path, strerror(errno));
    }
    json_t *index = load_index(h);
    for (struct dirent *entry; rc == 0 && (entry = readdir(folder)) != NULL;) {
        if (ends_with(entry->d_name, ".safetensors") && is_indexed(index, entry->d_name)) {
            rc = add_file(h, entry->d_name, err);
        }
    }
    json_decref(index);
    closedir(folder);
    if (rc == 0 && h->n_files == 0) {
        return fmt_fail(err, -ENOENT, "%s: no file of it ends in .safetensors", h->path);
    }
    if (rc == 0) {
        qsort(h->files, h->n_files, sizeof(*h->files), compare_names);
    }
    return rc;
}

static void take_tensor(const struct hf_file *f, const struct safetensor *from,
                        struct ck_tensor *to)
{
    uint64_t row = 1;
    for (uint32_t i = 1; i < from->n_dims; i++) {
        row *= from->shape[i]; /* the product of all is checked */
    }
    *to = (struct ck_tensor){
        .name = from->name,
        .type = safetensors_type(from->dtype),
        .is_matrix = from->n_dims > 1,
        .n_rows = from->n_dims > 0 ? from->shape[0] : 1,
        .row_values = row,
        .data = f->weights.base + f->weights.data_offset + from->begin,
        .bytes = from->end - from->begin,
    };
    ck_role_by_name(to);
    if (to->bytes == 0) {
        to->role = CK_OTHER;
    }
}

static int open_files(struct hf_checkpoint *h, struct fmt_error *err)
{
    struct checkpoint *c = &h->base;
    for (size_t i = 0; i < h->n_files; i++) {
        struct hf_file *f = &h->files[i];
        char *path;
        if (asprintf(&path, "%s/%s", h->path, f->name) < 0) {
            return out_of_memory(h->path, err);
        }
        int rc = safetensors_open(path, &f->weights, err);
        free(path);
        if (rc < 0) {
            return rc;
        }
        f->first_tensor = c->n_tensors;
        size_t n = c->n_tensors + f->weights.n_tensors;
        struct ck_tensor *grown = realloc(c->tensors, (n + 1) * sizeof(*grown));
        if (grown == NULL) {
            return out_of_memory(h->path, err);
        }
        c->tensors = grown;
        for (size_t k = 0; k < f->weights.n_tensors; k++) {
            take_tensor(f, &f->weights.tensors[k], &c->tensors[c->n_tensors++]);
        }
    }
    return 0;
}

static void close_hf(struct checkpoint *c)
{
    struct hf_checkpoint *h = (struct hf_checkpoint *)c;
    for (size_t i = 0; i < h->n_files; i++) {
        safetensors_close(&h->files[i].weights);
        free(h->files[i].name);
    }
    json_decref(h->config);
    free(h->files);
    free(h->path);
    free(c->tensors);
    free(h);
}

static bool can_write(const struct fmt_type_info *type)
{
    return safetensors_dtype(type) != NULL;
}

static const struct ck_container hf_container = {
    .can_write = can_write,
    .begin = hf_begin,
    .write = hf_write,
    .finish = hf_finish,
    .destroy = hf_destroy,
    .close = close_hf,
};

int hf_checkpoint_open(const char *path, struct checkpoint **ret, struct fmt_error *err)
{
    struct hf_checkpoint *h = calloc(1, sizeof(*h));
    if (h == NULL) {
        return out_of_memory(path, err);
    }
    h->base.container = &hf_container;
    h->path = strdup(path);
    int rc = h->path == NULL ? out_of_memory(path, err) : read_config(h, err);
    rc = rc < 0 ? rc : list_files(h, err);
    rc = rc < 0 ? rc : open_files(h, err);
    if (rc < 0) {
        close_hf(&h->base);
        return rc;
    }
    *ret = &h->base;
    return 0;
}
