/* Chains (chain.c) whose inputs and results lie in files: portions are read, summed and written without a return to
 * Python, whose lock threads would take from each other after every portion.
 */

#include "chain.h"
#include "product.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

/* the system lets one thread at a time write to a file; others would spin where they can sleep */
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;

/* A fork waits for the write under way: the child would find the lock taken for ever. */
static void lock(void) { pthread_mutex_lock(&writing); }
static void unlock(void) { pthread_mutex_unlock(&writing); }
__attribute__((constructor)) static void prepare_forks(void) { pthread_atfork(lock, unlock, unlock); }

typedef struct {
    const void *raw;           /* the elements, if they are in memory */
    const product_term *terms; /* what they are made of, if they are a sum of products */
    int64_t position;          /* of the first one: in the file, or in the matrix that is such a sum */
    int64_t columns;           /* of that matrix */
    int32_t count;             /* of terms */
    int32_t file;              /* descriptor */
    int32_t size;              /* bytes of an element */
} chain_source;

typedef struct {
    void *room;       /* for elements */
    int64_t capacity; /* bytes in it: of everything, unless there is a file */
    int64_t position; /* in the file, of the first element */
    int32_t file;     /* descriptor, -1 for none: everything stays in the room */
    int32_t size;     /* bytes of an element */
} chain_target;

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

/* Elements of a source, from `start` on, in memory; null if they cannot be read. */
static const void *elements(const chain_source *source, size_t start, size_t count, void *room) {
    size_t size = (size_t)source->size;
    if (source->raw) return (const char *)source->raw + start * size;
    if (source->terms)
        sdops_product(source->terms, source->count, (size_t)source->columns, (size_t)source->position + start, count, room);
    else if (!read_all(source->file, room, count * size, source->position + (int64_t)(start * size)))
        return NULL;
    return room;
}

/* Write a buffer to a position of the file; 0 if that fails. */
static int write_all(int file, const char *buffer, size_t count, int64_t position) {
    int is_done = 1;
    lock();
    while (count && is_done) {
        ssize_t done = pwrite(file, buffer, count, position);
        if (done < 0 && errno == EINTR) continue;
        is_done = done > 0;
        if (is_done) buffer += done, position += done, count -= (size_t)done;
    }
    unlock();
    return is_done;
}

/* sdops_chain in portions.
 *
 * sources   where the elements of each input come from
 * rooms     for each input, room for a portion
 * first     place of the first element in the tensor
 * portion   elements that are read at once; portions begin at multiples of it
 * target    where the result goes
 *
 * Returns 0 as sdops_chain does, if a file is shorter than it was, and if one cannot be read or written.
 */
int sdops_chain_files(const chain_step *steps, int length, const chain_term *terms, const chain_source *sources,
                      int source_count, void *const *rooms, size_t first, size_t portion, size_t count,
                      const chain_target *target) {
    const void *inputs[source_count];
    size_t held = 0, written = 0, bytes = (size_t)target->size; /* held, written: bytes */
    if ((target->file < 0 ? count : portion) * bytes > (size_t)target->capacity) return 0;
    for (size_t start = 0, size; start < count; start += size) {
        size = portion - (first + start) % portion;
        if (size > count - start) size = count - start;
        for (int i = 0; i < source_count; i++)
            if (!(inputs[i] = elements(&sources[i], start, size, rooms[i]))) return 0;
        if (!sdops_chain(steps, length, terms, inputs, size, (char *)target->room + held)) return 0;
        held += size * bytes;
        if (target->file < 0 || (start + size < count && held + portion * bytes <= (size_t)target->capacity)) continue;
        if (!write_all(target->file, target->room, held, target->position + (int64_t)written)) return 0;
        written += held, held = 0;
    }
    return 1;
}
