/* The C library that every guest needs: memory and string functions, and the heap.
 *
 * Bulk work is `rep movsq` and `rep stosq`, and loops are short: on a KVM that emulates CPL 0 each instruction
 * costs a microsecond, and so does each turn of a repeated one.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "libc.h"
#include "runtime.h"

typedef uint64_t __attribute__((may_alias, aligned(1))) word;

/* ---- Memory ------------------------------------------------------------------------------------------------ */

void *memcpy(void *restrict destination, const void *restrict source, size_t size) {
    void *result = destination;
    size_t count = size / 8;
    __asm__ volatile("rep movsq\n\t"
                     "mov %3, %2\n\t"
                     "rep movsb"
                     : "+D"(destination), "+S"(source), "+c"(count)
                     : "r"(size & 7)
                     : "memory");
    return result;
}

void *memmove(void *destination, const void *source, size_t size) {
    if ((uintptr_t)destination - (uintptr_t)source >= size)
        return memcpy(destination, source, size);
    void *to = (char *)destination + size - 1;    /* overlapping, upward: the last byte first */
    const void *from = (const char *)source + size - 1;
    size_t count = size & 7;
    __asm__ volatile("std\n\t"
                     "rep movsb\n\t"
                     "sub $7, %0\n\t"
                     "sub $7, %1\n\t"
                     "mov %3, %2\n\t"
                     "rep movsq\n\t"
                     "cld"
                     : "+D"(to), "+S"(from), "+c"(count)
                     : "r"(size / 8)
                     : "memory", "cc");
    return destination;
}

void *memset(void *destination, int byte, size_t size) {
    void *to = destination;
    size_t count = size / 8;
    __asm__ volatile("rep stosq\n\t"
                     "mov %3, %1\n\t"
                     "rep stosb"
                     : "+D"(to), "+c"(count)
                     : "a"((uint8_t)byte * 0x0101010101010101u), "r"(size & 7)
                     : "memory");
    return destination;
}

int memcmp(const void *left, const void *right, size_t size) {
    const uint8_t *a = left, *b = right;
    while (size >= 8 && *(const word *)a == *(const word *)b)
        a += 8, b += 8, size -= 8;
    for (; size > 0; a++, b++, size--)
        if (*a != *b)
            return *a - *b;
    return 0;
}

void *memchr(const void *area, int byte, size_t size) {
    for (const uint8_t *at = area; size > 0; at++, size--)
        if (*at == (uint8_t)byte)
            return (void *)at;
    return NULL;
}

/* ---- Strings ----------------------------------------------------------------------------------------------- */

static inline unsigned lowest_bit(uint64_t value) {
    uint64_t index;
    __asm__("bsf %1, %0" : "=r"(index) : "r"(value) : "cc");
    return (unsigned)index;
}

/* The top bit of every byte that is zero, and perhaps of some above the first of them. */
static inline uint64_t zero_bytes(uint64_t value) {
    return (value - 0x0101010101010101u) & ~value & 0x8080808080808080u;
}

/* Eight bytes at a time: an aligned word never crosses into another page. */
size_t strlen(const char *text) {
    const char *at = (const char *)((uintptr_t)text & -8ull);
    uint64_t before = (1ull << (8 * ((uintptr_t)text & 7))) - 1;    /* the bytes before the text count as not zero */
    uint64_t zeros = zero_bytes(*(const word *)at | before);
    while (zeros == 0)
        zeros = zero_bytes(*(const word *)(at += 8));
    return (size_t)(at - text) + lowest_bit(zeros) / 8;
}

size_t strnlen(const char *text, size_t limit) {
    const char *end = memchr(text, '\0', limit);
    return end != NULL ? (size_t)(end - text) : limit;
}

int strcmp(const char *left, const char *right) {
    while (*left == *right && *left != '\0')
        left++, right++;
    return (uint8_t)*left - (uint8_t)*right;
}

int strncmp(const char *left, const char *right, size_t limit) {
    for (; limit > 0; left++, right++, limit--)
        if (*left != *right || *left == '\0')
            return (uint8_t)*left - (uint8_t)*right;
    return 0;
}

char *strcpy(char *restrict destination, const char *restrict source) {
    return memcpy(destination, source, strlen(source) + 1);
}

