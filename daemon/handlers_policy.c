/* The fields kv_*: what a request keeps of its tokens. */
#include "daemon/handlers_internal.h"
#include "daemon/model/plan.h"

#include <string.h>

/* The fields of text.generate or text.logits, which are alike. */
struct policy_fields {
    struct proto_string policy, positions, pool;
    bool has_policy, has_positions, has_pool;
    uint32_t sinks, recent, budget, topk, window, kernel;
    bool has_sinks, has_recent, has_budget, has_topk, has_window, has_kernel;
};

#define FIELDS_OF(p)                                                                    \
    {                                                                                   \
        .policy = (p)->kv_policy, .positions = (p)->kv_positions, .pool = (p)->kv_pool, \
        .has_policy = (p)->has_kv_policy, .has_positions = (p)->has_kv_positions,       \
        .has_pool = (p)->has_kv_pool, .sinks = (p)->kv_sinks, .recent = (p)->kv_recent, \
        .budget = (p)->kv_budget, .topk = (p)->kv_topk, .window = (p)->kv_window,       \
        .kernel = (p)->kv_kernel, .has_sinks = (p)->has_kv_sinks,                       \
        .has_recent = (p)->has_kv_recent, .has_budget = (p)->has_kv_budget,             \
        .has_topk = (p)->has_kv_topk, .has_window = (p)->has_kv_window,                 \
        .has_kernel = (p)->has_kv_kernel,                                               \
    }

static struct policy_fields fields_of(const struct call *call)
{
    if (call->method == PROTO_TEXT_LOGITS) {
        return (struct policy_fields)FIELDS_OF(&call->params.text_logits);
    }
    return (struct policy_fields)FIELDS_OF(&call->params.text_generate);
}

/* One of two names, the first where it is absent. */
static bool read_choice(struct call *call, const char *field, struct proto_string name, bool has,
                        const char *first, const char *second, bool *ret_second)
{
    bool is_second =
        has && name.bytes == strlen(second) && memcmp(name.data, second, name.bytes) == 0;
    bool is_first =
        !has || (name.bytes == strlen(first) && memcmp(name.data, first, name.bytes) == 0);
    if (!is_first && !is_second) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'%s' is '%.*s'; there are %s and %s", field,
                  (int)name.bytes, name.data, first, second);
        return false;
    }
    *ret_second = is_second;
    return true;
}

/* A field that means nothing to the policy was surely meant otherwise. */
static bool check_meant(struct call *call, const struct policy_fields *f, enum kv_policy_kind kind)
{
    const struct {
        const char *name;
        bool has;
        unsigned policies; /* bits */
    } rows[] = {
        {"kv_sinks", f->has_sinks, 1u << KV_POLICY_WINDOW | 1u << KV_POLICY_SNAPSTREAM},
        {"kv_recent", f->has_recent, 1u << KV_POLICY_WINDOW | 1u << KV_POLICY_SNAPSTREAM},
        {"kv_positions", f->has_positions, 1u << KV_POLICY_WINDOW},
        {"kv_budget", f->has_budget, 1u << KV_POLICY_SNAPKV},
        {"kv_topk", f->has_topk, 1u << KV_POLICY_SNAPSTREAM},
        {"kv_window", f->has_window, 1u << KV_POLICY_SNAPKV | 1u << KV_POLICY_SNAPSTREAM},
        {"kv_kernel", f->has_kernel, 1u << KV_POLICY_SNAPKV | 1u << KV_POLICY_SNAPSTREAM},
        {"kv_pool", f->has_pool, 1u << KV_POLICY_SNAPKV | 1u << KV_POLICY_SNAPSTREAM},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (rows[i].has && (rows[i].policies >> kind & 1) == 0) {
            call_fail(call, PROTO_E_INVALID_PARAMS, "'%s' means nothing to 'kv_policy' %s",
                      rows[i].name, kv_policy_name(kind));
            return false;
        }
    }
    return true;
}

static bool check_sizes(struct call *call, const struct kv_policy *p)
{
    bool votes = p->kind == KV_POLICY_SNAPKV || p->kind == KV_POLICY_SNAPSTREAM;
    uint32_t last = p->kind == KV_POLICY_SNAPKV ? p->budget - 1 : p->recent;
    if (votes && p->observed > last) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'kv_window' is %u; '%s' leaves room for %u",
                  p->observed, p->kind == KV_POLICY_SNAPKV ? "kv_budget" : "kv_recent", last);
        return false;
    }
    if (p->kernel % 2 == 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS, "'kv_kernel' is %u; it must be odd", p->kernel);
        return false;
    }
    return true;
}

static bool check_able(struct call *call, const struct kv_policy *p)
{
    struct plan *plan = model_plan(call->model);
    bool able = plan_has(plan, kv_policy_caps(p));
    if (!able) {
        call_fail(call, PROTO_E_BACKEND, "'kv_policy' %s: backend %s, which computes attention, %s",
                  kv_policy_name(p->kind), backend_spec(plan_attention(plan)),
                  plan_has(plan, GQA_ATTN_CAP_SPARSE) ? "has no votes" : "has no views");
    }
    plan_unref(plan);
    if (able && p->cache_positions && model_shape(call->model)->n_rot == 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'kv_positions' is cache; model '%s' has no rotary positions",
                  model_name(call->model));
        return false;
    }
    return able;
}

bool call_read_policy(struct call *call, struct kv_policy *ret)
{
    const struct policy_fields f = fields_of(call);
    struct kv_policy p = {.sinks = f.sinks,
                          .recent = f.recent,
                          .budget = f.budget,
                          .topk = f.topk,
                          .observed = f.window,
                          .kernel = f.kernel};
    if (f.has_policy && kv_policy_by_name(f.policy.data, f.policy.bytes, &p.kind) < 0) {
        call_fail(call, PROTO_E_INVALID_PARAMS,
                  "'kv_policy' is '%.*s'; there are full, window, snapkv and snapstream",
                  (int)f.policy.bytes, f.policy.data);
        return false;
    }
    if (!check_meant(call, &f, p.kind) ||
        !read_choice(call, "kv_positions", f.positions, f.has_positions, "original", "cache",
                     &p.cache_positions) ||
        !read_choice(call, "kv_pool", f.pool, f.has_pool, "avg", "max", &p.max_pool) ||
        !check_sizes(call, &p) || !check_able(call, &p)) {
        return false;
    }
    *ret = p;
    return true;
}
