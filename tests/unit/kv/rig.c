#include "tests/unit/kv/rig.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void need(bool holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "rig: %s\n", what);
        exit(99);
    }
}

/* ---- blocks -------------------------------------------------------------------------------- */

uint32_t rig_class(unsigned k)
{
    return k % 2 == 1 ? 0 : 1;
}

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

static struct kv_key key_of(unsigned k)
{
    return k == 0 ? (struct kv_key){0, 0} : (struct kv_key){k, mix(k)};
}

void rig_block(unsigned k, struct kv_store_block *ret)
{
    *ret = (struct kv_store_block){
        .key = key_of(k),
        .parent = key_of(k - 1),
        .layer_class = rig_class(k),
        .flags = k % 3 == 0 ? KV_BLOCK_GENERATED : 0,
        .position = k - 1,
        .used_s = 1000 + k,
        .hits = k,
    };
    for (unsigned i = 0; i < KV_BLOCK_TOKENS; i++) {
        ret->tokens[i] = (int32_t)(mix(k * 1000 + i) & INT32_MAX);
    }
}

void rig_data(const struct rig *r, unsigned k, unsigned char *ret)
{
    uint64_t bytes = r->identity.block_bytes[rig_class(k)];
    for (uint64_t i = 0; i < bytes; i += 8) {
        uint64_t word = mix((uint64_t)k << 32 | i);
        memcpy(ret + i, &word, bytes - i < 8 ? bytes - i : 8);
    }
}

void rig_canary(unsigned k, unsigned char ret[32])
{
    for (uint64_t i = 0; i < 32; i += 8) {
        uint64_t word = mix((uint64_t)k << 32 | (1024 + i));
        memcpy(ret + i, &word, 8);
    }
}

/* ---- making -------------------------------------------------------------------------------- */

static uint64_t now_ms(void *arg)
{
    return ((struct rig *)arg)->now_ms;
}

void rig_init(struct rig *r, struct disk *disk)
{
    *r = (struct rig){.disk = disk, .bytes_max = 512 << 10};
    r->identity = (struct kv_store_identity){
        .id = "rig-identity-16",
        .layout_version = 1,
        .n_classes = 2,
        .block_bytes = {6400, 2048},
        .about = "a test",
    };
    sem_init(&r->done, 0, 0);
}

void rig_init_folder(struct rig *r, struct io *io)
{
    rig_init(r, NULL);
    r->io = io;
    strcpy(r->folder, "/tmp/gqad-test-XXXXXX");
    need(mkdtemp(r->folder) != NULL, "mkdtemp");
}

static void remove_folder(const char *path)
{
    DIR *d = opendir(path);
    if (d == NULL) {
        return;
    }
    for (struct dirent *file; (file = readdir(d)) != NULL;) {
        unlinkat(dirfd(d), file->d_name, 0);
    }
    closedir(d);
    rmdir(path);
}

void rig_finish(struct rig *r)
{
    rig_close(r);
    sem_destroy(&r->done);
    if (r->folder[0] != '\0') {
        remove_folder(r->folder);
    }
}

static void on_block(void *arg, const struct kv_store_block *b)
{
    struct rig *r = arg;
    struct kv_store_block truth;
    unsigned k = (unsigned)b->key.low;
    if (b->key.low == 0 || b->key.low > RIG_MAX) {
        r->n_strange++;
        return;
    }
    rig_block(k, &truth);
    if (!kv_key_equal(truth.key, b->key) || !kv_key_equal(truth.parent, b->parent) ||
        truth.layer_class != b->layer_class || truth.position != b->position || r->found[k] ||
        memcmp(truth.tokens, b->tokens, sizeof(truth.tokens)) != 0) {
        r->n_strange++;
        return;
    }
    r->found[k] = true;
    r->found_order[r->n_found++] = k;
    r->blocks[k] = *b;
}

int rig_open(struct rig *r)
{
    const struct kv_store_options options = {
        .folder = r->disk != NULL ? "memory" : r->folder,
        .name = "test",
        .identity = &r->identity,
        .io = r->io,
        .files = r->disk != NULL ? &r->disk->files : NULL,
        .bytes_max = r->bytes_max,
        .pause_ms = 1000,
        .now_ms = now_ms,
        .now_arg = r,
    };
    memset(r->found, 0, sizeof(r->found));
    memset(r->written, 0, sizeof(r->written));
    for (unsigned k = 1; k <= RIG_MAX; k++) {
        /* Forgotten or failed, and not known to be synced: it may be there. Nobody forgets it
         * again.
         */
        if (r->status[k] == RIG_FORGOTTEN || r->status[k] == RIG_FAILED) {
            r->status[k] = RIG_UNKNOWN;
        }
    }
    r->n_found = r->n_strange = 0;
    r->err.text[0] = '\0';
    return kv_store_open(&options, on_block, r, &r->store, &r->err);
}

void rig_close(struct rig *r)
{
    kv_store_close(r->store);
    r->store = NULL;
}

/* ---- promises ------------------------------------------------------------------------------ */

static void promise(struct rig *r, unsigned k, enum rig_status status)
{
    r->status[k] = status;
    if (status == RIG_DROPPED || status == RIG_PURGED) {
        r->found[k] = r->written[k] = false;
    }
    if (r->disk != NULL) {
        disk_mark(r->disk, (long)status * 1000000 + k);
    }
}