char *strncpy(char *restrict destination, const char *restrict source, size_t size) {
    size_t length = strnlen(source, size);
    memset(destination + length, 0, size - length);
    return memcpy(destination, source, length);
}

char *strcat(char *restrict destination, const char *restrict source) {
    strcpy(destination + strlen(destination), source);
    return destination;
}

char *strchr(const char *text, int character) {
    return memchr(text, character, strlen(text) + 1);
}

char *strrchr(const char *text, int character) {
    const char *at = text + strlen(text);
    while (*at != (char)character)
        if (at-- == text)
            return NULL;
    return (char *)at;
}

char *strstr(const char *text, const char *wanted) {
    size_t length = strlen(wanted);
    if (length == 0)
        return (char *)text;
    for (; (text = strchr(text, *wanted)) != NULL; text++)
        if (strncmp(text, wanted, length) == 0)
            return (char *)text;
    return NULL;
}

size_t strcspn(const char *text, const char *rejected) {
    const char *end = text;
    while (*end != '\0' && strchr(rejected, *end) == NULL)
        end++;
    return (size_t)(end - text);
}

size_t strspn(const char *text, const char *accepted) {
    const char *end = text;
    while (*end != '\0' && strchr(accepted, *end) != NULL)
        end++;
    return (size_t)(end - text);
}

char *strdup(const char *text) {
    size_t size = strlen(text) + 1;
    return memcpy(malloc(size), text, size);
}

/* ---- UTF-8: what hosts accept as text ---------------------------------------------------------------------- */

/* How many bytes a character takes that begins with this one; 0 if none does. */
static size_t utf8_size(uint8_t first) {
    return first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
}

/* The second byte rules out overlong forms, surrogates and what lies beyond U+10FFFF. */
static bool utf8_accepts(const uint8_t *at, size_t index) {
    uint8_t low = 0x80, high = 0xBF;
    if (index == 1 && at[0] == 0xE0)
        low = 0xA0;
    else if (index == 1 && at[0] == 0xED)
        high = 0x9F;
    else if (index == 1 && at[0] == 0xF0)
        low = 0x90;
    else if (index == 1 && at[0] == 0xF4)
        high = 0x8F;
    return at[index] >= low && at[index] <= high;
}

/* Measures one character of a NUL-terminated text, or, if it is not valid, the bytes that one U+FFFD replaces. */
static size_t utf8_step(const uint8_t *at, bool *valid) {
    size_t size = utf8_size(at[0]), accepted = 1;
    while (accepted < size && utf8_accepts(at, accepted))
        accepted++;
    *valid = size != 0 && accepted == size;
    return accepted;
}

/* Past all that is valid: at the first byte that is not, or at the NUL. */
static const char *utf8_skip_valid(const char *text) {
    bool valid = true;
    while (*text != '\0') {
        size_t step = utf8_step((const uint8_t *)text, &valid);
        if (!valid)
            break;
        text += step;
    }
    return text;
}

static bool is_ascii(const char *text, size_t size) {
    for (; size >= 8; text += 8, size -= 8)
        if (*(const word *)text & 0x8080808080808080u)
            return false;
    for (; size > 0; text++, size--)
        if (*text & 0x80)
            return false;
    return true;
}

char *hl_valid_utf8(const char *text) {
    size_t size = strlen(text);
    if (is_ascii(text, size) || *utf8_skip_valid(text) == '\0')
        return NULL;
    char *copy = malloc(3 * size + 1), *end = copy;    /* at worst every byte becomes a U+FFFD */
    for (;;) {
        const char *bad = utf8_skip_valid(text);
        bool valid;
        memcpy(end, text, (size_t)(bad - text));
        end += bad - text;
        if (*bad == '\0')
            break;
        memcpy(end, "\xEF\xBF\xBD", 3);
        end += 3;
        text = bad + utf8_step((const uint8_t *)bad, &valid);
    }
    *end = '\0';
    return copy;
}

size_t hl_unfinished_utf8(const char *text, size_t size) {
    for (size_t back = 1; back < HL_UTF8_MAX && back <= size; back++)
        if ((text[size - back] & 0xC0) != 0x80)    /* not a continuation: the character begins here */
            return utf8_size((uint8_t)text[size - back]) > back ? back : 0;
    return 0;
}

