#include "tests/golden/golden.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- files ------------------------------------------------------------------------------- */

static json_t *load_json(const struct golden *g, const char *file)
{
    char path[8192];
    json_error_t error;
    snprintf(path, sizeof(path), "%s/%s", g->dir, file);
    json_t *json = json_load_file(path, 0, &error);
    if (json == NULL) {
        fprintf(stderr, "%s: %s\n", path, error.text);
    }
    return json;
}

static int32_t *load_ids(const json_t *array, size_t *ret_count)
{
    size_t n = json_array_size(array);
    int32_t *ids = calloc(n + 1, sizeof(*ids));
    for (size_t i = 0; ids != NULL && i < n; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    }
    *ret_count = n;
    return ids;
}

static float *load_floats(const struct golden *g, const char *file, size_t n)
{
    char path[8192];
    snprintf(path, sizeof(path), "%s/%s", g->dir, file);
    FILE *f = fopen(path, "rb");
    float *values = calloc(n, sizeof(*values));
    if (f == NULL || values == NULL || fread(values, sizeof(*values), n, f) != n) {
        fprintf(stderr, "%s: %zu floats cannot be read\n", path, n);
        free(values);
        values = NULL;
    }
    if (f != NULL) {
        fclose(f);
    }
    return values;
}

/* The better of the two engines, flash attention off, f16 cache. */
static double engine_kl(const json_t *meta, const char *seq, const char *what)
{
    static const char *const keys[] = {"llama.cpp fa=0 kv=f16", "ik_llama.cpp fa=0 kv=f16"};
    const json_t *engines = json_object_get(json_object_get(meta, "engines"), seq);
    double best = 0;
    for (size_t i = 0; i < 2; i++) {
        double kl = json_number_value(json_object_get(json_object_get(engines, keys[i]), what));
        best = kl > 0 && (best == 0 || kl < best) ? kl : best;
    }
    return best;
}

static void take_types(struct golden *g, json_t *meta)
{
    const char *type;
    json_t *count;
    json_object_foreach(json_object_get(meta, "tensor_types"), type, count)
    {
        g->bf16 = g->bf16 || strcmp(type, "BF16") == 0;
        g->quantised = g->quantised || (strcmp(type, "F32") != 0 && strcmp(type, "F16") != 0 &&
                                        strcmp(type, "BF16") != 0);
    }
}

int golden_open(const char *root, const char *name, struct golden *ret)
{
    struct golden g = {0};
    snprintf(g.dir, sizeof(g.dir), "%s/models/%s", root, name);
    snprintf(g.name, sizeof(g.name), "%s", name);
    json_t *meta = load_json(&g, "meta.json");
    json_t *tokens = load_json(&g, "tokens.json");
    json_t *greedy = load_json(&g, "greedy.json");
    int rc = meta == NULL || tokens == NULL || greedy == NULL ? -1 : 0;
    if (rc == 0) {
        json_t *shape = json_object_get(meta, "shape");
        g.n_vocab = (uint32_t)json_integer_value(json_object_get(shape, "n_vocab"));
        take_types(&g, meta);
        json_t *seqs = json_object_get(tokens, "seqs");
        for (size_t i = 0; i < json_array_size(seqs) && i < 4; i++) {
            json_t *s = json_array_get(seqs, i);
            struct golden_seq *seq = &g.seqs[g.n_seqs++];
            snprintf(seq->name, sizeof(seq->name), "%s",
                     json_string_value(json_object_get(s, "name")));
            seq->ids = load_ids(json_object_get(s, "ids"), &seq->n_ids);
            seq->truth = load_floats(&g, json_string_value(json_object_get(s, "logits")),
                                     seq->n_ids * g.n_vocab);
            g.engine_kl[i] = engine_kl(meta, seq->name, "mean_kl");
            g.engine_median_kl[i] = engine_kl(meta, seq->name, "median_kl");
            rc = seq->ids == NULL || seq->truth == NULL ? -1 : rc;
        }
        json_t *ids = json_is_array(greedy) ? greedy : json_object_get(greedy, "ids");
        g.greedy = load_ids(ids, &g.n_greedy);
    }
    json_decref(meta);
    json_decref(tokens);
    json_decref(greedy);
    if (rc < 0) {
        golden_close(&g);
        return rc;
    }
    *ret = g;
    return 0;
}

