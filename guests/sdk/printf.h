/* The printf family. Output goes to the host function HostPrint: one call per printf, and one per 1000 bytes.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_PRINTF_H
#define HYPERLIGHT_PRINTF_H

#include <stdarg.h>
#include <stddef.h>

int printf(const char *format, ...) __attribute__((format(printf, 1, 2)));
int vprintf(const char *format, va_list arguments);
int sprintf(char *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));
int snprintf(char *buffer, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
int vsnprintf(char *buffer, size_t size, const char *format, va_list arguments);
int fctprintf(void (*out)(char character, void *argument), void *argument, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
