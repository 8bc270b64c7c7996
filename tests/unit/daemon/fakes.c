#include "daemon/model/shadow.h"
#include "tests/unit/daemon/fakes.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct fakes fakes;

/* ---- the engine -------------------------------------------------------------------------- */

int engine_submit(struct engine *e, struct request *r)
{
    if (fakes.submit_result < 0) {
        return fakes.submit_result;
    }
    fakes.submitted[fakes.n_submitted++] = r;
    return 0;
}

void engine_cancel(struct engine *e, struct request *r)
{
    fakes.n_cancelled++;
}

void engine_kick(struct engine *e)
{
    fakes.n_kicks++;
}

struct request_event *engine_take_events(struct engine *e)
{
    struct request_event *events = fakes.events;
    fakes.events = NULL;
    return events;
}

void engine_drain(struct engine *e)
{
}

void engine_stats(struct engine *e, struct engine_stats *ret)
{
    *ret = (struct engine_stats){.n_running = fakes.n_submitted};
}

uint32_t engine_retry_ms(struct engine *e)
{
    return 1234;
}

size_t engine_users(struct engine *e, struct fair_user *ret, size_t max)
{
    return 0;
}

size_t engine_requests(struct engine *e, const struct request **ret, size_t max)
{
    for (unsigned i = 0; i < fakes.n_submitted && i < max; i++) {
        ret[i] = fakes.submitted[i];
    }
    return fakes.n_submitted;
}

uint32_t engine_model_users(struct engine *e, const struct model *m)
{
    return fakes.n_submitted;
}

static void publish(struct request_event *ev)
{
    struct request_event **end = &fakes.events;
    while (*end) {
        end = &(*end)->next;
    }
    *end = ev;
}

void fake_tokens(struct request *r, const char *text, int32_t token, size_t bytes)
{
    struct request_event *ev = calloc(1, sizeof(*ev) + sizeof(struct sampled_token) + strlen(text));
    struct sampled_token *t = (struct sampled_token *)(ev + 1);
    t->token = token;
    char *copy = (char *)(t + 1);
    memcpy(copy, text, strlen(text));
    ev->kind = REQUEST_TOKENS;
    ev->request = r;
    ev->n_tokens = 1;
    ev->tokens = t;
    ev->text = copy;
    ev->text_bytes = strlen(text);
    ev->bytes = bytes;
    atomic_fetch_add(&r->undelivered_bytes, bytes);
    publish(ev);
}

void fake_rows(struct request *r, uint32_t n_rows, float value)
{
    size_t bytes = n_rows * FAKE_N_VOCAB * sizeof(float);
    struct request_event *ev = calloc(1, sizeof(*ev) + bytes);
    void *rows = ev + 1;
    ev->kind = REQUEST_ROWS;
    ev->request = r;
    ev->n_rows = n_rows;
    ev->is_placed = area_take(r->area, bytes, &ev->place, &rows) == 0;
    ev->rows = rows;
    for (size_t i = 0; i < n_rows * FAKE_N_VOCAB; i++) {
        ((float *)rows)[i] = value;
    }
    publish(ev);
}

void fake_done(struct request *r, enum request_finish finish)
{
    struct request_event *ev = calloc(1, sizeof(*ev));
    ev->kind = REQUEST_DONE;
    ev->request = r;
    r->finish = finish;
    for (uint32_t i = 0; i < r->n_samples; i++) {
        r->samples[i].finish = finish;
    }
    r->n_prompt = (uint32_t)r->n_tokens;
    for (unsigned i = 0; i < fakes.n_submitted; i++) {
        if (fakes.submitted[i] == r) {
            fakes.submitted[i] = fakes.submitted[--fakes.n_submitted];
        }
    }
    publish(ev);
}

/* ---- models ------------------------------------------------------------------------------ */

static const struct arch arch = {.name = "fake"};
static const struct model_shape shape = {
    .arch = &arch, .n_vocab = FAKE_N_VOCAB, .n_embd = FAKE_N_EMBD};

struct model *fake_model(void)
{
    return (struct model *)&shape; /* never looked into */
}

struct model *model_ref(struct model *m)
{
    fakes.model_refs++;
    return m;
}

void model_unref(struct model *m)
{
    if (m) {
        cr_assert_gt(fakes.model_refs, 0);
        fakes.model_refs--;
    }
}

