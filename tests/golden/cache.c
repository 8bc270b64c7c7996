/* Golden models with the KV cache: whatever is adopted, at whichever split, from memory or from the
 * store of a daemon that was restarted, every further logit has the bits of a cold run.
 *
 *   golden-cache [MODEL...]
 *
 * One text of N_IDS tokens per model; a prompt of it is cached, then a sequence with the first L
 * tokens in common goes on with other ones, for every L. Windows, groups, heads and types are those
 * of the models; the truth of the cold run itself is golden's business. */
#include "tests/golden/golden.h"

#include <errno.h>
#include <ftw.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define N_IDS 230u /* three whole blocks and a part */

static unsigned n_passed, n_failed, n_hits;

static void verdict(bool good, const char *model, const char *what)
{
    n_passed += good;
    n_failed += !good;
    if (!good) {
        printf("FAILED %s: %s\n", model, what);
    }
}

/* ---- waiting for the io thread ----------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static bool news;

static void on_news(void *arg)
{
    pthread_mutex_lock(&lock);
    news = true;
    pthread_cond_signal(&wake);
    pthread_mutex_unlock(&lock);
}

static void settle(struct kv_cache *c)
{
    while (kv_cache_is_busy(c)) {
        pthread_mutex_lock(&lock);
        while (!news) {
            pthread_cond_wait(&wake, &lock);
        }
        news = false;
        pthread_mutex_unlock(&lock);
        kv_cache_poll(c);
    }
}

/* ---- one model --------------------------------------------------------------------------- */

struct subject {
    struct rig *rig;
    struct model *model;
    const char *name;
    const char *folder;
    struct kv_cache *cache;
    struct kv_space *space;
    uint32_t n_vocab;
    float *cold, *warm; /* (N_IDS, n_vocab) */
};

static int32_t token_at(uint32_t i, uint32_t branch)
{
    return (int32_t)(3 + (i * 7919 + branch * 104729 + i * i * 31) % 500);
}

static void open_cache(struct subject *s)
{
    const struct kv_cache_options options = {
        .arena_bytes_max = 1ull << 28,
        .folder = s->folder,
        .io = s->rig->io,
        .store_bytes_max = 1ull << 28,
        .pool = s->rig->pool,
        .wake = on_news,
    };
    if (kv_cache_create(&options, &s->cache) < 0) {
        fprintf(stderr, "no cache\n");
        exit(99);
    }
    s->space =
        kv_cache_space(s->cache, "golden", model_kv_identity(s->model), model_kv_layout(s->model));
    settle(s->cache);
}

/* Feeds tokens [feed's n_tokens, N_IDS) in chunks of odd sizes, the logits to their rows. */
static int feed_rest(struct subject *s, struct feed *f, float *logits)
{
    struct feed *feeds[] = {f};
    int rc = 0;
    while (rc == 0 && f->kv.n_tokens < N_IDS) {
        uint32_t left = N_IDS - f->kv.n_tokens, n = left < 37 ? left : 37;
        float *out[] = {logits + (size_t)f->kv.n_tokens * s->n_vocab};
        rc = feed_step(feeds, 1, n, out);
    }
    return rc;
}

/* One text: the first common tokens are branch 0's. shared: through the cache. Returns how many
 * tokens were adopted, or -errno. */
static int run_text(struct subject *s, uint32_t common, uint32_t branch, bool shared, float *logits)
{
    int32_t tokens[N_IDS];
    for (uint32_t i = 0; i < N_IDS; i++) {
        tokens[i] = token_at(i, i < common ? 0 : branch);
    }
    struct feed f = {.model = s->model, .tokens = tokens, .n_prompt = N_IDS};
    kv_sequence_init(&f.kv, model_kv_layout(s->model), s->cache, shared ? s->space : NULL, true);
    const struct kv_text text = {tokens, N_IDS, N_IDS};
    int rc;
    while ((rc = kv_sequence_adopt(&f.kv, &text, N_IDS - 1, true)) == -EAGAIN) {
        settle(s->cache); /* the files are not in memory: the io thread reads them */
    }
    int adopted = (int)f.kv.n_tokens;
    rc = rc < 0 ? rc : feed_rest(s, &f, logits);
    kv_sequence_checkpoint(&f.kv);
    kv_sequence_finish(&f.kv);
    return rc < 0 ? rc : adopted;
}

