/* The kernel part in C: descriptor tables, page tables, page faults, unhandled exceptions.
 *
 * Integer instructions only, no writable data, no call out of this file: see kernel.h. While it handles an
 * exception it touches nothing but scratch, its own text, and pages that it has made writable itself, because
 * every exception starts at the same stack top and would overwrite the frame of the one before.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernel.h"

#define MAX_GPA 0xFFFFFFFFFull
#define SCRATCH_ALIAS 0xFFFFFFEFFFFFF000ull    /* GVA - GPA of every scratch page, whatever its size */
#define ALLOCATOR_WORD ((volatile uint64_t *)0xFFFFFFFFFFFFEFF0ull)
#define EXCEPTION_STACK_TOP 0xFFFFFFFFFFFFEFE0ull
#define PROC_CONTROL_GVA 0xFFFFFD0000000000ull
#define MAIN_STACK_LIMIT 0xFFFFFE0000000000ull

#define PTE_PRESENT (1ull << 0)
#define PTE_WRITABLE (1ull << 1)
#define PTE_TABLE 0x23ull                      /* present, writable, accessed */
#define PTE_LEAF 0x61ull                       /* present, accessed, dirty */
#define PTE_AVL_MASK 0xE00ull
#define PTE_AVL_COW 0x200ull
#define PTE_ADDRESS_MASK 0x000FFFFFFFFFF000ull
#define PTE_NX (1ull << 63)

#define FAULT_PRESENT 1u
#define FAULT_WRITE 2u
#define FAULT_USER 4u
#define FAULT_RESERVED 8u
#define FAULT_FETCH 16u

#define MAP_WRITE 2u                           /* memory region flags of abi.md 1.6 */
#define MAP_EXECUTE 4u

#define VECTOR_PAGE_FAULT 14u
#define FIRST_INTERRUPT_VECTOR 32u
#define KERNEL_CODE_SELECTOR 0x08u
#define KERNEL_DATA_SELECTOR 0x10u
#define TSS_SELECTOR 0x18u
#define IDT_VECTORS 0x401FFFFFull              /* 0 to 20, and 30 */

#define MSR_FS_BASE 0xC0000100u

#define RED_ZONE 128u
#define RFLAGS_TF_IF_DF 0x700ull

#define ABORT_MALLOC_FAILED 13
#define ABORT_GUEST_ERROR 15

/* The two pages at PROC_CONTROL_GVA (abi.md 5.5). */
struct processor_control {
    uint64_t gdt[5];
    uint8_t before_tss[0x40 - 5 * 8];
    struct __attribute__((packed)) {
        uint32_t reserved0;
        uint64_t rsp[3];
        uint64_t reserved1;
        uint64_t ist1;
        uint8_t rest[0x64 - 0x2C];
    } tss;
    uint8_t before_idt[HL_PAGE_SIZE - 0x40 - 0x64];
    uint64_t idt[256][2];
};
_Static_assert(offsetof(struct processor_control, idt) == HL_PAGE_SIZE, "abi.md 5.5");
#define CONTROL ((struct processor_control *)PROC_CONTROL_GVA)

struct __attribute__((packed)) descriptor_table {
    uint16_t limit;
    uint64_t base;
};

extern const uint8_t hl_vector_stubs[];

static inline uint64_t read_cr2(void) {
    uint64_t value;
    __asm__ volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}

