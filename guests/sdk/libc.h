/* The part of the C library that this SDK defines itself, declared as <string.h> and <stdlib.h> declare it.
 * For sources that build without any C library's headers; others include those.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_LIBC_H
#define HYPERLIGHT_LIBC_H

#include <stddef.h>

void *memcpy(void *restrict destination, const void *restrict source, size_t size);
void *memmove(void *destination, const void *source, size_t size);
void *memset(void *destination, int byte, size_t size);
int memcmp(const void *left, const void *right, size_t size);
void *memchr(const void *area, int byte, size_t size);
size_t strlen(const char *text);
size_t strnlen(const char *text, size_t limit);
int strcmp(const char *left, const char *right);
int strncmp(const char *left, const char *right, size_t limit);
char *strcpy(char *restrict destination, const char *restrict source);
char *strncpy(char *restrict destination, const char *restrict source, size_t size);
char *strcat(char *restrict destination, const char *restrict source);
char *strchr(const char *text, int character);
char *strrchr(const char *text, int character);
char *strstr(const char *text, const char *wanted);
size_t strcspn(const char *text, const char *rejected);
size_t strspn(const char *text, const char *accepted);
char *strdup(const char *text);

/* Size 0 gives NULL. Where memory runs out the guest aborts with code 13: NULL never means that. */
void *malloc(size_t size) __attribute__((malloc));
void *calloc(size_t count, size_t size) __attribute__((malloc));
void *realloc(void *block, size_t size);
void *aligned_alloc(size_t alignment, size_t size);
void free(void *block);

_Noreturn void abort(void);
int puts(const char *text);
int putchar(int character);

#endif
