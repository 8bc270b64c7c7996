/* daemon/config_internal.h - between config.c, config_file.c and config_host.c. */
#ifndef DAEMON_CONFIG_INTERNAL_H
#define DAEMON_CONFIG_INTERNAL_H

#include "daemon/config.h"

/* Parses text into the setting. origin ("FILE:LINE", "GQAD_X", "--x") begins an error's sentence.
 * A list's value is appended. -EINVAL and err, or -ENOMEM. */
int config_set(struct config *c, const struct config_setting *s, const char *text,
               const char *origin, struct config_error *err);
/* Of a setting that names a user or a group of this host (user_weight's item, admin_group), or a
 * folder (kv_realm): 0, or -EINVAL and err where there is or can be none of that name. Of others 0.
 */
int config_check_name(const struct config_setting *s, const char *text, const char *origin,
                      struct config_error *err);
void config_clear_list(struct config *c, const struct config_setting *s);
int config_fail(struct config_error *err, int rc, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Reads the file. -ENOENT when there is none, which may be no error. */
int config_read_file(struct config *c, const char *path, struct config_error *err);

/* Fills what was left empty: places, threads, memory. -errno and err. */
int config_decide_places(struct config *c, bool wants_socket, struct config_error *err);
int config_decide_machine(struct config *c);
/* "$XDG_CONFIG_HOME/gqad/gqad.conf" and the like; malloc'ed, NULL without memory. */
char *config_user_dir(const char *variable, const char *below_home, const char *tail);

#endif
