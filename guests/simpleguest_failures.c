/* The test guest, second part: every way to fail. None of these leaves the sandbox usable, unless a function says so.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "simpleguest.h"

#define NEVER_MAPPED 0x0000700000000000ull    /* no host and no guest maps anything here */

/* ---- Errors, aborts, panics -------------------------------------------------------------------------------- */

/* An error result: the sandbox stays usable. */
static hl_Vec *return_error(const hl_FunctionCall *call) {
    return hl_flatbuffer_result_from_Error((hl_ErrorCode)ARGUMENT(0, Int), ARGUMENT(1, String));
}

static hl_Vec *throw_if_equal(const hl_FunctionCall *call) {
    if (ARGUMENT(0, Int) != ARGUMENT(1, Int))
        return hl_flatbuffer_result_from_Int(ARGUMENT(0, Int));
    return hl_flatbuffer_result_from_Error(hl_ErrorCode_GuestError, "the values are equal");
}

/* Leaves an error on the output stack, below its own result: the sandbox stays usable, the stack fills up. */
static hl_Vec *set_error(const hl_FunctionCall *call) {
    hl_set_error(hl_ErrorCode_GuestError, ARGUMENT(0, String));
    return hl_flatbuffer_result_from_Int(0);
}

static hl_Vec *abort_with_code(const hl_FunctionCall *call) {
    hl_abort_with_code(ARGUMENT(0, Int));
}

static hl_Vec *abort_with_message(const hl_FunctionCall *call) {
    hl_abort_with_code_and_message(ARGUMENT(0, Int), ARGUMENT(1, String));
}

static hl_Vec *plain_abort(const hl_FunctionCall *call) {
    (void)call;
    abort();
}

static hl_Vec *guest_panic(const hl_FunctionCall *call) {
    hl_panic(ARGUMENT(0, String));
}

/* The first bytes of an abort, without its end. The function then returns: the sandbox stays usable. */
static hl_Vec *leak_abort_bytes(const hl_FunctionCall *call) {
    (void)call;
    hl_out32(102, 0x62610D03);    /* three bytes: 13, "ab" */
    return hl_flatbuffer_result_from_Void();
}

/* ---- Running out of memory --------------------------------------------------------------------------------- */

/* Allocates blocks of a size until malloc aborts. */
static _Noreturn hl_Vec *exhaust_heap(const hl_FunctionCall *call) {
    for (;;)
        TOUCH(malloc((size_t)ARGUMENT(0, Int)));
}

/* Likewise, but answers the refusal with a panic that allocates nothing, as Rust guests do. */
static hl_Vec *exhaust_heap_and_panic(const hl_FunctionCall *call) {
    char text[64];
    while (hl_try_malloc((size_t)ARGUMENT(0, Int)) != NULL)
        ;
    snprintf(text, sizeof text, "memory allocation of %d bytes failed", ARGUMENT(0, Int));
    hl_panic(text);
}

static hl_Vec *fill_heap_and_cause_exception(const hl_FunctionCall *call) {
    (void)call;
    for (size_t size = 1024; size >= 16; size /= 2)
        while (hl_try_malloc(size) != NULL)
            ;
    __asm__ volatile("ud2");
    __builtin_unreachable();
}

/* A megabyte of stack, each page of it touched: more than the default scratch has. */
static hl_Vec *large_variable(const hl_FunctionCall *call) {
    (void)call;
    char variable[1024 * 1024];
    for (size_t i = sizeof variable; i >= 4096; i -= 4096)
        *(volatile char *)&variable[i - 1] = 1;
    return hl_flatbuffer_result_from_Int(sizeof variable);
}

static int64_t recurse(volatile int64_t *above) {
    volatile int64_t here = *above + 1;
    return here == 0 ? 0 : recurse(&here) + here;    /* `here` is needed after the call: every level keeps a frame */
}

static hl_Vec *infinite_recursion(const hl_FunctionCall *call) {
    (void)call;
    int64_t start = 0;
    return hl_flatbuffer_result_from_Long(recurse(&start));
}

/* ---- CPU exceptions ---------------------------------------------------------------------------------------- */

