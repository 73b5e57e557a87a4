/* What this SDK offers beyond Hyperlight's C API. Guests that use it build with this SDK only; the binaries run
 * on every 0.14.0 host.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_EXT_H
#define HYPERLIGHT_EXT_H

#include "hyperlight_guest.h"

/* ---- What the host passed (abi.md 3) ----------------------------------------------------------------------- */

typedef struct hl_Buffer {
    uint64_t size;
    uint8_t *ptr;
} hl_Buffer;

typedef struct hl_Peb {
    hl_Buffer input_stack;
    hl_Buffer output_stack;
    hl_Buffer init_data;
    hl_Buffer guest_heap;
} hl_Peb;

const hl_Peb *hl_peb(void);

/* ---- Results and errors ------------------------------------------------------------------------------------ */

/* An error result, returned like any other result: the host raises it and the sandbox stays usable. */
hl_Vec *hl_flatbuffer_result_from_Error(hl_ErrorCode code, const char *message);

/* The same results from the bits of a float or a double, for functions that must not touch SSE registers. */
hl_Vec *hl_flatbuffer_result_from_FloatBits(uint32_t bits);
hl_Vec *hl_flatbuffer_result_from_DoubleBits(uint64_t bits);

/* Aborts with code 8 and "panicked at <file>:<line>:" before the message, on a line of its own. */
#define hl_panic(message) hl_panic_at(__FILE_NAME__, __LINE__, message)
_Noreturn void hl_panic_at(const char *file, int line, const char *message);

/* ---- Host functions that may fail -------------------------------------------------------------------------- */

/* The answer of a host function. String and VecBytes are the caller's to free() (VecBytes: its data). */
typedef struct hl_HostResult {
    hl_ErrorCode error;         /* NoError, or the code of the failure */
    char *message;              /* of a failure, the caller's to free(); else NULL */
    hl_ReturnType type;
    hl_ParameterValue value;
} hl_HostResult;

hl_HostResult hl_try_call_host_function(const hl_FunctionCall *function_call);

uint32_t hl_get_host_return_value_as_FloatBits(void);
uint64_t hl_get_host_return_value_as_DoubleBits(void);

/* ---- Memory ------------------------------------------------------------------------------------------------ */

/* malloc that answers NULL, rather than abort, where the heap has no room. */
void *hl_try_malloc(size_t size);

/* True if the guest's page tables map the page of gva. */
bool hl_is_mapped(uint64_t gva);

/* ---- Memory that the host mapped (abi.md 16) --------------------------------------------------------------- */

#define HL_MAP_READ 1u
#define HL_MAP_WRITE 2u
#define HL_MAP_EXECUTE 4u

/* Maps size bytes of guest-physical memory at gva, in whole pages. The tables come out of scratch. */
void hl_map_gpa(uint64_t gva, uint64_t gpa, uint64_t size, unsigned flags);

/* ---- Exceptions and interrupts ----------------------------------------------------------------------------- */

/* The interrupted state: changes to it take effect when the handler returns true. */
typedef struct hl_ExceptionContext {
    uint64_t segments[4];
    uint8_t fxsave[512];
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector, error_code, rip, cs, rflags, rsp, ss;
} hl_ExceptionContext;

/* Runs on the interrupted stack. True resumes the guest, false lets the exception abort it. */
typedef bool (*hl_ExceptionHandler)(hl_ExceptionContext *context, uint64_t fault_address);

/* Vectors 0 to 47; NULL removes. Vectors from 32 on are interrupts: the handler acknowledges them itself. */
void hl_set_exception_handler(unsigned vector, hl_ExceptionHandler handler);

/* Whether interrupts are taken until the call ends. They are off at the beginning of each. In a user-mode guest they
 * come in during a handler as well, once it has acknowledged its own. */
void hl_enable_interrupts(bool enable);

/* ---- Output ------------------------------------------------------------------------------------------------ */

/* To the host's stderr, through port 103. */
void hl_debug_print(const char *text);

/* Formats one double given as bits, by a printf conversion such as "%.3f", without SSE. Returns the length. */
int hl_format_double(char *buffer, size_t size, const char *conversion, uint64_t bits);

/* The bits of the double that equals the float with these bits. */
uint64_t hl_double_bits(uint32_t float_bits);

/* OUT to any port: port and value are the host's business (abi.md 8). */
void hl_out32(uint16_t port, uint32_t value);

#endif