const char *model_name(const struct model *m)
{
    return "fake";
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    return (const struct tokenizer *)m;
}

const struct model_shape *model_shape(const struct model *m)
{
    return &shape;
}

uint32_t model_n_ctx(const struct model *m)
{
    return FAKE_N_CTX;
}

uint32_t model_max_batch_rows(const struct model *m)
{
    return FAKE_N_BATCH;
}

bool model_is_encoder(const struct model *m)
{
    return fakes.model_is_encoder;
}

uint32_t model_n_scores(const struct model *m)
{
    return fakes.n_scores;
}

const struct gguf *model_gguf(const struct model *m)
{
    return NULL; /* only asked for pairs of texts */
}

const struct kv_layout *model_kv_layout(const struct model *m)
{
    static const struct kv_layout layout = {.n_classes = 1};
    return &layout;
}

const struct kv_identity *model_kv_identity(const struct model *m)
{
    static const struct kv_identity identity = {.about = "fake"};
    return &identity;
}

int engine_kv(struct engine *e, struct engine_kv_call *call)
{
    return -ESHUTDOWN;
}

int kv_export_checksum(struct kv_export *x, uint32_t index, uint64_t *ret)
{
    return -ECANCELED;
}

int kv_export_read(struct kv_export *x, uint32_t index, uint64_t offset, size_t bytes, void *to)
{
    return -ECANCELED;
}

bool kv_import_is_sound(const void *block, uint64_t bytes, uint64_t checksum)
{
    return false;
}

const char *kv_miss_text(enum kv_miss miss)
{
    return "";
}

size_t model_op_times(const struct model *m, struct gqa_op_time *ret, size_t max)
{
    ret[0] =
        (struct gqa_op_time){.kind = GQA_OP_LINEAR, .calls = 2, .rows = 3, .ns = 4, .bytes = 5};
    return 1;
}

const char *model_op_name(uint32_t kind)
{
    return kind == GQA_OP_LINEAR ? "linear" : "other";
}

void model_facts(const struct model *m, struct model_facts *ret)
{
    *ret = (struct model_facts){
        .n_ctx = FAKE_N_CTX, .path = "/fake", .type_name = "F32", .packed_source = "none"};
}

struct model *registry_get(struct registry *r, const char *name)
{
    bool known = fakes.model_is_loaded && strcmp(name, "fake") == 0;
    return known ? model_ref(fake_model()) : NULL;
}

int registry_load(struct registry *r, const char *name_or_path, const char *serve_as,
                  const struct model_options *options, const struct registry_load *callbacks,
                  struct fmt_error *err)
{
    if (strcmp(name_or_path, "fake") != 0) {
        return -ENOENT;
    }
    fakes.load = *callbacks;
    fakes.n_loads++;
    return 0;
}

int registry_unload(struct registry *r, const char *name, struct model **ret)
{
    if (!fakes.model_is_loaded) {
        return -ENOENT;
    }
    fakes.model_is_loaded = false;
    *ret = model_ref(fake_model());
    return 0;
}

int registry_list(struct registry *r, struct registry_entry **ret, size_t *ret_count)
{
    *ret = NULL;
    *ret_count = 0;
    return 0;
}

int registry_loaded(struct registry *r, struct registry_entry **ret, size_t *ret_count)
{
    return registry_list(r, ret, ret_count);
}

size_t backend_catalogue_list(struct backend_catalogue *c, struct backend_info *ret, size_t max)
{
    return 0;
}

/* ---- the tokenizer: a token per byte ----------------------------------------------------- */

int backend_catalogue_rescan(struct backend_catalogue *c)
{
    return 0;
}

int backend_selftest(struct backend_catalogue *c, const char *spec, struct plugin_report *ret,
                     struct gqa_reason *reason)
{
    return -ENOENT;
}

int backend_ensure_tested(struct backend_catalogue *c, const char *spec, struct gqa_reason *reason)
{
    return -ENOENT;
}

int plan_create(struct model *m, const struct plan_specs *specs, struct plan **ret,
                struct fmt_error *err)
{
    return -ENOENT;
}

bool model_shadow_facts(const struct model *m, struct shadow_facts *ret)
{
    return false;
}

void plan_unref(struct plan *p)
{
}