void rig_apply_mark(enum rig_status *status, long mark)
{
    status[mark % 1000000] = (enum rig_status)(mark / 1000000);
}

static void on_written(void *arg, int result)
{
    struct rig *r = ((void **)arg)[0];
    unsigned k = (unsigned)(uintptr_t)((void **)arg)[1];
    free(arg);
    free(r->data[k]);
    r->data[k] = NULL;
    r->results[k] = result;
    if (result == 0) {
        r->blocks[k] = r->writes[k].block;
        r->written[k] = true;
    }
    promise(r, k, result == 0 ? RIG_STORED : RIG_FAILED);
}

void rig_queue(struct rig *r, unsigned k)
{
    void **arg = malloc(2 * sizeof(void *));
    r->data[k] = malloc(r->identity.block_bytes[rig_class(k)]);
    need(arg != NULL && r->data[k] != NULL, "memory");
    arg[0] = r;
    arg[1] = (void *)(uintptr_t)k;
    rig_data(r, k, r->data[k]);
    r->writes[k] = (struct kv_store_write){.data = r->data[k], .done = on_written, .arg = arg};
    rig_block(k, &r->writes[k].block);
    promise(r, k, RIG_QUEUED);
    int rc = kv_store_write(r->store, &r->writes[k]);
    if (rc < 0) {
        on_written(arg, rc);
    }
}

static void on_call(void *arg, int result)
{
    struct rig *r = arg;
    r->call_result = result;
    sem_post(&r->done);
}

static int wait_call(struct rig *r)
{
    while (sem_wait(&r->done) < 0) {
    }
    return r->call_result;
}

int rig_flush(struct rig *r)
{
    struct kv_store_call call = {.done = on_call, .arg = r};
    kv_store_flush(r->store, &call);
    int rc = wait_call(r);
    for (unsigned k = 1; k <= RIG_MAX && rc == 0; k++) {
        if (r->status[k] == RIG_FORGOTTEN) {
            promise(r, k, RIG_DROPPED);
        }
    }
    return rc;
}

int rig_write(struct rig *r, unsigned first, unsigned n)
{
    for (unsigned k = first; k < first + n; k++) {
        rig_queue(r, k);
    }
    rig_flush(r);
    for (unsigned k = first; k < first + n; k++) {
        if (r->results[k] != 0) {
            return r->results[k];
        }
    }
    return 0;
}

void rig_forget(struct rig *r, unsigned k)
{
    promise(r, k, RIG_FORGOTTEN);
    kv_store_forget(r->store, &r->blocks[k]);
}

int rig_purge(struct rig *r, unsigned k)
{
    struct kv_store_call call = {.done = on_call, .arg = r};
    for (unsigned i = 1; i <= RIG_MAX; i++) {
        if (k == i || (k == 0 && r->status[i] == RIG_STORED)) {
            promise(r, i, RIG_FORGOTTEN);
        }
    }
    if (k != 0) {
        call.blocks = &r->blocks[k];
        call.n_blocks = 1;
    }
    kv_store_purge(r->store, &call);
    int rc = wait_call(r);
    /* What was forgotten or failed before goes as well: no live block needs it. */
    for (unsigned i = 1; i <= RIG_MAX && rc == 0; i++) {
        if (r->status[i] == RIG_FORGOTTEN || r->status[i] == RIG_DROPPED ||
            r->status[i] == RIG_FAILED) {
            promise(r, i, RIG_PURGED);
        }
    }
    return rc;
}

/* ---- checks -------------------------------------------------------------------------------- */

int rig_verify(struct rig *r, unsigned k)
{
    const struct kv_store_block *b = &r->blocks[k];
    int rc = kv_store_verify(r->store, b);
    if (rc != 0) {
        return rc;
    }
    unsigned char *data = malloc(r->identity.block_bytes[rig_class(k)]);
    need(data != NULL, "memory");
    rig_data(r, k, data);
    rc = memcmp(kv_store_data(r->store, b->layer_class, b->slot), data,
                r->identity.block_bytes[rig_class(k)]) != 0;
    free(data);
    return rc;
}

const char *rig_check(struct rig *r)
{
    static char text[160];
    if (r->n_strange > 0) {
        return "a block was found that nobody wrote";
    }
    for (unsigned k = 1; k <= RIG_MAX; k++) {
        unsigned char canary[32];
        enum rig_status status = r->status[k];
        if (status == RIG_UNKNOWN && !r->found[k]) {
            continue;
        }
        int rc = r->found[k] || r->written[k] ? rig_verify(r, k) : -ENOENT;
        if (rc == 1) {
            snprintf(text, sizeof(text), "block %u verifies, and its bytes are wrong", k);
            return text;
        }
        if (status == RIG_STORED && rc != 0) {
            snprintf(text, sizeof(text), "block %u was acknowledged, and is lost: %d", k, rc);
            return text;
        }
        if ((status == RIG_DROPPED || status == RIG_PURGED) && r->found[k]) {
            snprintf(text, sizeof(text), "block %u was dropped, and is named", k);
            return text;
        }
        rig_canary(k, canary);
        if (status == RIG_PURGED && r->disk != NULL && disk_holds(r->disk, canary, 32)) {
            snprintf(text, sizeof(text), "block %u was purged, and its bytes are there", k);
            return text;
        }
    }
    return NULL;
}