void golden_close(struct golden *g)
{
    for (size_t i = 0; i < g->n_seqs; i++) {
        free(g->seqs[i].ids);
        free(g->seqs[i].truth);
    }
    free(g->greedy);
    memset(g, 0, sizeof(*g));
}

static double row_kl(const float *t, const float *c, uint32_t n_vocab)
{
    double t_max = t[0], c_max = c[0], t_sum = 0, c_sum = 0, kl = 0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        t_max = t[i] > t_max ? t[i] : t_max;
        c_max = c[i] > c_max ? c[i] : c_max;
    }
    for (uint32_t i = 0; i < n_vocab; i++) {
        t_sum += exp(t[i] - t_max);
        c_sum += exp(c[i] - c_max);
    }
    for (uint32_t i = 0; i < n_vocab; i++) {
        double lt = t[i] - t_max - log(t_sum);
        kl += exp(lt) * (lt - (c[i] - c_max - log(c_sum)));
    }
    return kl;
}

double mean_kl(const float *truth, const float *candidate, size_t n_rows, uint32_t n_vocab)
{
    double total = 0;
    for (size_t row = 0; row < n_rows; row++) {
        total += row_kl(truth + row * n_vocab, candidate + row * n_vocab, n_vocab);
    }
    return total / (double)n_rows;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median_kl(const float *truth, const float *candidate, size_t n_rows, uint32_t n_vocab)
{
    double *rows = calloc(n_rows, sizeof(*rows));
    if (rows == NULL) {
        return INFINITY;
    }
    for (size_t row = 0; row < n_rows; row++) {
        rows[row] = row_kl(truth + row * n_vocab, candidate + row * n_vocab, n_vocab);
    }
    bool numbers = true;
    for (size_t row = 0; row < n_rows; row++) {
        numbers = numbers && !isnan(rows[row]);
    }
    qsort(rows, n_rows, sizeof(*rows), by_value);
    double median = numbers ? (rows[(n_rows - 1) / 2] + rows[n_rows / 2]) / 2 : INFINITY;
    free(rows);
    return median;
}

/* ---- running ----------------------------------------------------------------------------- */

int rig_init(struct rig *r, uint32_t n_threads, const char *plugins, const char *minimal,
             const char *check_program)
{
    const char *dirs[] = {plugins, minimal};
    struct backend_catalogue_options options = {
        .dirs = dirs,
        .n_dirs = minimal != NULL ? 2 : 1,
        .check_program = check_program,
    };
    memset(r, 0, sizeof(*r));
    int rc = pool_create(n_threads, 50, &r->pool);
    rc = rc < 0 ? rc : io_create(false, &r->io);
    rc = rc < 0 ? rc : backend_catalogue_create(&options, &r->catalogue);
    const struct kv_cache_options kv = {.arena_bytes_max = 1ull << 30};
    return rc < 0 ? rc : kv_cache_create(&kv, &r->cache);
}

void rig_finish(struct rig *r)
{
    kv_cache_destroy(r->cache);
    backend_catalogue_destroy(r->catalogue);
    io_destroy(r->io);
    pool_destroy(r->pool);
}

int rig_load(struct rig *r, const struct golden *g, const struct run_options *o, struct model **ret)
{
    char path[8192];
    snprintf(path, sizeof(path), "%s/model.gguf", g->dir);
    struct model_options options = {
        .path = path,
        .name = g->name,
        .n_ctx = o->n_ctx,
        .k_type = o->kv_type,
        .v_type = o->kv_type,
        .max_batch_rows = RIG_MAX_ROWS,
        .max_out_rows = RIG_MAX_ROWS,
        .backend = o->backend,
        .attention_backend = o->attention,
    };
    struct fmt_error err = {""};
    int rc = model_load(&options, r->catalogue, r->pool, r->io, NULL, NULL, NULL, ret, &err);
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", g->name, err.text);
    }
    return rc;
}

