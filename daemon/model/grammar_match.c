/* daemon/model/grammar_match.c - where a text may be in a grammar.
 *
 * A place is a node and the call that it is in. A call is of one rule at one point of the text, and
 * has a list of who made it: whoever calls the same rule at the same point shares it, so that a
 * point has at most one call per rule, and the calls form a graph in place of a tree of stacks
 * (Tomita's graph-structured stack). Of the places only those are kept that wait for a character:
 * the others are followed at once. Calls that no place leads to any more are collected now and
 * then. */
#include "daemon/model/grammar_internal.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define COLLECT_ABOVE 4096u /* calls */

struct place {
    uint32_t node, call;
};

struct call_node {
    uint32_t first_return; /* of its list, or GRAMMAR_NOWHERE */
    bool ended;            /* at the point where it began: it stands for nothing */
};

struct return_node { /* where a call goes on when it ends */
    struct place to;
    uint32_t next;
};

struct places { /* at one point of the text */
    struct place *item;
    size_t n, capacity;
    bool ends; /* the text may end here */
};

struct seen { /* a place that this step has been at */
    struct place place;
    uint32_t step;
};

/* A character of which only the first bytes are there. */
struct partial {
    unsigned char bytes[4];
    unsigned n;
};

struct grammar_state {
    const struct grammar *g;
    struct places now;
    struct partial partial; /* after now */
    struct places trial[2];

    struct call_node *call; /* 0: root's, which nobody made */
    size_t n_calls, calls_capacity, collect_above;
    struct return_node *ret;
    size_t n_rets, rets_capacity;

    /* Of one step: from one point to the next. */
    uint32_t step;
    size_t first_new_call;
    uint32_t *call_of;   /* (n_rules): the call of a rule at this point, */
    uint32_t *call_step; /* (n_rules): if it was made in this step */
    struct place *work;
    size_t n_work, work_capacity;
    struct seen *seen; /* a hash table */
    size_t seen_size;  /* a power of two, more than twice n_work */
};

/* ---- one step ---------------------------------------------------------------------------- */

static size_t seen_slot(const struct grammar_state *s, struct place p)
{
    uint64_t h = ((uint64_t)p.node << 32 | p.call) * 0x9E3779B97F4A7C15u;
    size_t i = (size_t)(h >> 32) & (s->seen_size - 1);
    while (s->seen[i].step == s->step &&
           (s->seen[i].place.node != p.node || s->seen[i].place.call != p.call)) {
        i = (i + 1) & (s->seen_size - 1);
    }
    return i;
}

static int grow_seen(struct grammar_state *s)
{
    size_t size = s->seen_size > 0 ? s->seen_size * 2 : 256;
    struct seen *seen = calloc(size, sizeof(*seen));
    if (seen == NULL) {
        return -ENOMEM;
    }
    free(s->seen);
    s->seen = seen;
    s->seen_size = size;
    for (size_t i = 0; i < s->n_work; i++) {
        s->seen[seen_slot(s, s->work[i])] = (struct seen){s->work[i], s->step};
    }
    return 0;
}

/* Puts a place on the list of work, once per step. */
static int visit(struct grammar_state *s, uint32_t node, uint32_t call)
{
    struct place p = {node, call};
    if (2 * (s->n_work + 1) > s->seen_size) {
        int rc = grow_seen(s);
        if (rc < 0) {
            return rc;
        }
    }
    size_t slot = seen_slot(s, p);
    if (s->seen[slot].step == s->step) {
        return 0;
    }
    if (s->n_work == GRAMMAR_PLACES_MAX) {
        return -E2BIG;
    }
    int rc = grammar_grow((void **)&s->work, &s->work_capacity, s->n_work, sizeof(*s->work));
    if (rc == 0) {
        s->seen[slot] = (struct seen){p, s->step};
        s->work[s->n_work++] = p;
    }
    return rc;
}

static void begin_step(struct grammar_state *s)
{
    s->n_work = 0;
    s->first_new_call = s->n_calls;
    if (++s->step == 0) { /* after four thousand million steps: old marks must not look new */
        memset(s->seen, 0, s->seen_size * sizeof(*s->seen));
        memset(s->call_step, 0, s->g->n_rules * sizeof(*s->call_step));
        s->step = 1;
    }
}

