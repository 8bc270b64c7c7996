/* tools/plugin-check/hosts.h - what this program lends to a plugin. */
#ifndef TOOLS_PLUGIN_CHECK_HOSTS_H
#define TOOLS_PLUGIN_CHECK_HOSTS_H

#include <gqa/plugin.h>

/* A host of one thread. */
extern const struct gqa_host host_alone;
/* Three workers, of which none exists: the last piece of work comes first. */
extern const struct gqa_host host_crowd;

/* A host of real threads, which spin between pieces of a step as the daemon's do. */
struct host_team;
int host_team_create(uint32_t n_threads, struct host_team **ret);
void host_team_destroy(struct host_team *t); /* NULL is legal */
const struct gqa_host *host_team_host(const struct host_team *t);

#endif
