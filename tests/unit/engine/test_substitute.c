/* A backend that fails a step with nothing standing by: its model waits until another backend has
 * been prepared beside the engine, other models step on, and the step is repeated. The test is the
 * one who prepares, and takes its time. */
#include "daemon/model/plan.h"
#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANY   (64ull << 20)
#define TOKENS 250u /* of a step each: the fixtures fail at the 201st call of attend */

static struct model *other;

static void install(const char *name)
{
    char path[512], file[64];
    size_t bytes;
    snprintf(path, sizeof(path), "%s/%s.so", getenv("GQAD_TEST_PLUGINS"), name);
    snprintf(file, sizeof(file), "%s.so", name);
    unsigned char *data = file_read(path, &bytes);
    folder_write(&parts.folder, file, data, bytes, 0755);
    free(data);
    backend_catalogue_rescan(parts.catalogue);
}

static struct plan *make_plan(const char *program, const char *attention)
{
    const struct plan_specs specs = {program, attention};
    struct fmt_error err = {""};
    struct plan *p = NULL;
    cr_assert(eq(int, plan_create(model, &specs, &p, &err), 0), "%s", err.text);
    return p;
}

static void setup(void)
{
    struct tiny t = tiny_default();
    parts_init(&parts, 2);
    model = parts_load_kv(&parts, &t, "tiny", GQA_TYPE_F32); /* which the fixtures need */
    t.seed = 2;
    other = parts_load(&parts, &t, "other");
}

static void teardown(void)
{
    model_unref(other); /* requests hold their own references */
    driver_teardown();
}

TestSuite(substitute, .init = setup, .fini = teardown, .timeout = 120);

/* The model's attention is the fixture's from the start, so that no plan before it stands by. */
static void start_with(const char *fixture)
{
    const struct engine_options o = {.n_parallel = 4, .n_queue = 8, .kv.arena_bytes_max = MANY};
    install(fixture);
    plan_unref(model_swap_plan(model, make_plan("cpu", fixture)));
    driver_start(&o);
}

/* Until the engine asks for another backend; the request waits then. */
static struct engine_wanted wait_wanted(const struct result *r)
{
    struct engine_wanted w;
    while (!engine_take_wanted(engine, &w)) {
        wait_for_news();
        take_events(true);
    }
    cr_expect(eq(ptr, w.model, model));
    cr_expect(eq(str, (char *)w.spec, (char *)"cpu"));
    cr_expect(not(r->done));
    return w;
}

/* The engine's until it has run them. */
static struct engine_swap use, substitute;
static atomic_bool is_done;

static void on_done(void *arg)
{
    atomic_store(&is_done, true);
}

static void bring(struct plan *plan)
{
    substitute =
        (struct engine_swap){.model = model, .plan = plan, .substitute = true, .done = on_done};
    cr_assert(eq(int, engine_swap(engine, &substitute), 0));
}

static struct result *of_other(uint32_t seed, uint32_t n_predict)
{
    struct result *r = make(REQUEST_GENERATE, seed, 20, n_predict);
    model_unref(r->request->model);
    r->request->model = model_ref(other);
    return r;
}

Test(substitute, others_step_while_it_is_prepared)
{
    start_with("late_error");
    struct result *r = make(REQUEST_GENERATE, 1, 20, TOKENS);
    submit(r);
    struct engine_wanted w = wait_wanted(r);
    take_events(true);
    uint32_t n_before = r->n_tokens;
    struct result *company = of_other(1, 100); /* however long the preparation takes */
    submit(company);
    wait_done(company);
    cr_expect(eq(u32, company->n_tokens, 100));
    cr_expect(eq(u32, r->n_tokens, n_before));
    cr_expect(not(r->done));
    bring(make_plan(w.spec, NULL));
    wait_done(r);
    cr_expect(eq(int, r->request->finish, FINISH_LENGTH));
    cr_expect(eq(u32, r->n_tokens, TOKENS));
    cr_expect(atomic_load(&is_done));
    cr_expect(
        eq(int, engine_take_wanted(engine, &w), false)); /* it failed once, and was repeated */
    model_unref(w.model);
    struct backend_info info[4];
    size_t n = backend_catalogue_list(parts.catalogue, info, 4);
    for (size_t i = 0; i < n; i++) {
        cr_expect(eq(u64, info[i].n_faults, strcmp(info[i].name, "late_error") == 0), "%s",
                  info[i].name);
    }
}

/* The tokens are those of a model that never failed. */
Test(substitute, the_tokens_are_the_same)
{
    const struct engine_options o = {.n_parallel = 4, .n_queue = 8, .kv.arena_bytes_max = MANY};
    driver_start(&o);
    struct result *alone = make(REQUEST_GENERATE, 1, 20, TOKENS);
    submit(alone);
    wait_done(alone);
    driver_stop();
    start_with("late_nan");
    struct result *r = make(REQUEST_GENERATE, 1, 20, TOKENS);
    submit(r);
    struct engine_wanted w = wait_wanted(r);
    bring(make_plan(w.spec, NULL));
    wait_done(r);
    check_same(alone, r);
    model_unref(w.model);
}

Test(substitute, where_there_is_none_the_failure_is_told)
{
    start_with("late_nan");
    struct result *r = make(REQUEST_GENERATE, 1, 20, TOKENS);
    submit(r);
    struct engine_wanted w = wait_wanted(r);
    bring(NULL);
    wait_done(r);
    cr_expect(eq(int, r->request->error, PROTO_E_BACKEND));
    model_unref(w.model);
}

Test(substitute, waiting_can_be_cancelled_and_ended)
{
    start_with("late_nan");
    struct result *r = make(REQUEST_GENERATE, 1, 20, TOKENS);
    submit(r);
    struct engine_wanted w = wait_wanted(r);
    engine_cancel(engine, r->request);
    wait_done(r);
    cr_expect(eq(u32, engine_model_users(engine, model), 0));
    struct result *second = make(REQUEST_GENERATE, 1, 20, 5); /* waits too: for the substitute */
    struct result *company = of_other(1, 100);
    submit(second);
    submit(company);
    wait_done(company);
    cr_expect(not(second->done));
    bring(make_plan(w.spec, NULL));
    wait_done(second);
    cr_expect(eq(u32, second->n_tokens, 5));
    model_unref(w.model);
}

Test(substitute, a_swap_meanwhile_makes_it_needless)
{
    start_with("late_nan");
    struct result *r = make(REQUEST_GENERATE, 1, 20, TOKENS);
    submit(r);
    struct engine_wanted w = wait_wanted(r);
    use = (struct engine_swap){
        .model = model, .plan = make_plan("cpu:isa=c", "cpu:isa=c"), .done = on_done};
    cr_assert(eq(int, engine_swap(engine, &use), 0));
    wait_done(r); /* on the new one */
    cr_expect(eq(u32, r->n_tokens, TOKENS));
    bring(make_plan(w.spec, NULL));
    struct engine_retired retired;
    while (!engine_take_retired(engine, &retired)) {
        wait_for_news();
    }
    plan_unref(retired.plan);
    model_unref(retired.model);
    model_unref(w.model);
}