static int enter_rule(struct grammar_state *s, struct place from, const struct grammar_node *node)
{
    uint32_t rule = node->arg;
    int rc = 0;
    if (s->call_step[rule] != s->step) {
        rc = grammar_grow((void **)&s->call, &s->calls_capacity, s->n_calls, sizeof(*s->call));
        if (rc < 0) {
            return rc;
        }
        s->call[s->n_calls] = (struct call_node){GRAMMAR_NOWHERE, false};
        s->call_step[rule] = s->step;
        s->call_of[rule] = (uint32_t)s->n_calls++;
        rc = visit(s, s->g->start[rule], s->call_of[rule]);
    }
    rc =
        rc < 0 ? rc : grammar_grow((void **)&s->ret, &s->rets_capacity, s->n_rets, sizeof(*s->ret));
    if (rc < 0) {
        return rc;
    }
    struct call_node *call = &s->call[s->call_of[rule]];
    s->ret[s->n_rets] = (struct return_node){{node->next, from.call}, call->first_return};
    call->first_return = (uint32_t)s->n_rets++;
    return call->ended ? visit(s, node->next, from.call) : 0;
}

static int leave_rule(struct grammar_state *s, uint32_t index, struct places *to)
{
    int rc = 0;
    if (index == 0) {
        to->ends = true;
        return 0;
    }
    s->call[index].ended |= index >= s->first_new_call;
    for (uint32_t r = s->call[index].first_return; r != GRAMMAR_NOWHERE && rc == 0;
         r = s->ret[r].next) {
        rc = visit(s, s->ret[r].to.node, s->ret[r].to.call);
    }
    return rc;
}

/* Follows the work until every place waits for a character; those are put into to. */
static int follow(struct grammar_state *s, struct places *to)
{
    to->n = 0;
    to->ends = false;
    int rc = 0;
    for (size_t i = 0; i < s->n_work && rc == 0; i++) {
        struct place p = s->work[i];
        const struct grammar_node *node = &s->g->node[p.node];
        switch (node->kind) {
        case NODE_JUMP:
            rc = visit(s, node->next, p.call);
            break;
        case NODE_SPLIT:
            rc = visit(s, node->next, p.call);
            rc = rc < 0 ? rc : visit(s, node->arg, p.call);
            break;
        case NODE_CALL:
            rc = enter_rule(s, p, node);
            break;
        case NODE_END:
            rc = leave_rule(s, p.call, to);
            break;
        default:
            rc = grammar_grow((void **)&to->item, &to->capacity, to->n, sizeof(*to->item));
            if (rc == 0) {
                to->item[to->n++] = p;
            }
            break;
        }
    }
    return rc;
}

/* From one point over a character to the next. 1; 0 when it fits nowhere; -ENOMEM, -E2BIG. */
static int advance(struct grammar_state *s, const struct places *from, uint32_t point,
                   struct places *to)
{
    int rc = 0;
    begin_step(s);
    for (size_t i = 0; i < from->n && rc == 0; i++) {
        const struct grammar_node *node = &s->g->node[from->item[i].node];
        if (grammar_node_meets(s->g, node, point, point)) {
            rc = visit(s, node->next, from->item[i].call);
        }
    }
    rc = rc < 0 ? rc : follow(s, to);
    return rc < 0 ? rc : to->n > 0 || to->ends;
}

/* ---- bytes ------------------------------------------------------------------------------- */

static uint32_t point_of(const unsigned char *c, size_t bytes)
{
    uint32_t value = bytes == 1 ? c[0] : c[0] & (0x7Fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        value = value << 6 | (c[i] & 0x3Fu);
    }
    return value;
}