/* With a handler installed for vector 6 (InstallHandler) these two return. */
static hl_Vec *trigger_exception(const hl_FunctionCall *call) {
    (void)call;
    __asm__ volatile("ud2");
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *trigger_int3(const hl_FunctionCall *call) {
    (void)call;
    __asm__ volatile("int3");
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *divide_by_zero(const hl_FunctionCall *call) {
    int32_t quotient = ARGUMENT(0, Int), remainder = 0;
    __asm__ volatile("idivl %2" : "+a"(quotient), "+d"(remainder) : "r"(0) : "cc");
    return hl_flatbuffer_result_from_Int(quotient);
}

static hl_Vec *read_byte(const hl_FunctionCall *call) {
    return hl_flatbuffer_result_from_Int(*(volatile uint8_t *)ARGUMENT(0, ULong));
}

static hl_Vec *write_byte(const hl_FunctionCall *call) {
    *(volatile uint8_t *)ARGUMENT(0, ULong) = (uint8_t)ARGUMENT(1, Int);
    return hl_flatbuffer_result_from_Int(ARGUMENT(1, Int));
}

static hl_Vec *read_unmapped(const hl_FunctionCall *call) {
    (void)call;
    return hl_flatbuffer_result_from_Int(*(volatile uint8_t *)NEVER_MAPPED);
}

static hl_Vec *write_unmapped(const hl_FunctionCall *call) {
    (void)call;
    *(volatile uint8_t *)NEVER_MAPPED = 1;
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *jump_to(const hl_FunctionCall *call) {
    ((void (*)(void))ARGUMENT(0, ULong))();
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *write_peb(const hl_FunctionCall *call) {
    (void)call;
    *(volatile uint64_t *)&hl_peb()->guest_heap.size = 0;
    return hl_flatbuffer_result_from_Void();
}

/* A `ret`, run where data lies. */
static hl_Vec *execute_data(uint8_t *code) {
    *(volatile uint8_t *)code = 0xC3;
    ((void (*)(void))code)();
    return hl_flatbuffer_result_from_String("executed");
}

static hl_Vec *execute_on_heap(const hl_FunctionCall *call) {
    (void)call;
    return execute_data(malloc(16));
}

static hl_Vec *execute_on_stack(const hl_FunctionCall *call) {
    (void)call;
    uint8_t code[16];
    return execute_data(code);
}

/* ---- The host's buffers and ports -------------------------------------------------------------------------- */

static _Noreturn void halt(void) {
    for (;;)
        hl_out32(108, 0);
}

/* One element of eight bytes on an otherwise empty output stack, then the end of the call. */
static _Noreturn void end_call_with_element(uint64_t element, uint64_t back_pointer) {
    uint64_t *stack = (uint64_t *)hl_peb()->output_stack.ptr;
    stack[0] = 24;
    stack[1] = element;
    stack[2] = back_pointer;
    halt();
}

static hl_Vec *corrupt_size_prefix(const hl_FunctionCall *call) {
    (void)call;
    end_call_with_element(0xFFFFFFFB, 8);    /* with its own four bytes it claims 4294967295 */
}

static hl_Vec *corrupt_back_pointer(const hl_FunctionCall *call) {
    (void)call;
    end_call_with_element(0, 0xDEAD);
}

static hl_Vec *corrupt_stack_pointer(const hl_FunctionCall *call) {
    *(uint64_t *)hl_peb()->output_stack.ptr = ARGUMENT(0, ULong);
    halt();
}

/* The call ends without a result: the host finds the output stack empty. */
static hl_Vec *halt_without_result(const hl_FunctionCall *call) {
    (void)call;
    halt();
}

static hl_Vec *out_to_port(const hl_FunctionCall *call) {
    hl_out32((uint16_t)ARGUMENT(0, UInt), ARGUMENT(1, UInt));
    return hl_flatbuffer_result_from_Void();
}

/* ---- Registration ------------------------------------------------------------------------------------------ */

static void register_errors(void) {
    REGISTER_RAW("ReturnError", return_error, Int, INT, STRING);
    REGISTER_RAW("ThrowIfEqual", throw_if_equal, Int, INT, INT);
    REGISTER_RAW("SetError", set_error, Int, STRING);
    REGISTER_RAW("GuestAbortWithCode", abort_with_code, Void, INT);
    REGISTER_RAW("GuestAbortWithMessage", abort_with_message, Void, INT, STRING);
    REGISTER_RAW("Abort", plain_abort, Void);
    REGISTER_RAW("GuestPanic", guest_panic, Void, STRING);
    REGISTER_RAW("LeakAbortBytes", leak_abort_bytes, Void);
}

static void register_exhaustion(void) {
    REGISTER_RAW("ExhaustHeap", exhaust_heap, Void, INT);
    REGISTER_RAW("ExhaustHeapAndPanic", exhaust_heap_and_panic, Void, INT);
    REGISTER_RAW("FillHeapAndCauseException", fill_heap_and_cause_exception, Void);
    REGISTER_RAW("LargeVar", large_variable, Int);
    REGISTER_RAW("InfiniteRecursion", infinite_recursion, Long);
}

static void register_exceptions(void) {
    REGISTER_RAW("TriggerException", trigger_exception, Void);
    REGISTER_RAW("TriggerInt3", trigger_int3, Void);
    REGISTER_RAW("DivideByZero", divide_by_zero, Int, INT);
    REGISTER_RAW("ReadByte", read_byte, Int, ULONG);
    REGISTER_RAW("WriteByte", write_byte, Int, ULONG, INT);
    REGISTER_RAW("ReadUnmapped", read_unmapped, Int);
    REGISTER_RAW("WriteUnmapped", write_unmapped, Void);
    REGISTER_RAW("JumpTo", jump_to, Void, ULONG);
    REGISTER_RAW("WritePeb", write_peb, Void);
    REGISTER_RAW("ExecuteOnHeap", execute_on_heap, String);
    REGISTER_RAW("ExecuteOnStack", execute_on_stack, String);
}

static void register_corruption(void) {
    REGISTER_RAW("CorruptOutputSizePrefix", corrupt_size_prefix, Void);
    REGISTER_RAW("CorruptOutputBackPointer", corrupt_back_pointer, Void);
    REGISTER_RAW("CorruptOutputStackPointer", corrupt_stack_pointer, Void, ULONG);
    REGISTER_RAW("HaltWithoutResult", halt_without_result, Void);
    REGISTER_RAW("OutbWithPort", out_to_port, Void, UINT, UINT);
}

void register_failures(void) {
    register_errors();
    register_exhaustion();
    register_exceptions();
    register_corruption();
}