struct plan *model_plan(const struct model *m)
{
    return NULL;
}

struct backend *plan_attention(const struct plan *p)
{
    return NULL;
}

bool plan_has(const struct plan *p, uint32_t caps)
{
    return true;
}

const char *backend_spec(const struct backend *b)
{
    return "fake";
}

int engine_swap(struct engine *e, struct engine_swap *swap)
{
    return -ESHUTDOWN;
}

bool engine_take_wanted(struct engine *e, struct engine_wanted *ret)
{
    return false;
}

bool engine_take_retired(struct engine *e, struct engine_retired *ret)
{
    return false;
}

uint32_t tokenizer_n_vocab(const struct tokenizer *t)
{
    return FAKE_N_VOCAB;
}

const char *tokenizer_kind(const struct tokenizer *t)
{
    return "fake";
}

const char *tokenizer_pre(const struct tokenizer *t)
{
    return "";
}

int32_t tokenizer_bos(const struct tokenizer *t)
{
    return TOKEN_NONE;
}

int32_t tokenizer_eos(const struct tokenizer *t)
{
    return TOKEN_NONE;
}

bool tokenizer_is_eog(const struct tokenizer *t, int32_t token)
{
    return false;
}

bool tokenizer_adds_bos(const struct tokenizer *t)
{
    return false;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t bytes,
                     struct tokenize_options options, size_t max_tokens, int32_t **ret_tokens,
                     size_t *ret_count)
{
    int32_t *tokens = bytes ? malloc(bytes * sizeof(*tokens)) : NULL;
    for (size_t i = 0; i < bytes; i++) {
        tokens[i] = (unsigned char)text[i] % FAKE_N_VOCAB;
    }
    *ret_tokens = tokens;
    *ret_count = bytes;
    return 0;
}

int tokenizer_piece(const struct tokenizer *t, int32_t token, bool special, struct gguf_string *ret)
{
    static char bytes[FAKE_N_VOCAB];
    bytes[token] = (char)token;
    *ret = (struct gguf_string){&bytes[token], 1};
    return 0;
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *tokens, size_t count, bool special,
                     char **ret_text, size_t *ret_bytes)
{
    *ret_text = strdup("");
    *ret_bytes = 0;
    return 0;
}

/* ---- the host ---------------------------------------------------------------------------- */

static int run(void *data, struct task *t)
{
    TAILQ_INSERT_HEAD(&fakes.tasks, t, entry);
    return 0;
}

static bool recall(void *data, struct task *t)
{
    struct task *other;
    TAILQ_FOREACH(other, &fakes.tasks, entry)
    {
        if (other == t && !t->is_owed) {
            TAILQ_REMOVE(&fakes.tasks, t, entry);
            return true;
        }
    }
    return false;
}

static void post(void *data, struct task *t)
{
    run(data, t);
}

static void drain(void *data, uint32_t timeout_ms)
{
}

static int reload(void *data, struct ipc_error *e)
{
    ipc_error_set(e, PROTO_E_INVALID_PARAMS, "line 3");
    return -EINVAL;
}

static void facts(void *data, struct service_host_facts *ret)
{
    ret->n_connections = 1;
}

void fake_run_tasks(void)
{
    struct task *t;
    while ((t = TAILQ_FIRST(&fakes.tasks)) != NULL) {
        TAILQ_REMOVE(&fakes.tasks, t, entry);
        if (t->work) {
            t->work(t);
        }
        t->done(t);
    }
}

struct service *fake_service(const struct service_limits *limits)
{
    struct service *s = NULL;
    const struct service_options options = {.host = {.run = run,
                                                     .recall = recall,
                                                     .post = post,
                                                     .drain = drain,
                                                     .reload = reload,
                                                     .facts = facts},
                                            .quotas = &fakes.quotas,
                                            .penalties = &fakes.penalties,
                                            .limits = *limits};
    fakes = (struct fakes){.model_is_loaded = true};
    TAILQ_INIT(&fakes.tasks);
    penalty_init(&fakes.penalties);
    fakes.penalties.limits = (struct penalty_limits){.strikes_max = 1000, .share_permille = 5};
    quota_init(&fakes.quotas);
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        fakes.quotas.limits.of[k] = UINT64_MAX;
    }
    cr_assert_eq(service_create(&options, &s), 0);
    return s;
}
