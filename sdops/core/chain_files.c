/* Chains (chain.c) whose inputs lie in files: portions are read and summed without a return to Python, whose lock threads
 * would take from each other after every read.
 */

#include "chain.h"

#include <errno.h>
#include <unistd.h>

typedef struct {
    const void *raw;  /* the elements, if they are in memory */
    int64_t position; /* of the first one in the file, if they are not */
    int32_t file;     /* descriptor */
    int32_t size;     /* bytes of an element */
} chain_source;

/* Fill a buffer from a position of the file on; 0 if the file ends before, or cannot be read. */
static int read_all(int file, char *buffer, size_t count, int64_t position) {
    while (count) {
        ssize_t done = pread(file, buffer, count, position);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return 0;
        buffer += done, position += done, count -= (size_t)done;
    }
    return 1;
}

/* sdops_chain in portions.
 *
 * sources   where the elements of each input are
 * rooms     for each input, room for a portion
 * portion   elements that are read at once
 * out_size  bytes of an element of the result
 *
 * Returns 0 as sdops_chain does, and if a file is shorter than it was or cannot be read.
 */
int sdops_chain_files(const chain_step *steps, int length, const chain_term *terms, const chain_source *sources,
                      int source_count, void *const *rooms, size_t portion, size_t count, int out_size, void *out) {
    const void *inputs[source_count];
    for (size_t start = 0; start < count; start += portion) {
        size_t size = count - start < portion ? count - start : portion;
        for (int i = 0; i < source_count; i++) {
            const chain_source *source = &sources[i];
            size_t begin = start * (size_t)source->size;
            inputs[i] = source->raw ? (const char *)source->raw + begin : rooms[i];
            if (source->raw) continue;
            if (!read_all(source->file, rooms[i], size * (size_t)source->size, source->position + (int64_t)begin)) return 0;
        }
        if (!sdops_chain(steps, length, terms, inputs, size, (char *)out + start * (size_t)out_size)) return 0;
    }
    return 1;
}