/* ---- Heap -------------------------------------------------------------------------------------------------- *
 *
 * The heap is a row of chunks, each a 16-byte header before its payload, then `top`, the part not yet used. A
 * header knows its own size and its lower neighbour's, so that a freed chunk merges with free neighbours at
 * once. Free chunks hang in lists by size, two lists for each power of two; a bitmap tells which are not
 * empty. Untouched heap stays untouched: every page written costs a page of scratch. */

struct chunk {
    size_t lower_size;         /* of the chunk below, 0 for the lowest */
    size_t size;               /* with the header; bit 0 is set while allocated */
    struct chunk *next, **link; /* of a free chunk only: its list */
};

#define HEADER_SIZE 16
#define CHUNK_ALIGNMENT 16
#define CHUNK_MINIMUM sizeof(struct chunk)
#define IN_USE 1u

static struct {
    struct chunk *top;         /* the header that the next fresh chunk gets; its lower_size is top_lower_size */
    size_t top_lower_size;
    uintptr_t end;
    uint64_t filled;           /* bit i: bins[i] is not empty */
    struct chunk *bins[64];
} heap;

/* Sizes are 32 and up: bins 2i and 2i+1 hold the lower and the upper half of one power of two. */
static inline unsigned bin_of(size_t size) {
    uint64_t power;
    __asm__("bsr %1, %0" : "=r"(power) : "r"(size) : "cc");
    return (unsigned)(2 * (power - 5) + (size >> (power - 1) & 1));
}

static inline struct chunk *neighbour(struct chunk *chunk, intptr_t distance) {
    return (struct chunk *)((uintptr_t)chunk + (uintptr_t)distance);
}

static void bin_remove(struct chunk *chunk) {
    *chunk->link = chunk->next;
    if (chunk->next != NULL)
        chunk->next->link = chunk->link;
    unsigned bin = bin_of(chunk->size);
    if (heap.bins[bin] == NULL)
        heap.filled &= ~(1ull << bin);
}

static void bin_insert(struct chunk *chunk) {
    unsigned bin = bin_of(chunk->size);
    chunk->next = heap.bins[bin];
    chunk->link = &heap.bins[bin];
    if (chunk->next != NULL)
        chunk->next->link = &chunk->next;
    heap.bins[bin] = chunk;
    heap.filled |= 1ull << bin;
}

/* Tells the chunk above, or top, what lies below it. */
static inline void set_size(struct chunk *chunk, size_t size, unsigned in_use) {
    struct chunk *above = neighbour(chunk, (intptr_t)size);
    chunk->size = size | in_use;
    if (above == heap.top)
        heap.top_lower_size = size;
    else
        above->lower_size = size;
}

/* A free chunk of at least size bytes, off its list, or NULL. Chunks of higher bins fit without a look. */
static struct chunk *take_binned(size_t size) {
    unsigned bin = bin_of(size);
    struct chunk *chunk = heap.bins[bin];
    while (chunk != NULL && chunk->size < size)
        chunk = chunk->next;
    if (chunk == NULL) {
        uint64_t higher = bin < 63 ? heap.filled & -2ull << bin : 0;
        if (higher == 0)
            return NULL;
        chunk = heap.bins[lowest_bit(higher)];
    }
    bin_remove(chunk);
    return chunk;
}

static struct chunk *take_top(size_t size) {
    if (size > heap.end - (uintptr_t)heap.top)
        return NULL;
    struct chunk *chunk = heap.top;
    chunk->lower_size = heap.top_lower_size;
    heap.top = neighbour(chunk, (intptr_t)size);
    return chunk;
}

/* Gives back what lies behind the first size bytes of a chunk in use, if that makes a chunk. */
static void trim(struct chunk *chunk, size_t size) {
    size_t rest = (chunk->size & ~(size_t)IN_USE) - size;
    if (rest < CHUNK_MINIMUM)
        return;
    struct chunk *upper = neighbour(chunk, (intptr_t)size);
    set_size(upper, rest, IN_USE);
    set_size(chunk, size, IN_USE);
    free((char *)upper + HEADER_SIZE);
}

/* What a payload needs with its header, or more than any heap has. */
static size_t chunk_size(size_t size) {
    size_t total = (size + HEADER_SIZE + CHUNK_ALIGNMENT - 1) & -(size_t)CHUNK_ALIGNMENT;
    if (total < size)
        return SIZE_MAX / 2;
    return total < CHUNK_MINIMUM ? CHUNK_MINIMUM : total;
}