/* Whether some character that begins with these bytes fits a place. */
static bool may_be_finished(const struct grammar_state *s, const struct places *at,
                            const struct partial *p)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned length = p->bytes[0] < 0xE0 ? 2 : p->bytes[0] < 0xF0 ? 3 : 4;
    uint32_t value = p->bytes[0] & (0x7Fu >> length);
    for (unsigned i = 1; i < p->n; i++) {
        value = value << 6 | (p->bytes[i] & 0x3Fu);
    }
    unsigned open = 6 * (length - p->n); /* bits */
    uint32_t low = value << open, high = low | ((1u << open) - 1);
    low = low > least[length] ? low : least[length];
    high = high < GRAMMAR_LAST_POINT ? high : GRAMMAR_LAST_POINT;
    for (size_t i = 0; i < at->n; i++) {
        const struct grammar_node *node = &s->g->node[at->item[i].node];
        bool meets;
        if (low <= 0xDFFF && high >= 0xD800) { /* a row with surrogates, which are no characters */
            meets = (low < 0xD800 && grammar_node_meets(s->g, node, low, 0xD7FF)) ||
                    (high > 0xDFFF && grammar_node_meets(s->g, node, 0xE000, high));
        } else {
            meets = grammar_node_meets(s->g, node, low, high);
        }
        if (meets) {
            return true;
        }
    }
    return false;
}

/* Walks over the bytes. 1 and where that leads: *ret_at is s->now or one of s->trial. */
static int walk(struct grammar_state *s, const char *bytes, size_t n, struct places **ret_at,
                struct partial *ret_partial)
{
    struct places *at = &s->now, *to = &s->trial[0];
    struct partial partial = s->partial;
    for (size_t i = 0; i < n;) {
        size_t length;
        partial.bytes[partial.n++] = (unsigned char)bytes[i++];
        enum utf8_kind kind = utf8_step(partial.bytes, partial.n, &length);
        if (kind == UTF8_INVALID) {
            return 0;
        }
        if (kind == UTF8_INCOMPLETE) {
            continue;
        }
        int rc = advance(s, at, point_of(partial.bytes, partial.n), to);
        if (rc <= 0) {
            return rc;
        }
        partial.n = 0;
        at = to;
        to = at == &s->trial[0] ? &s->trial[1] : &s->trial[0];
    }
    if (partial.n > 0 && !may_be_finished(s, at, &partial)) {
        return 0;
    }
    *ret_at = at;
    *ret_partial = partial;
    return 1;
}

int grammar_state_allows(struct grammar_state *s, const char *bytes, size_t n)
{
    size_t n_calls = s->n_calls, n_rets = s->n_rets;
    struct places *at;
    struct partial partial;
    int rc = walk(s, bytes, n, &at, &partial);
    s->n_calls = n_calls; /* what was made on the way is dropped again; the rest was not touched */
    s->n_rets = n_rets;
    return rc;
}

/* ---- collecting calls -------------------------------------------------------------------- */

/* Marks a call that is needed: map[call] becomes 0. */
static void mark(uint32_t *map, uint32_t *stack, size_t *n, uint32_t call)
{
    if (map[call] != 0) {
        map[call] = 0;
        stack[(*n)++] = call;
    }
}

/* Marks what the places lead to. map and stack: (n_calls). */
static void mark_calls(const struct grammar_state *s, uint32_t *map, uint32_t *stack)
{
    size_t n = 0;
    memset(map, 0xFF, s->n_calls * sizeof(*map));
    mark(map, stack, &n, 0);
    for (size_t i = 0; i < s->now.n; i++) {
        mark(map, stack, &n, s->now.item[i].call);
    }
    while (n > 0) {
        uint32_t r = s->call[stack[--n]].first_return;
        for (; r != GRAMMAR_NOWHERE; r = s->ret[r].next) {
            mark(map, stack, &n, s->ret[r].to.call);
        }
    }
}

/* Moves what is needed to the front. Returns of one call may lie anywhere: they go into a new
 * array. */
