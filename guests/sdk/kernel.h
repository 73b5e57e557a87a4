/* The contract between the kernel part (entry.S, kernel.c) and the runtime (everything else).
 *
 * The kernel part owns the descriptor tables, the page tables and the exception stack. It keeps no
 * writable data in the image and calls nothing of the runtime, because in a guest built for user mode
 * (HL_USER_MODE 1) the rest runs at CPL 3 and is not to be trusted: it may have changed every byte of its own
 * pages, and enters with any registers. Numbers are abi.md's: 1.1, 1.4, 5.1, 8 and 11.4.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_KERNEL_H
#define HYPERLIGHT_KERNEL_H

#define HL_PAGE_SIZE 0x1000
#define HL_MAIN_STACK_TOP 0xFFFFFF0000000000
#define HL_VECTOR_COUNT 48       /* 0..31 the CPU's exceptions, 32..47 the interrupt controller's */
#define HL_VECTOR_STUB_SIZE 16
#define HL_FRAME_FXSAVE 0x20     /* offset of the FXSAVE image in the frame below */

#define HL_PORT_LOG 99
#define HL_PORT_CALL 101
#define HL_PORT_ABORT 102
#define HL_PORT_DEBUG_PRINT 103
#define HL_PORT_HALT 108

/* At CPL 3. Some KVMs run CPL 3 with these selectors whatever the guest loads (kvm-hosts.md 2.3). */
#define HL_USER_CODE_SELECTOR 0x33
#define HL_USER_DATA_SELECTOR 0x2B
#define HL_RFLAGS_FIXED 2        /* bit 1 is always set */

#define HL_PRIVILEGE_USER_MODE 1    /* flags of the privilege note */
#define HL_PRIVILEGE_RESETS_FPU 2
#define HL_PRIVILEGE_TAKES_SEED 4

/* What the runtime asks of the kernel part through hl_service. */
#define HL_SERVICE_MAP 1         /* gva, gpa, size, flags: false if these pages are not the guest's to map */
#define HL_SERVICE_IS_MAPPED 2   /* gva */
#define HL_SERVICE_VECTOR 3      /* number of an interrupt: it gets its gate */
#define HL_SERVICE_INTERRUPTS 4  /* whether they are to come in */
#define HL_SERVICE_ABORT 5       /* exception frame, fault address: does not return */

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What an exception leaves on the stack, ascending. Bytes 0x298.. of the ABI are padding: the stubs
 * keep the vector there. */
struct hl_ExceptionFrame {
    uint64_t ds, gs, fs, es;
    uint8_t fxsave[512];
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector, error_code, rip, cs, rflags, rsp, ss;
};
_Static_assert(offsetof(struct hl_ExceptionFrame, error_code) == 0x2A0, "abi.md 11.4");

/* Asks the kernel part: a system call in user mode, a plain one in kernel mode. */
uint64_t hl_service(uint64_t number, uint64_t first, uint64_t second, uint64_t third, uint64_t fourth);

/* What entry.S calls in kernel.c: at the first entry, at a page fault (false: not the kernel's business), at any
 * other exception (returns only if the guest takes it), for a service in kernel mode. */
void hl_kernel_init(const uint64_t *peb);
bool hl_kernel_page_fault(uint64_t error);
void hl_kernel_exception(struct hl_ExceptionFrame *frame);
uint64_t hl_kernel_service(uint64_t number, uint64_t first, uint64_t second, uint64_t third, uint64_t fourth);
extern const uint8_t hl_vector_stubs[], hl_service_gate[], hl_flush_gate[];

/* What the kernel part needs of the runtime: where to go, which vectors it wants to see, and where FS points.
 * C libraries are built to find themselves and their stack-protector canary (at 0x28) through FS. */
void hl_runtime_init(const void *peb, uint64_t seed, uint64_t page_size, uint64_t log_level);
void hl_runtime_dispatch(uint64_t seed_request);
void hl_exception_upcall(void);
extern uint64_t hl_handled_vectors;
extern struct hl_ThreadBlock {
    struct hl_ThreadBlock *self;
    uint64_t reserved[4], canary, rest[26];
} hl_thread_block;

static inline void hl_port_out32(uint16_t port, uint32_t value) {
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

/* The abort stream of abi.md 8.2: up to three bytes travel in one OUT. */
struct hl_AbortStream {
    uint32_t word;    /* the pending bytes, the first in bits 8..15 */
    uint32_t count;
};

static inline void hl_abort_flush(struct hl_AbortStream *stream) {
    if (stream->count != 0)
        hl_port_out32(HL_PORT_ABORT, stream->word | stream->count);
    *stream = (struct hl_AbortStream){0};
}

static inline void hl_abort_byte(struct hl_AbortStream *stream, uint8_t byte) {
    stream->count++;
    stream->word |= (uint32_t)byte << (8 * stream->count);
    if (stream->count == 3)
        hl_abort_flush(stream);
}

static inline void hl_abort_text(struct hl_AbortStream *stream, const char *text) {
    while (*text != '\0')
        hl_abort_byte(stream, (uint8_t)*text++);
}

/* Sends what is pending and the terminator. The host does not resume the guest; if it did, it would hear no more than
 * that again: a halt of the kernel part's would have the next call begin at CPL 0. */
_Noreturn static inline void hl_abort_end(struct hl_AbortStream *stream) {
    hl_abort_flush(stream);
    for (;;) {
        hl_abort_byte(stream, 0xFF);
        hl_abort_flush(stream);
    }
}
#endif
#endif