/* Both classes in turn, by the place alone as the engine does it; its blocks are of 64 tokens, and
 * most sequences here are shorter. */
static uint8_t class_at(uint32_t position)
{
    return position / 16 % 2 == 0 ? GQA_ROW_P : GQA_ROW_D;
}

int feed_step(struct feed *const *feeds, uint32_t n_feeds, uint32_t n, float *const *ret_logits)
{
    int32_t tokens[RIG_MAX_ROWS];
    uint32_t positions[RIG_MAX_ROWS], out_rows[RIG_MAX_ROWS];
    uint8_t row_class[RIG_MAX_ROWS];
    struct gqa_attn_seq seqs[RIG_MAX_ROWS];
    uint32_t n_rows = 0;
    for (uint32_t f = 0; f < n_feeds; f++) {
        int rc = kv_sequence_reserve(&feeds[f]->kv, n);
        if (rc < 0) {
            return rc;
        }
        seqs[f] = (struct gqa_attn_seq){
            .first_row = n_rows,
            .n_rows = n,
            .n_past = feeds[f]->kv.n_tokens,
            .tables = feeds[f]->kv.tables,
        };
        for (uint32_t i = 0; i < n; i++, n_rows++) {
            positions[n_rows] = feeds[f]->kv.n_tokens + i;
            row_class[n_rows] = class_at(positions[n_rows]);
            tokens[n_rows] = feeds[f]->tokens[positions[n_rows]];
            out_rows[n_rows] = n_rows;
        }
    }
    struct gqa_attn_batch attention = {
        .struct_size = sizeof(attention),
        .n_rows = n_rows,
        .n_seqs = n_feeds,
        .commit = 1,
        .seqs = seqs,
        .row_class = row_class,
    };
    struct model_batch batch = {
        n_rows, n_rows, tokens, positions, out_rows, &attention, MODEL_WANTS_LOGITS};
    struct model_outputs outputs = {NULL};
    int rc = model_step(feeds[0]->model, &batch, &outputs);
    uint32_t n_vocab = model_shape(feeds[0]->model)->n_vocab;
    for (uint32_t f = 0; rc == 0 && f < n_feeds; f++) {
        memcpy(ret_logits[f], outputs.logits + (size_t)f * n * n_vocab,
               (size_t)n * n_vocab * sizeof(float));
        const struct kv_text text = {feeds[f]->tokens, feeds[f]->kv.n_tokens + n,
                                     feeds[f]->n_prompt};
        kv_sequence_commit(&feeds[f]->kv, n, &text);
    }
    return rc;
}

int run_chunked(struct rig *r, struct model *m, const int32_t *ids, size_t n_ids, uint32_t chunk,
                float *ret_logits)
{
    struct feed feed = {.model = m, .tokens = (int32_t *)ids};
    struct feed *feeds[] = {&feed};
    kv_sequence_init(&feed.kv, model_kv_layout(m), r->cache, NULL, false);
    uint32_t n_vocab = model_shape(m)->n_vocab;
    int rc = 0;
    for (size_t done = 0; rc == 0 && done < n_ids;) {
        uint32_t n = n_ids - done < chunk ? (uint32_t)(n_ids - done) : chunk;
        float *out[] = {ret_logits + done * n_vocab};
        rc = feed_step(feeds, 1, n, out);
        done += n;
    }
    kv_sequence_finish(&feed.kv);
    return rc;
}