static int collect(struct grammar_state *s)
{
    uint32_t *map = malloc(s->n_calls * sizeof(*map));
    uint32_t *stack = malloc(s->n_calls * sizeof(*stack));
    struct return_node *ret = malloc((s->n_rets + 1) * sizeof(*ret));
    int rc = map && stack && ret ? 0 : -ENOMEM;
    if (rc == 0) {
        size_t n_calls = 0, n_rets = 0;
        mark_calls(s, map, stack);
        for (size_t i = 0; i < s->n_calls; i++) {
            if (map[i] == 0) {
                map[i] = (uint32_t)n_calls++;
            }
        }
        for (size_t i = 0; i < s->n_calls; i++) {
            if (map[i] == GRAMMAR_NOWHERE) {
                continue;
            }
            uint32_t r = s->call[i].first_return;
            struct call_node *call = &s->call[map[i]];
            *call = (struct call_node){GRAMMAR_NOWHERE, false};
            for (; r != GRAMMAR_NOWHERE; r = s->ret[r].next) {
                struct place to = {s->ret[r].to.node, map[s->ret[r].to.call]};
                ret[n_rets] = (struct return_node){to, call->first_return};
                call->first_return = (uint32_t)n_rets++;
            }
        }
        for (size_t i = 0; i < s->now.n; i++) {
            s->now.item[i].call = map[s->now.item[i].call];
        }
        free(s->ret);
        s->rets_capacity = s->n_rets + 1;
        s->ret = ret;
        ret = NULL;
        s->n_calls = n_calls;
        s->n_rets = n_rets;
    }
    free(map);
    free(stack);
    free(ret);
    return rc;
}

/* ---- the state --------------------------------------------------------------------------- */

int grammar_state_accept(struct grammar_state *s, const char *bytes, size_t n)
{
    size_t n_calls = s->n_calls, n_rets = s->n_rets;
    struct places *at;
    struct partial partial;
    int rc = walk(s, bytes, n, &at, &partial);
    if (rc <= 0) {
        s->n_calls = n_calls;
        s->n_rets = n_rets;
        return rc < 0 ? rc : -EINVAL;
    }
    if (at != &s->now) {
        struct places before = s->now;
        s->now = *at;
        *at = before;
    }
    s->partial = partial;
    if (s->n_calls > s->collect_above && collect(s) == 0) { /* without memory: at another time */
        s->collect_above = 2 * s->n_calls > COLLECT_ABOVE ? 2 * s->n_calls : COLLECT_ABOVE;
    }
    return 0;
}

void grammar_state_first_bytes(const struct grammar_state *s, bool ret_possible[256])
{
    bool inside = s->partial.n > 0;
    for (unsigned b = 0; b < 256; b++) {
        struct partial p = s->partial;
        size_t length;
        p.bytes[p.n++] = (unsigned char)b;
        enum utf8_kind kind = utf8_step(p.bytes, p.n, &length);
        bool possible = kind == UTF8_INCOMPLETE && may_be_finished(s, &s->now, &p);
        uint32_t point = kind == UTF8_VALID ? point_of(p.bytes, p.n) : 0;
        for (size_t i = 0; i < s->now.n && kind == UTF8_VALID && !possible; i++) {
            possible = grammar_node_meets(s->g, &s->g->node[s->now.item[i].node], point, point);
        }
        ret_possible[b] = possible && (!inside || b >= 0x80);
    }
}

bool grammar_state_may_end(const struct grammar_state *s)
{
    return s->now.ends && s->partial.n == 0;
}

bool grammar_state_may_go_on(const struct grammar_state *s)
{
    return s->now.n > 0;
}

int grammar_state_create(const struct grammar *g, struct grammar_state **ret)
{
    struct grammar_state *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return -ENOMEM;
    }
    s->g = g;
    s->collect_above = COLLECT_ABOVE;
    s->call_of = calloc(g->n_rules, sizeof(*s->call_of));
    s->call_step = calloc(g->n_rules, sizeof(*s->call_step));
    int rc = s->call_of && s->call_step ? grow_seen(s) : -ENOMEM;
    rc = rc < 0 ? rc
                : grammar_grow((void **)&s->call, &s->calls_capacity, s->n_calls, sizeof(*s->call));
    if (rc == 0) {
        s->call[s->n_calls++] = (struct call_node){GRAMMAR_NOWHERE, false};
        begin_step(s);
        rc = visit(s, g->start[g->root], 0);
    }
    rc = rc < 0 ? rc : follow(s, &s->now);
    if (rc < 0) {
        grammar_state_destroy(s);
        return rc;
    }
    *ret = s;
    return 0;
}

void grammar_state_destroy(struct grammar_state *s)
{
    if (s == NULL) {
        return;
    }
    free(s->now.item);
    free(s->trial[0].item);
    free(s->trial[1].item);
    free(s->call);
    free(s->ret);
    free(s->call_of);
    free(s->call_step);
    free(s->work);
    free(s->seen);
    free(s);
}
