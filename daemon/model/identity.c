/* daemon/model/identity.c - what makes KV blocks of two loads of a model interchangeable. */
#include "daemon/model/model_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The backend's arithmetic: its name, level and versions. Levels of one backend may differ in the
 * last bits, and a restored cache gives the very bits of a cold one. */
static void add_backend(struct digest *d, const struct backend *b)
{
    const uint32_t versions[] = {
        backend_program(b) != NULL ? backend_program(b)->numerics : 0,
        backend_attention(b)->numerics,
    };
    digest_update(d, backend_name(b), strlen(backend_name(b)) + 1);
    digest_update(d, backend_isa(b), strlen(backend_isa(b)) + 1);
    digest_update(d, versions, sizeof(versions));
}

/* Angles depend on the file and, with factors chosen by it, on the configured context. */
static void add_rope(struct digest *d, const struct model_program *p)
{
    for (uint32_t i = 0; i < p->n_rope_tables; i++) {
        const struct gqa_rope_table *t = &p->rope_tables[i];
        digest_update(d, &t->magnitude, sizeof(t->magnitude));
        digest_update(d, t->freqs, t->n_freqs * sizeof(*t->freqs));
    }
}

static void add_layout(struct digest *d, const struct kv_layout *l)
{
    const uint32_t version = GQA_KV_LAYOUT_VERSION;
    digest_update(d, &version, sizeof(version));
    for (uint32_t i = 0; i < l->n_classes; i++) {
        const struct kv_layer_desc *desc = &l->classes[i].desc;
        const uint32_t facts[] = {desc->window, desc->n_kv_heads, desc->k_dim,
                                  desc->v_dim,  desc->k_type,     desc->v_type};
        digest_update(d, facts, sizeof(facts));
        digest_update(d, &l->classes[i].block_bytes, sizeof(l->classes[i].block_bytes));
    }
}

struct identity {
    struct identity *next;
    struct kv_identity id;
};

static int describe(const struct model *m, const struct plan *p, struct kv_identity *ret)
{
    struct digest *d;
    int rc = digest_create(&d);
    if (rc < 0) {
        return rc;
    }
    digest_update(d, m->digest.bytes, sizeof(m->digest.bytes));
    add_rope(d, &m->program);
    add_layout(d, &m->layout);
    add_backend(d, p->backend);
    if (p->attention != NULL) {
        add_backend(d, p->attention);
    }
    struct digest_value v = digest_value(d);
    digest_destroy(d);
    memcpy(ret->id, v.bytes, sizeof(ret->id));
    snprintf(ret->about, sizeof(ret->about), "%s, K %s, V %s, %s %s", m->name,
             kv_type_name(m->layout.classes[0].desc.k_type),
             kv_type_name(m->layout.classes[0].desc.v_type), backend_name(p->backend),
             backend_isa(p->backend));
    return 0;
}

const struct kv_identity *model_identity(struct model *m, const struct plan *p)
{
    struct identity *made = calloc(1, sizeof(*made));
    if (made == NULL || describe(m, p, &made->id) < 0) {
        free(made);
        return NULL;
    }
    pthread_mutex_lock(&m->lock);
    struct identity *known = m->identities;
    while (known != NULL && memcmp(known->id.id, made->id.id, sizeof(made->id.id)) != 0) {
        known = known->next;
    }
    if (known == NULL) {
        made->next = m->identities;
        m->identities = known = made;
        made = NULL;
    }
    pthread_mutex_unlock(&m->lock);
    free(made);
    return &known->id;
}

void model_identities_finish(struct model *m)
{
    while (m->identities != NULL) {
        struct identity *i = m->identities;
        m->identities = i->next;
        free(i);
    }
}

const struct kv_identity *model_kv_identity(const struct model *m)
{
    model_lock(m);
    const struct kv_identity *identity = m->plan->identity;
    model_unlock(m);
    return identity;
}
