/* What the runtime's files share and guests do not see.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_RUNTIME_H
#define HYPERLIGHT_RUNTIME_H

#include "hyperlight_ext.h"

#define HL_MAX_PARAMETERS 11    /* of a guest function (abi.md 12.3) */
#define HL_CALL_TYPE_GUEST 1
#define HL_CALL_TYPE_HOST 2

/* ---- libc.c ------------------------------------------------------------------------------------------------ */

void hl_heap_init(uint8_t *start, size_t size);

#define HL_UTF8_MAX 4    /* bytes of one character */

/* NULL if the text is valid UTF-8; else a copy for the caller to free, with U+FFFD for what is not. */
char *hl_valid_utf8(const char *text);

/* How many bytes at the end are the beginning of a character that is not complete. */
size_t hl_unfinished_utf8(const char *text, size_t size);

/* ---- messages.c: FlatBuffers by hand (abi.md 10) ----------------------------------------------------------- */

/* The names of 10.2, index = hl_ParameterType. */
extern const char *const hl_parameter_type_names[];

/* Decodes a FunctionCall in place: strings and bytes of the call point into the message. parameters has room for
 * HL_MAX_PARAMETERS; parameters_len may come out larger. Panics if the message is malformed. */
void hl_decode_call(const uint8_t *message, size_t size, hl_FunctionCall *call, hl_Parameter *parameters,
                    uint8_t *call_type);

/* Decodes a FunctionCallResult in place, as above. */
hl_HostResult hl_decode_result(const uint8_t *message, size_t size);

/* The encoders return one allocation that the caller frees: the struct, with the data behind it. */
hl_Vec *hl_encode_call(const hl_FunctionCall *call, uint8_t call_type);
hl_Vec *hl_encode_result(hl_ReturnType type, const hl_ParameterValue *value);
hl_Vec *hl_encode_error(uint64_t code, const char *message);
hl_Vec *hl_encode_log(uint8_t level, const char *prefix, const char *message, const char *file, uint32_t line);

/* ---- runtime.c, called by entry.S -------------------------------------------------------------------------- */

bool hl_runtime_exception(unsigned vector, hl_ExceptionContext *context, uint64_t fault_address);

#endif
