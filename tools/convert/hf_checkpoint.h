/* tools/convert/hf_checkpoint.h - a folder of Hugging Face, as its reader and its writer share it;
 * private to hf_*.c. */
#ifndef TOOLS_CONVERT_HF_CHECKPOINT_H
#define TOOLS_CONVERT_HF_CHECKPOINT_H

#include "tools/convert/safetensors.h"

#define HF_MAX_FILES  4096u
#define HF_INDEX_NAME "model.safetensors.index.json"

struct hf_file {
    char *name; /* in the folder */
    struct safetensors weights;
    size_t first_tensor; /* in the checkpoint's list, which goes file by file */
};

struct hf_checkpoint {
    struct checkpoint base;
    char *path;
    json_t *config; /* config.json */
    struct hf_file *files;
    size_t n_files;
};

static inline const struct hf_checkpoint *hf_of(const struct checkpoint *c)
{
    return (const struct hf_checkpoint *)c;
}

/* The part of config.json that describes the text model: "text_config" where there is one. */
static inline json_t *hf_text_config(json_t *config)
{
    json_t *inner = json_object_get(config, "text_config");
    return json_is_object(inner) ? inner : config;
}

/* hf_write.c: the container's output. */
int hf_begin(const struct checkpoint *c, const char *path, const struct ck_outcome *outcomes,
             const struct ck_facts *facts, struct ck_output **ret, struct fmt_error *err);
int hf_write(struct ck_output *o, const void *data, size_t bytes, struct fmt_error *err);
int hf_finish(struct ck_output *o, struct fmt_error *err);
void hf_destroy(struct ck_output *o);

#endif