static void check_split(struct subject *s, uint32_t common, const char *from)
{
    char what[128];
    int cold = run_text(s, common, 1 + common, false, s->cold);
    int warm = run_text(s, common, 1 + common, true, s->warm);
    size_t first = warm > 0 ? (size_t)warm * s->n_vocab : 0;
    bool same = cold >= 0 && warm >= 0 &&
                memcmp(s->cold + first, s->warm + first,
                       ((size_t)N_IDS * s->n_vocab - first) * sizeof(float)) == 0;
    n_hits += warm > 0;
    snprintf(what, sizeof(what), "%u tokens in common, %d adopted from %s: other bits", common,
             warm, from);
    verdict(same, s->name, what);
    snprintf(what, sizeof(what), "%u tokens in common, only %d adopted from %s", common, warm,
             from);
    verdict(warm >= (int)(common / 64 * 64 < N_IDS ? common / 64 * 64 : 0), s->name, what);
}

/* From memory, every split; after a restart, with no more than the files, some of each kind. */
static void check_model(struct rig *r, const char *root, const char *name, uint32_t kv_type,
                        const char *folder)
{
    struct golden g;
    if (golden_open(root, name, &g) < 0) {
        n_failed++;
        return;
    }
    struct run_options o = {.kv_type = kv_type, .n_ctx = 512};
    struct subject s = {.rig = r, .name = name, .folder = folder, .n_vocab = g.n_vocab};
    s.cold = calloc((size_t)N_IDS * g.n_vocab, sizeof(float));
    s.warm = calloc((size_t)N_IDS * g.n_vocab, sizeof(float));
    if (rig_load(r, &g, &o, &s.model) < 0) {
        n_failed++;
    } else {
        open_cache(&s);
        run_text(&s, N_IDS, 0, true, s.warm);
        for (uint32_t common = 1; common <= N_IDS; common += common % 64 == 2 ? 29 : 1) {
            check_split(&s, common, "memory");
        }
        settle(s.cache);
        kv_cache_destroy(s.cache);
        static const uint32_t splits[] = {64, 65, 100, 128, 191, 192, 193, 229, N_IDS};
        for (size_t i = 0; i < sizeof(splits) / sizeof(*splits); i++) {
            open_cache(&s); /* anew each time: what the last one computed is not in memory */
            check_split(&s, splits[i], "the store");
            kv_cache_destroy(s.cache);
        }
        model_unref(s.model);
    }
    free(s.cold);
    free(s.warm);
    golden_close(&g);
}

/* ---- all --------------------------------------------------------------------------------- */

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    return remove(path);
}

static const char *const default_models[] = {
    "llama-mha", "llama-gqa", "llama-mqa", "llama-yarn",     "qwen2",   "qwen3",    "gemma2",
    "gemma3",    "phi3",      "granite",   "llama-q-Q4_K_M", "mixtral", "qwen3moe", "gpt-oss",
};

int main(int argc, char **argv)
{
    const char *root = getenv("GQAD_TEST_GOLDEN");
    char probe[4096], folder[] = "/tmp/gqad-golden-XXXXXX";
    snprintf(probe, sizeof(probe), "%s/models/llama-gqa/model.gguf", root != NULL ? root : "");
    if (access(probe, R_OK) != 0) {
        printf("SKIPPED: no golden data (GQAD_TEST_GOLDEN is %s)\n", root != NULL ? root : "unset");
        return 77;
    }
    struct rig r;
    if (rig_init(&r, 2, getenv("GQAD_TEST_PLUGINS"), NULL, getenv("GQAD_TEST_CHECK")) < 0 ||
        mkdtemp(folder) == NULL) {
        fprintf(stderr, "the rig cannot be set up\n");
        return 1;
    }
    static const char *const types[] = {"f32", "f16", "bf16", "q8_0", "q4_0"};
    size_t n = argc > 1 ? (size_t)argc - 1 : sizeof(default_models) / sizeof(*default_models);
    for (size_t i = 0; i < n; i++) {
        for (size_t t = 0; t < sizeof(types) / sizeof(*types); t++) {
            uint32_t type;
            kv_type_by_name(types[t], &type);
            check_model(&r, root, argc > 1 ? argv[i + 1] : default_models[i], type, folder);
        }
    }
    nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    rig_finish(&r);
    printf("%u checks passed, %u failed, %u hits\n", n_passed, n_failed, n_hits);
    return n_failed == 0 && n_hits > 0 ? 0 : 1;
}
