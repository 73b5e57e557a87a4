/* The test guest, third part: time, mapped memory, exception handlers, registers.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "simpleguest.h"
#include "simpleguest_compute.h"

/* ---- Time -------------------------------------------------------------------------------------------------- */

static _Noreturn hl_Vec *spin(const hl_FunctionCall *call) {
    (void)call;
    for (;;)
        __asm__ volatile("pause");
}

/* Turns an empty loop: for work of a chosen length. */
static hl_Vec *spin_for(const hl_FunctionCall *call) {
    turn(ARGUMENT(0, ULong));
    return hl_flatbuffer_result_from_ULong(ARGUMENT(0, ULong));
}

/* ---- Memory that the host mapped --------------------------------------------------------------------------- */

/* Maps [base, base + length) one to one, if asked to. */
static uint8_t *map_identity(uint64_t base, uint64_t length, unsigned flags, bool wanted) {
    if (wanted)
        hl_map_gpa(base, base, (length + 4095) & -4096ull, flags);
    return (uint8_t *)base;
}

static hl_Vec *read_mapped_buffer(const hl_FunctionCall *call) {
    uint64_t length = ARGUMENT(1, ULong);
    const uint8_t *buffer = map_identity(ARGUMENT(0, ULong), length, HL_MAP_READ, ARGUMENT(2, Bool));
    return hl_flatbuffer_result_from_Bytes(buffer, length);
}

static hl_Vec *write_mapped_buffer(const hl_FunctionCall *call) {
    uint64_t length = ARGUMENT(1, ULong);
    memset(map_identity(ARGUMENT(0, ULong), length, HL_MAP_WRITE, true), 'A', length);
    return hl_flatbuffer_result_from_Bool(true);
}

/* Calls the code there, which should be no more than a `ret`. */
static hl_Vec *exec_mapped_buffer(const hl_FunctionCall *call) {
    ((void (*)(void))map_identity(ARGUMENT(0, ULong), ARGUMENT(1, ULong), HL_MAP_EXECUTE, true))();
    return hl_flatbuffer_result_from_Bool(true);
}

static hl_Vec *check_mapped(const hl_FunctionCall *call) {
    return hl_flatbuffer_result_from_Bool(hl_is_mapped(ARGUMENT(0, ULong)));
}

static hl_Vec *map_gpa(const hl_FunctionCall *call) {
    hl_map_gpa(ARGUMENT(0, ULong), ARGUMENT(1, ULong), ARGUMENT(2, ULong), ARGUMENT(3, UInt));
    return hl_flatbuffer_result_from_Void();
}

/* Any mapped memory, as bytes: what the host's own view of it is compared with. */
static hl_Vec *read_memory(const hl_FunctionCall *call) {
    return hl_flatbuffer_result_from_Bytes((const uint8_t *)ARGUMENT(0, ULong), ARGUMENT(1, ULong));
}

/* ---- Exception handlers and the timer ---------------------------------------------------------------------- */

#define VECTOR_INVALID_OPCODE 6u
#define VECTOR_TIMER 0x20u
#define UD2_SIZE 2u
#define PORT_TIMER 107

static volatile int32_t handled_count;

static bool count_exception(hl_ExceptionContext *context, uint64_t fault_address) {
    (void)fault_address;
    handled_count++;
    if (context->vector == VECTOR_INVALID_OPCODE)
        context->rip += UD2_SIZE;
    return true;
}

static bool refuse_exception(hl_ExceptionContext *context, uint64_t fault_address) {
    (void)context, (void)fault_address;
    handled_count++;
    return false;
}

