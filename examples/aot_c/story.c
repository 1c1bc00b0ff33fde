/* Continues a prompt, greedily, with a model that `llmc compile --emit obj,header` made; no Python.
 *
 *     ./story story.weights [TOKENS [PROMPT_ID ...]]        the prompt: "Once upon a time"
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "story.h"

static int fail(const char *what, const char *why) {
    fprintf(stderr, "story: %s: %s\n", what, why);
    return 1;
}

static const void *map_file(const char *path, size_t *bytes) {
    struct stat facts;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &facts) < 0) return NULL;
    *bytes = (size_t)facts.st_size;
    void *memory = mmap(NULL, *bytes, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    return memory == MAP_FAILED ? NULL : memory;
}

static int32_t largest(const float *logits) {
    int32_t best = 0;
    for (int32_t id = 1; id < STORY_VOCABULARY; id++)
        if (logits[id] > logits[best]) best = id;
    return best;
}

int main(int argc, char **argv) {
    static float logits[STORY_VOCABULARY];
    int32_t prompt[STORY_MAX_CONTEXT] = {1, 403, 407, 261, 378}, next;
    int64_t length = 5, tokens = argc > 2 ? atoll(argv[2]) : 64;
    if (argc < 2) return fail("usage", "story WEIGHTS [TOKENS [PROMPT_ID ...]]");
    if (argc - 3 > STORY_MAX_CONTEXT) return fail("prompt", "too long");
    for (int i = 3; i < argc; i++) prompt[i - 3] = atoi(argv[i]);
    if (argc > 3) length = argc - 3;

    size_t bytes;
    const void *weights = map_file(argv[1], &bytes);
    if (!weights) return fail(argv[1], "cannot map it");
    story *model;
    int code = story_create(weights, bytes, NULL, &model);
    if (!code) code = story_feed(model, prompt, length, 0, logits);
    for (int64_t made = 0; !code && made < tokens; made++) {
        next = largest(logits);
        printf("%s%d", made ? " " : "", next);
        if (made + 1 < tokens) code = story_feed(model, &next, 1, length + made, logits);
    }
    if (!code) printf("\n");
    story_destroy(model);
    return code ? fail(argv[1], story_error(code)) : 0;
}
