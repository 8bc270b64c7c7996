/* daemon/config_names.c - settings that name something: shares (NAME=WEIGHT, or UID=WEIGHT),
 * administrators, the realm of the KV cache. */
#include "daemon/config_internal.h"

#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>

static int find_uid(const char *name, uid_t *ret)
{
    char *end;
    errno = 0;
    unsigned long uid = strtoul(name, &end, 10);
    if (name[0] >= '0' && name[0] <= '9' && *end == '\0') {
        *ret = (uid_t)uid;
        return errno == 0 && uid < UINT_MAX ? 0 : -ERANGE;
    }
    const struct passwd *pw = getpwnam(name);
    if (!pw) {
        return -ENOENT;
    }
    *ret = pw->pw_uid;
    return 0;
}

/* Why it is wrong, or NULL. */
static const char *parse(const char *text, struct config_weight *ret)
{
    char name[256];
    const char *sign = strrchr(text, '=');
    size_t bytes = sign ? (size_t)(sign - text) : 0;
    char *end;
    if (bytes == 0 || bytes >= sizeof(name)) {
        return "it is not NAME=WEIGHT";
    }
    memcpy(name, text, bytes);
    name[bytes] = '\0';
    unsigned long weight = strtoul(sign + 1, &end, 10);
    if (sign[1] < '0' || sign[1] > '9' || *end != '\0' || weight < 1 ||
        weight > CONFIG_WEIGHT_MAX) {
        _Static_assert(CONFIG_WEIGHT_MAX == 1000, "the sentence says so");
        return "the weight is not between 1 and 1000";
    }
    ret->weight = (uint32_t)weight;
    return find_uid(name, &ret->uid) < 0 ? "there is no such user" : NULL;
}

int config_check_name(const struct config_setting *s, const char *text, const char *origin,
                      struct config_error *err)
{
    struct config_weight weight;
    const char *why = NULL;
    if (strcmp(s->key, "user_weight") == 0) {
        why = parse(text, &weight);
    } else if (strcmp(s->key, "admin_group") == 0 && text[0] && !getgrnam(text)) {
        why = "there is no such group";
    } else if (strcmp(s->key, "kv_realm") == 0 && strchr(text, '/')) {
        why = "a folder's name is made of it, which cannot have a '/'";
    }
    return why ? config_fail(err, -EINVAL, "%s: %s: '%s': %s", origin, s->key, text, why) : 0;
}

int config_weights(const struct config *c, struct config_weight **ret, struct config_error *err)
{
    struct config_weight *weights = calloc(c->user_weight.count + 1, sizeof(*weights));
    if (!weights) {
        return config_fail(err, -ENOMEM, "no memory for the configuration");
    }
    for (size_t i = 0; i < c->user_weight.count; i++) {
        const char *text = c->user_weight.items[i];
        const char *why = parse(text, &weights[i]);
        if (why) { /* the user was there when the setting was read */
            free(weights);
            return config_fail(err, -EINVAL, "user_weight: '%s': %s", text, why);
        }
    }
    *ret = weights;
    return 0;
}