static struct chunk *payload_chunk(void *block) {
    struct chunk *chunk = neighbour(block, -HEADER_SIZE);
    if ((chunk->size & IN_USE) == 0)
        hl_panic("free or realloc of a block that is not allocated");
    return chunk;
}

void hl_heap_init(uint8_t *start, size_t size) {
    heap.top = (struct chunk *)(((uintptr_t)start + CHUNK_ALIGNMENT - 1) & -(uintptr_t)CHUNK_ALIGNMENT);
    heap.end = (uintptr_t)start + size;
}

void *hl_try_malloc(size_t size) {
    size_t total = chunk_size(size);
    struct chunk *chunk = heap.filled != 0 ? take_binned(total) : NULL;
    if (chunk != NULL) {
        chunk->size |= IN_USE;
        trim(chunk, total);
    } else if ((chunk = take_top(total)) != NULL) {
        chunk->size = total | IN_USE;
        heap.top_lower_size = total;
    } else {
        return NULL;
    }
    return (char *)chunk + HEADER_SIZE;
}

void *malloc(size_t size) {
    if (size == 0)
        return NULL;
    void *block = hl_try_malloc(size);
    if (block == NULL)
        hl_abort_with_code(hl_ErrorCode_MallocFailed);
    return block;
}

void free(void *block) {
    if (block == NULL)
        return;
    struct chunk *chunk = payload_chunk(block);
    size_t size = chunk->size & ~(size_t)IN_USE;
    struct chunk *above = neighbour(chunk, (intptr_t)size);
    if (above != heap.top && (above->size & IN_USE) == 0) {
        bin_remove(above);
        size += above->size;
    }
    struct chunk *below = neighbour(chunk, -(intptr_t)chunk->lower_size);
    if (chunk->lower_size != 0 && (below->size & IN_USE) == 0) {
        bin_remove(below);
        size += below->size;
        chunk->size &= ~(size_t)IN_USE;    /* so that a second free of the block is noticed */
        chunk = below;
    }
    set_size(chunk, size, 0);
    if (neighbour(chunk, (intptr_t)size) != heap.top) {
        bin_insert(chunk);
    } else {
        heap.top = chunk;
        heap.top_lower_size = chunk->lower_size;
    }
}

void *calloc(size_t count, size_t size) {
    size_t total;
    if (__builtin_mul_overflow(count, size, &total))
        hl_panic("calloc: count * size overflows");
    void *block = malloc(total);
    return block != NULL ? memset(block, 0, total) : NULL;
}

void *realloc(void *block, size_t size) {
    if (size == 0) {
        free(block);
        return NULL;
    }
    if (block == NULL)
        return malloc(size);
    size_t capacity = (payload_chunk(block)->size & ~(size_t)IN_USE) - HEADER_SIZE;
    if (size <= capacity && size >= capacity / 2)
        return block;
    void *moved = memcpy(malloc(size), block, size < capacity ? size : capacity);
    free(block);
    return moved;
}

void *aligned_alloc(size_t alignment, size_t size) {
    if (alignment == 0 || (alignment & (alignment - 1)) != 0)
        return NULL;
    if (alignment <= CHUNK_ALIGNMENT || size == 0)
        return malloc(size);
    size_t total = chunk_size(size), wanted;
    if (__builtin_add_overflow(total, alignment + CHUNK_MINIMUM, &wanted))
        hl_abort_with_code(hl_ErrorCode_MallocFailed);
    char *block = malloc(wanted);
    struct chunk *chunk = payload_chunk(block);
    uintptr_t aligned = ((uintptr_t)block + alignment - 1) & -(uintptr_t)alignment;
    if (aligned != (uintptr_t)block) {
        if (aligned - (uintptr_t)block < CHUNK_MINIMUM)    /* the part in front must be a chunk of its own */
            aligned += alignment;
        size_t front = aligned - (uintptr_t)block, whole = chunk->size & ~(size_t)IN_USE;
        chunk = neighbour(chunk, (intptr_t)front);
        set_size(chunk, whole - front, IN_USE);
        set_size(neighbour(chunk, -(intptr_t)front), front, IN_USE);
        free(block);
    }
    trim(chunk, total);
    return (void *)aligned;
}