static hl_Vec *install_handler(const hl_FunctionCall *call) {
    handled_count = 0;
    hl_set_exception_handler((unsigned)ARGUMENT(0, Int), count_exception);
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *install_refusing_handler(const hl_FunctionCall *call) {
    handled_count = 0;
    hl_set_exception_handler((unsigned)ARGUMENT(0, Int), refuse_exception);
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *remove_handler(const hl_FunctionCall *call) {
    hl_set_exception_handler((unsigned)ARGUMENT(0, Int), NULL);
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *handler_call_count(const hl_FunctionCall *call) {
    (void)call;
    return hl_flatbuffer_result_from_Int(handled_count);
}

static void out8(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static bool count_tick(hl_ExceptionContext *context, uint64_t fault_address) {
    (void)context, (void)fault_address;
    handled_count++;
    out8(0x20, 0x20);    /* end of interrupt */
    return true;
}

/* Programs the interrupt controller to deliver IRQ 0 as vector 0x20, and nothing else. */
static void route_timer(void) {
    static const uint8_t first[] = {0x11, VECTOR_TIMER, 4, 1, 0xFE}, second[] = {0x11, VECTOR_TIMER + 8, 2, 1, 0xFF};
    out8(0x20, first[0]);
    out8(0xA0, second[0]);
    for (unsigned i = 1; i < sizeof first; i++) {
        out8(0x21, first[i]);
        out8(0xA1, second[i]);
    }
}

/* Starts the host's timer with a period in microseconds and waits for so many ticks, or for so many turns of a
 * loop. Returns the ticks. */
static hl_Vec *timer_ticks(const hl_FunctionCall *call) {
    handled_count = 0;
    hl_set_exception_handler(VECTOR_TIMER, count_tick);
    route_timer();
    hl_out32(PORT_TIMER, ARGUMENT(0, UInt));
    hl_enable_interrupts(true);
    for (uint64_t turns = ARGUMENT(2, ULong); turns > 0 && handled_count < ARGUMENT(1, Int); turns--)
        __asm__ volatile("pause");
    hl_enable_interrupts(false);
    hl_out32(PORT_TIMER, 0);
    return hl_flatbuffer_result_from_Int(handled_count);
}

/* ---- Registers: what a restore must clean up --------------------------------------------------------------- */

static hl_Vec *set_dr0(const hl_FunctionCall *call) {
    __asm__ volatile("mov %0, %%dr0" : : "r"(ARGUMENT(0, ULong)));
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *get_dr0(const hl_FunctionCall *call) {
    (void)call;
    uint64_t value;
    __asm__ volatile("mov %%dr0, %0" : "=r"(value));
    return hl_flatbuffer_result_from_ULong(value);
}

/* Ends the call with all general registers but RSP full of ones; the host finds no result. */
static hl_Vec *dirty_registers(const hl_FunctionCall *call) {
    (void)call;
    __asm__ volatile("mov $-1, %rax\n\t"
                     "mov %rax, %rbx\n\tmov %rax, %rcx\n\tmov %rax, %rdx\n\tmov %rax, %rsi\n\tmov %rax, %rdi\n\t"
                     "mov %rax, %rbp\n\tmov %rax, %r8\n\tmov %rax, %r9\n\tmov %rax, %r10\n\tmov %rax, %r11\n\t"
                     "mov %rax, %r12\n\tmov %rax, %r13\n\tmov %rax, %r14\n\tmov %rax, %r15\n\t"
                     "out %eax, $108");
    __builtin_unreachable();
}

/* ---- Registration ------------------------------------------------------------------------------------------ */

static void register_handlers(void) {
    REGISTER_RAW("InstallHandler", install_handler, Void, INT);
    REGISTER_RAW("InstallRefusingHandler", install_refusing_handler, Void, INT);
    REGISTER_RAW("RemoveHandler", remove_handler, Void, INT);
    REGISTER_RAW("GetExceptionHandlerCallCount", handler_call_count, Int);
    REGISTER_RAW("TimerTicks", timer_ticks, Int, UINT, INT, ULONG);
}

void register_machine(void) {
    REGISTER_RAW("Spin", spin, Void);
    REGISTER_RAW("SpinFor", spin_for, ULong, ULONG);
    REGISTER_RAW("ReadMappedBuffer", read_mapped_buffer, VecBytes, ULONG, ULONG, BOOL);
    REGISTER_RAW("WriteMappedBuffer", write_mapped_buffer, Bool, ULONG, ULONG);
    REGISTER_RAW("ExecMappedBuffer", exec_mapped_buffer, Bool, ULONG, ULONG);
    REGISTER_RAW("CheckMapped", check_mapped, Bool, ULONG);
    REGISTER_RAW("MapGpa", map_gpa, Void, ULONG, ULONG, ULONG, UINT);
    REGISTER_RAW("ReadMemory", read_memory, VecBytes, ULONG, ULONG);
    REGISTER_RAW("SetDr0", set_dr0, Void, ULONG);
    REGISTER_RAW("GetDr0", get_dr0, ULong);
    REGISTER_RAW("DirtyRegisters", dirty_registers, Void);
    register_handlers();
}