static inline uint64_t read_cr3(void) {
    uint64_t value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

static inline void write_msr(uint32_t index, uint64_t value) {
    __asm__ volatile("wrmsr" : : "c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

static inline void invalidate(uint64_t gva) {
    __asm__ volatile("invlpg (%0)" : : "r"(gva) : "memory");
}

static inline void copy_words(void *destination, const void *source, size_t size) {
    size_t count = size / 8;
    __asm__ volatile("rep movsq" : "+D"(destination), "+S"(source), "+c"(count) : : "memory");
}

/* ---- Physical pages and page tables ------------------------------------------------------------------------ */

/* Takes contiguous pages off the bump allocator; they are zero because the host clears scratch. The word is
 * advanced before the check, as the reference does (abi.md 1.4, 20.1). */
static uint64_t allocate_pages(uint64_t count) {
    uint64_t size = count * HL_PAGE_SIZE, gpa = size, end;
    __asm__ volatile("lock xadd %0, %1" : "+r"(gpa), "+m"(*ALLOCATOR_WORD));
    if (__builtin_add_overflow(gpa, size, &end) || end >= MAX_GPA - 0x2000) {
        struct hl_AbortStream stream = {0};
        hl_abort_byte(&stream, ABORT_MALLOC_FAILED);
        hl_abort_text(&stream, "Out of physical memory");
        hl_abort_end(&stream);
    }
    return gpa;
}

/* The page-table entry that maps gva: created on the way down if asked for, else NULL where a table lacks. */
static uint64_t *leaf_entry(uint64_t gva, bool create) {
    uint64_t table = read_cr3();
    for (unsigned shift = 39;; shift -= 9) {
        uint64_t *entry = (uint64_t *)((table & PTE_ADDRESS_MASK) + SCRATCH_ALIAS) + ((gva >> shift) & 511);
        if (shift == 12)
            return entry;
        if ((*entry & PTE_PRESENT) == 0) {
            if (!create)
                return NULL;
            *entry = allocate_pages(1) | PTE_TABLE;
        }
        table = *entry;
    }
}

void hl_kernel_map(uint64_t gva, uint64_t gpa, uint64_t size, unsigned flags) {
    uint64_t bits = PTE_LEAF | (flags & MAP_WRITE ? PTE_WRITABLE : 0) | (flags & MAP_EXECUTE ? 0 : PTE_NX);
    uint64_t *entry = NULL;
    for (uint64_t offset = 0; offset < size; offset += HL_PAGE_SIZE, entry++) {
        if (entry == NULL || ((uint64_t)entry & (HL_PAGE_SIZE - 1)) == 0)    /* past the end of a table */
            entry = leaf_entry(gva + offset, true);
        bool was_present = *entry & PTE_PRESENT;
        *entry = (gpa + offset) | bits;
        if (was_present)
            invalidate(gva + offset);
    }
}

bool hl_kernel_is_mapped(uint64_t gva) {
    if ((uint64_t)((int64_t)(gva << 16) >> 16) != gva)    /* not canonical */
        return false;
    uint64_t *entry = leaf_entry(gva, false);
    return entry != NULL && (*entry & PTE_PRESENT);
}

/* ---- Page faults (abi.md 5.6) ------------------------------------------------------------------------------ */

static bool grow_stack(uint64_t gva) {
    if (gva < MAIN_STACK_LIMIT || gva >= HL_MAIN_STACK_TOP)
        return false;
    uint64_t *entry = leaf_entry(gva, true);
    if ((*entry & PTE_PRESENT) == 0)
        *entry = allocate_pages(1) | PTE_LEAF | PTE_WRITABLE | PTE_NX;
    return true;
}

/* Replaces a copy-on-write page by a copy in scratch. The source is read through its virtual address: the
 * kernel part does not care where the snapshot keeps it. */
static bool copy_on_write(uint64_t gva) {
    uint64_t *entry = leaf_entry(gva, false);
    if (entry == NULL || (*entry & PTE_PRESENT) == 0 || (*entry & PTE_AVL_MASK) != PTE_AVL_COW)
        return false;
    uint64_t gpa = allocate_pages(1);
    copy_words((void *)(gpa + SCRATCH_ALIAS), (const void *)(gva & -(uint64_t)HL_PAGE_SIZE), HL_PAGE_SIZE);
    *entry = gpa | (*entry & PTE_NX) | PTE_LEAF | PTE_WRITABLE;
    invalidate(gva);
    return true;
}

bool hl_kernel_page_fault(uint64_t error) {
    if (error & FAULT_RESERVED)
        return false;
    if (!(error & FAULT_PRESENT))
        return grow_stack(read_cr2());
    return (error & (FAULT_WRITE | FAULT_USER | FAULT_FETCH)) == FAULT_WRITE && copy_on_write(read_cr2());
}

/* ---- Exceptions (abi.md 11.4) ------------------------------------------------------------------------------ */

static bool make_writable(uint64_t gva) {
    if (copy_on_write(gva))
        return true;
    return hl_kernel_is_mapped(gva) ? (*leaf_entry(gva, false) & PTE_WRITABLE) != 0 : grow_stack(gva);
}

static void abort_decimal(struct hl_AbortStream *stream, unsigned value) {
    if (value >= 10)
        abort_decimal(stream, value / 10);
    hl_abort_byte(stream, (uint8_t)('0' + value % 10));
}

static void abort_hex(struct hl_AbortStream *stream, const char *label, uint64_t value) {
    hl_abort_text(stream, label);
    int shift = 60;
    while (shift > 0 && value >> shift == 0)
        shift -= 4;
    for (; shift >= 0; shift -= 4) {
        unsigned digit = (value >> shift) & 15;
        hl_abort_byte(stream, (uint8_t)(digit < 10 ? '0' + digit : 'a' + digit - 10));
    }
}

/* Only bytes that can be read are listed: a nested fault would report this function instead of the guest's. */
static void abort_instruction_bytes(struct hl_AbortStream *stream, uint64_t rip) {
    hl_abort_text(stream, "\nBytes At Faulting Instruction: [");
    for (uint64_t address = rip; address != rip + 8 && hl_kernel_is_mapped(address); address++) {
        if (address != rip)
            hl_abort_text(stream, ", ");
        abort_decimal(stream, *(const uint8_t *)address);
    }
    hl_abort_byte(stream, ']');
}

_Noreturn void hl_kernel_abort_exception(const struct hl_ExceptionFrame *frame, uint64_t address) {
    struct hl_AbortStream stream = {0};
    hl_abort_byte(&stream, ABORT_GUEST_ERROR);
    hl_abort_byte(&stream, (uint8_t)frame->vector);
    hl_abort_flush(&stream);
    hl_abort_text(&stream, "Exception vector: ");
    abort_decimal(&stream, (unsigned)frame->vector);
    abort_hex(&stream, "\nFaulting Instruction: 0x", frame->rip);
    abort_instruction_bytes(&stream, frame->rip);
    abort_hex(&stream, "\nPage Fault Address: 0x", frame->vector == VECTOR_PAGE_FAULT ? address : 0);
    abort_hex(&stream, "\nError code: 0x", frame->error_code);
    abort_hex(&stream, "\nStack Pointer: 0x", (uint64_t)frame);
    hl_abort_end(&stream);
}

/* Copies the frame to the interrupted stack and aims the return at the upcall. False where the guest wants no
 * part in this vector, or its stack cannot take the frame. */
static bool deliver_to_guest(struct hl_ExceptionFrame *frame, uint64_t address) {
    if ((hl_handled_vectors >> frame->vector & 1) == 0)
        return false;
    uint64_t top = (frame->rsp - RED_ZONE) & ~15ull, copy = top - sizeof *frame;
    if (!make_writable(copy) || !make_writable(top - 1))
        return false;
    copy_words((void *)copy, frame, sizeof *frame);
    frame->rdi = frame->vector;
    frame->rsi = copy;
    frame->rdx = address;
    frame->rip = (uint64_t)hl_exception_upcall;
    frame->rsp = copy;
    frame->rflags &= ~RFLAGS_TF_IF_DF;
    return true;
}

void hl_kernel_exception(struct hl_ExceptionFrame *frame) {
    uint64_t address = read_cr2();
    if (!deliver_to_guest(frame, address))
        hl_kernel_abort_exception(frame, address);
}

/* ---- Set-up at the first entry (abi.md 5.5) ---------------------------------------------------------------- */

static void set_gate(unsigned vector) {
    uint64_t stub = (uint64_t)(hl_vector_stubs + vector * HL_VECTOR_STUB_SIZE);
    uint64_t attributes = 0x8E01;              /* present interrupt gate, IST 1 */
    CONTROL->idt[vector][0] = (stub & 0xFFFF) | KERNEL_CODE_SELECTOR << 16 | attributes << 32
                              | (stub >> 16 & 0xFFFF) << 48;
    CONTROL->idt[vector][1] = stub >> 32;
}

void hl_kernel_enable_vector(unsigned vector) {
    if (vector >= FIRST_INTERRUPT_VECTOR && vector < HL_VECTOR_COUNT)
        set_gate(vector);
}

static void fill_descriptor_tables(void) {
    uint64_t tss = (uint64_t)&CONTROL->tss, limit = sizeof CONTROL->tss;
    CONTROL->gdt[1] = 0x00A09A0000000000;      /* 64-bit code */
    CONTROL->gdt[2] = 0x00C0920000000000;      /* data */
    CONTROL->gdt[3] = limit | (tss & 0xFFFFFF) << 16 | 0x89ull << 40 | (tss >> 24 & 0xFF) << 56;
    CONTROL->gdt[4] = tss >> 32;
    CONTROL->tss.ist1 = EXCEPTION_STACK_TOP;
    for (unsigned vector = 0; vector < FIRST_INTERRUPT_VECTOR; vector++)
        if (IDT_VECTORS >> vector & 1)
            set_gate(vector);
}

static void load_descriptor_tables(void) {
    struct descriptor_table gdt = {sizeof CONTROL->gdt - 1, PROC_CONTROL_GVA};
    struct descriptor_table idt = {sizeof CONTROL->idt - 1, (uint64_t)CONTROL->idt};
    uint64_t scratch;
    __asm__ volatile("lgdt %1\n\t"
                     "mov %3, %%ds\n\tmov %3, %%es\n\tmov %3, %%fs\n\tmov %3, %%gs\n\tmov %3, %%ss\n\t"
                     "pushq %4\n\tlea 1f(%%rip), %0\n\tpush %0\n\tlretq\n1:\t"
                     "ltr %w5\n\tlidt %2"
                     : "=&r"(scratch)
                     : "m"(gdt), "m"(idt), "r"(KERNEL_DATA_SELECTOR), "i"(KERNEL_CODE_SELECTOR),
                       "r"(TSS_SELECTOR)
                     : "memory");
}

void hl_kernel_init(void) {
    hl_kernel_map(PROC_CONTROL_GVA, allocate_pages(2), 2 * HL_PAGE_SIZE, MAP_WRITE);
    fill_descriptor_tables();
    load_descriptor_tables();
    write_msr(MSR_FS_BASE, (uint64_t)&hl_thread_block);
    grow_stack(HL_MAIN_STACK_TOP - 1);
}
