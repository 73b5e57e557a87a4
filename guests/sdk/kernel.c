/* The kernel part in C: descriptor tables, page tables, page faults, exceptions, services.
 *
 * Integer instructions only, no writable data in the image, no call out of this file: see kernel.h. While it handles an
 * exception it touches nothing but scratch, its own text, and pages that it has made writable itself, because
 * every exception starts at the same stack top and would overwrite the frame of the one before.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernel.h"

#define MAX_GPA 0xFFFFFFFFFull
#define SCRATCH_ALIAS 0xFFFFFFEFFFFFF000ull    /* GVA - GPA of every scratch page, whatever its size */
#define SCRATCH_SIZE_WORD ((volatile uint64_t *)0xFFFFFFFFFFFFEFF8ull)
#define ALLOCATOR_WORD ((volatile uint64_t *)0xFFFFFFFFFFFFEFF0ull)
#define IMAGE_END_WORD ((volatile uint64_t *)0xFFFFFFFFFFFFEFE0ull)    /* gpa; 0 where the host does not know it */
#define EXCEPTION_STACK_TOP 0xFFFFFFFFFFFFEFE0ull
#define PROC_CONTROL_GVA 0xFFFFFD0000000000ull
#define MAIN_STACK_LIMIT 0xFFFFFE0000000000ull
#define LOW_END 0x0000800000000000ull
#define DEVICES_GPA 0xFEC00000ull              /* I/O APIC to local APIC */
#define DEVICES_END_GPA 0xFEF00000ull

#define PTE_PRESENT (1ull << 0)
#define PTE_WRITABLE (1ull << 1)
#define PTE_USER (1ull << 2)
#define PTE_GUEST (HL_USER_MODE ? PTE_USER : 0)    /* what a page has that the guest's own code may use */
#define PTE_TABLE (0x23ull | PTE_GUEST)        /* present, writable, accessed; the leaf decides on the rest */
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

#define VECTOR_BREAKPOINT 3u
#define VECTOR_PROTECTION 13u
#define VECTOR_PAGE_FAULT 14u
#define FIRST_INTERRUPT_VECTOR 32u
#define KERNEL_CODE_SELECTOR 0x08u
#define KERNEL_DATA_SELECTOR 0x10u
#define TSS_SELECTOR 0x18u
#define IDT_VECTORS 0x401FFFFFull              /* 0 to 20, and 30 */

#define MSR_FS_BASE 0xC0000100u
#define CR4_PGE 0x80ull
#define CR4_OSXSAVE 0x40000ull
#define CPUID_1_ECX_XSAVE (1u << 26)
#define XCR0_ALLOWED 0xE7u                     /* x87, SSE, AVX, AVX-512 */

#define RED_ZONE 128u
#define FXSAVE_WRITTEN 416u                    /* what lies behind is whatever the exception stack held before */
#define RFLAGS_IF 0x200ull
#define RFLAGS_NT_TF_DF 0x4500ull

#define ABORT_MALLOC_FAILED 13
#define ABORT_GUEST_ERROR 15

#define GDT_ENTRIES 7

/* The two pages at PROC_CONTROL_GVA (abi.md 5.5). What stands between the TSS and the IDT is the kernel part's own. */
struct processor_control {
    uint64_t gdt[GDT_ENTRIES];
    uint8_t before_tss[0x40 - GDT_ENTRIES * 8];
    struct __attribute__((packed)) {
        uint32_t reserved0;
        uint64_t rsp[3];
        uint64_t reserved1;
        uint64_t ist1;
        uint8_t rest[0x66 - 0x2C];
        uint16_t io_bitmap_offset;
        uint64_t io_bitmap[3];                 /* a set bit closes a port, and so does the end of the table */
    } tss;
    struct range {
        uint64_t start, end;
    } io_buffers;                              /* gva, in whole pages */
    uint8_t before_idt[HL_PAGE_SIZE - 0x40 - 0x80 - sizeof(struct range)];
    uint64_t idt[256][2];
};
_Static_assert(offsetof(struct processor_control, idt) == HL_PAGE_SIZE, "abi.md 5.5");
#define CONTROL ((struct processor_control *)PROC_CONTROL_GVA)

struct __attribute__((packed)) descriptor_table {
    uint16_t limit;
    uint64_t base;
};

extern const uint8_t __hl_kernel_start[], __hl_kernel_end[];

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

static inline uint64_t read_cr4(void) {
    uint64_t value;
    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

static inline void write_cr4(uint64_t value) {
    __asm__ volatile("mov %0, %%cr4" : : "r"(value) : "memory");
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

static inline void clear_words(void *destination, size_t size) {
    size_t count = size / 8;
    __asm__ volatile("rep stosq" : "+D"(destination), "+c"(count) : "a"(0ull) : "memory");
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

static bool is_present(uint64_t gva) {
    if ((uint64_t)((int64_t)(gva << 16) >> 16) != gva)    /* not canonical */
        return false;
    uint64_t *entry = leaf_entry(gva, false);
    return entry != NULL && (*entry & PTE_PRESENT);
}

static void map(uint64_t gva, uint64_t gpa, uint64_t size, uint64_t bits) {
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

/* ---- What belongs to the guest's own code ------------------------------------------------------------------ */

static bool overlaps(uint64_t start, uint64_t end, uint64_t other_start, uint64_t other_end) {
    return start < other_end && other_start < end;
}

static bool is_main_stack(uint64_t gva) {
    return gva >= MAIN_STACK_LIMIT && gva < HL_MAIN_STACK_TOP;
}

/* Low addresses, but for page 0 and the kernel part's own pages. */
static bool is_low_and_free(uint64_t gva, uint64_t size) {
    return gva >= HL_PAGE_SIZE && gva < LOW_END && size <= LOW_END - gva
           && !overlaps(gva, gva + size, (uint64_t)__hl_kernel_start, (uint64_t)__hl_kernel_end);
}

/* Everything else is the kernel part's, and all of scratch that is not a buffer. */
static bool is_guests(uint64_t gva) {
    return !HL_USER_MODE || is_low_and_free(gva, 1) || is_main_stack(gva)
           || (gva >= CONTROL->io_buffers.start && gva < CONTROL->io_buffers.end);
}

/* Gives CPL 3 a page that is its own, if the host has not: hosts that do not know of user mode map every page for
 * the supervisor. False if it had it already. */
static bool grant(uint64_t gva) {
    bool changed = false;
    uint64_t table = read_cr3();
    for (unsigned shift = 39; shift >= 12; shift -= 9) {
        uint64_t *entry = (uint64_t *)((table & PTE_ADDRESS_MASK) + SCRATCH_ALIAS) + ((gva >> shift) & 511);
        changed |= (*entry & PTE_USER) == 0;
        *entry |= PTE_USER;
        table = *entry;
    }
    if (changed)
        invalidate(gva);
    return changed;
}

/* Whether one of the pages from gva on, all of them the kernel part's, lies in that physical memory. */
static bool holds_page_of(uint64_t gpa, uint64_t size, uint64_t gva, uint64_t gva_end) {
    for (; gva < gva_end; gva += HL_PAGE_SIZE)
        if ((*leaf_entry(gva, false) & PTE_ADDRESS_MASK) - gpa < size)
            return true;
    return false;
}

/* Whether physical memory may be shown to the guest's own code: neither scratch, where the page tables are, nor the
 * image, where a snapshot may have moved any page of the kernel part, nor an APIC. A local APIC that a host has
 * switched on would send an SMI, whose handler is code at gpa 0x38000 with all privileges. Hosts that do not tell where
 * the image ends map it read-only, or not: there the kernel part looks for its own pages. */
static bool is_mappable(uint64_t gpa, uint64_t size) {
    uint64_t scratch = MAX_GPA + 1 - *SCRATCH_SIZE_WORD, image_end = *IMAGE_END_WORD;
    if (gpa < image_end || gpa >= scratch || size > scratch - gpa
        || overlaps(gpa, gpa + size, DEVICES_GPA, DEVICES_END_GPA))
        return false;
    return image_end != 0
           || !(holds_page_of(gpa, size, (uint64_t)__hl_kernel_start, (uint64_t)__hl_kernel_end)
                || holds_page_of(gpa, size, PROC_CONTROL_GVA, PROC_CONTROL_GVA + 2 * HL_PAGE_SIZE));
}

/* ---- Page faults (abi.md 5.6) ------------------------------------------------------------------------------ */

static bool grow_stack(uint64_t gva) {
    if (!is_main_stack(gva))
        return false;
    uint64_t *entry = leaf_entry(gva, true);
    if ((*entry & PTE_PRESENT) == 0)
        *entry = allocate_pages(1) | PTE_LEAF | PTE_WRITABLE | PTE_NX | PTE_GUEST;
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
    *entry = gpa | (*entry & (PTE_NX | PTE_USER)) | PTE_LEAF | PTE_WRITABLE;
    invalidate(gva);
    return true;
}

bool hl_kernel_page_fault(uint64_t error) {
    uint64_t gva = read_cr2();
    if ((error & FAULT_RESERVED) || (HL_USER_MODE && !(error & FAULT_USER)))
        return false;    /* a fault of the kernel part's own has overwritten the frame that it was to go back to */
    if (!(error & FAULT_PRESENT))
        return grow_stack(gva);
    bool granted = false;
    if (error & FAULT_USER) {
        if (!HL_USER_MODE || !is_guests(gva))
            return false;
        granted = grant(gva);
    }
    return ((error & (FAULT_WRITE | FAULT_FETCH)) == FAULT_WRITE && copy_on_write(gva)) || granted;
}

/* ---- Exceptions (abi.md 11.4) ------------------------------------------------------------------------------ */

static bool make_writable(uint64_t gva) {
    if (!is_guests(gva))
        return false;
    if (copy_on_write(gva))
        return true;
    return is_present(gva) ? (*leaf_entry(gva, false) & PTE_WRITABLE) != 0 : grow_stack(gva);
}

/* An interrupt at a vector whose exception has an error code brings none: such a frame lies elsewhere, and its fields
 * are not what they are called. A guest can have that by programming the interrupt controller. */
static bool came_from_guest(const struct hl_ExceptionFrame *frame) {
    return !HL_USER_MODE
           || (frame->cs == HL_USER_CODE_SELECTOR && (uint64_t)frame == EXCEPTION_STACK_TOP - sizeof *frame);
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
    for (uint64_t address = rip; address != rip + 8 && is_present(address); address++) {
        if (address != rip)
            hl_abort_text(stream, ", ");
        abort_decimal(stream, *(const uint8_t *)address);
    }
    hl_abort_byte(stream, ']');
}

static _Noreturn void abort_exception(const struct hl_ExceptionFrame *frame, uint64_t address) {
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
    if (!came_from_guest(frame) || (hl_handled_vectors >> frame->vector & 1) == 0)
        return false;
    uint64_t top = (frame->rsp - RED_ZONE) & ~15ull, copy = top - sizeof *frame;
    if (!make_writable(copy) || !make_writable(top - 1))
        return false;
    clear_words(frame->fxsave + FXSAVE_WRITTEN, sizeof frame->fxsave - FXSAVE_WRITTEN);
    copy_words((void *)copy, frame, sizeof *frame);
    frame->rdi = frame->vector;
    frame->rsi = copy;
    frame->rdx = address;
    frame->rip = (uint64_t)hl_exception_upcall;
    frame->rsp = copy;
    frame->rflags &= ~(RFLAGS_NT_TF_DF | (HL_USER_MODE ? 0 : RFLAGS_IF));    /* IRETQ at CPL 3 cannot set IF again */
    return true;
}

/* ---- Services: whoever asks may be an attacker, with any numbers ------------------------------------------- */

static void set_gate(unsigned vector, unsigned privilege) {
    uint64_t stub = (uint64_t)(hl_vector_stubs + vector * HL_VECTOR_STUB_SIZE);
    uint64_t attributes = 0x8E01 | privilege << 13;    /* present interrupt gate, IST 1 */
    CONTROL->idt[vector][0] = (stub & 0xFFFF) | KERNEL_CODE_SELECTOR << 16 | attributes << 32
                              | (stub >> 16 & 0xFFFF) << 48;
    CONTROL->idt[vector][1] = stub >> 32;
}

/* A snapshot may have made the IDT copy-on-write. */
static bool enable_interrupt(uint64_t vector) {
    bool is_interrupt = vector >= FIRST_INTERRUPT_VECTOR && vector < HL_VECTOR_COUNT;
    if (is_interrupt) {
        copy_on_write((uint64_t)CONTROL->idt);
        set_gate((unsigned)vector, 0);
    }
    return is_interrupt;
}

static bool map_for_guest(uint64_t gva, uint64_t gpa, uint64_t size, uint64_t flags) {
    if (((gva | gpa | size) & (HL_PAGE_SIZE - 1)) != 0)
        return false;
    if (HL_USER_MODE && !(is_low_and_free(gva, size) && is_mappable(gpa, size)))
        return false;
    map(gva, gpa, size,
        PTE_LEAF | PTE_GUEST | (flags & MAP_WRITE ? PTE_WRITABLE : 0) | (flags & MAP_EXECUTE ? 0 : PTE_NX));
    return true;
}

/* What the guest's handler refused: its copy of the frame, if that is where the guest can have put one. */
static void abort_refused(uint64_t frame, uint64_t address) {
    if (is_guests(frame) && is_guests(frame + sizeof(struct hl_ExceptionFrame) - 1)
        && is_present(frame) && is_present(frame + sizeof(struct hl_ExceptionFrame) - 1))
        abort_exception((const struct hl_ExceptionFrame *)frame, address);
}

uint64_t hl_kernel_service(uint64_t number, uint64_t first, uint64_t second, uint64_t third, uint64_t fourth) {
    switch (number) {
    case HL_SERVICE_MAP: return map_for_guest(first, second, third, fourth);
    case HL_SERVICE_IS_MAPPED: return is_present(first);
    case HL_SERVICE_VECTOR: return enable_interrupt(first);
    case HL_SERVICE_ABORT: abort_refused(first, second); return false;
#if !HL_USER_MODE
    case HL_SERVICE_INTERRUPTS:
        if (first)
            __asm__ volatile("sti");
        else
            __asm__ volatile("cli");
        return true;
#endif
    default: return false;
    }
}

#if HL_USER_MODE
/* A HLT at one of the gates is no exception: it does what it asks for and goes on behind the HLT, one byte long. */
static bool serve(struct hl_ExceptionFrame *frame) {
    if (frame->vector != VECTOR_PROTECTION || !came_from_guest(frame))
        return false;
    if (frame->rip == (uint64_t)hl_flush_gate) {
        write_cr4(read_cr4() ^ CR4_PGE);       /* toggling drops every translation */
        write_cr4(read_cr4() ^ CR4_PGE);
    } else if (frame->rip != (uint64_t)hl_service_gate) {
        return false;
    } else if (frame->rdi == HL_SERVICE_INTERRUPTS) {
        frame->rflags = (frame->rflags & ~RFLAGS_IF) | (frame->rsi ? RFLAGS_IF : 0);
    } else {
        frame->rax = hl_kernel_service(frame->rdi, frame->rsi, frame->rdx, frame->rcx, frame->r8);
    }
    frame->rip++;
    return true;
}
#else
static bool serve(struct hl_ExceptionFrame *frame) {
    (void)frame;
    return false;
}
#endif

void hl_kernel_exception(struct hl_ExceptionFrame *frame) {
    uint64_t address = read_cr2();
    if (!serve(frame) && !deliver_to_guest(frame, address))
        abort_exception(frame, address);
}

/* ---- Set-up at the first entry (abi.md 5.5) ---------------------------------------------------------------- */

/* The segments have been accessed: the CPU would note it at the next load, in a page that may be copy-on-write by then. */
static void fill_descriptor_tables(void) {
    uint64_t tss = (uint64_t)&CONTROL->tss, limit = sizeof CONTROL->tss - 1;
    CONTROL->gdt[KERNEL_CODE_SELECTOR / 8] = 0x00A09B0000000000;
    CONTROL->gdt[KERNEL_DATA_SELECTOR / 8] = 0x00C0930000000000;
    CONTROL->gdt[TSS_SELECTOR / 8] = limit | (tss & 0xFFFFFF) << 16 | 0x89ull << 40 | (tss >> 24 & 0xFF) << 56;
    CONTROL->gdt[TSS_SELECTOR / 8 + 1] = tss >> 32;
    CONTROL->gdt[HL_USER_DATA_SELECTOR / 8] = 0x00CFF3000000FFFF;
    CONTROL->gdt[HL_USER_CODE_SELECTOR / 8] = 0x00AFFB000000FFFF;
    CONTROL->tss.ist1 = EXCEPTION_STACK_TOP;
    for (unsigned vector = 0; vector < FIRST_INTERRUPT_VECTOR; vector++)
        if (IDT_VECTORS >> vector & 1)
            set_gate(vector, vector == VECTOR_BREAKPOINT ? 3 : 0);
}

/* Opens to CPL 3 the host's ports, 99 to 108, and three more because an OUT of 32 bits to port 108 touches four; and
 * for guests that take a timer the interrupt controller's: 0x20, 0x21, 0xA0, 0xA1. */
static void open_ports(void) {
    CONTROL->tss.io_bitmap_offset = 0x68;
    CONTROL->tss.io_bitmap[0] = ~(3ull << 0x20);
    CONTROL->tss.io_bitmap[1] = ~(0x1FFFull << (99 - 64));
    CONTROL->tss.io_bitmap[2] = ~(3ull << (0xA0 - 128));
}

static void load_descriptor_tables(void) {
    struct descriptor_table gdt = {sizeof CONTROL->gdt - 1, PROC_CONTROL_GVA};
    struct descriptor_table idt = {sizeof CONTROL->idt - 1, (uint64_t)CONTROL->idt};
    uint64_t scratch;
    __asm__ volatile("lgdt %1\n\t"
                     "mov %3, %%ds\n\tmov %3, %%es\n\tmov %3, %%fs\n\tmov %3, %%gs\n\tmov %6, %%ss\n\t"
                     "pushq %4\n\tlea 1f(%%rip), %0\n\tpush %0\n\tlretq\n1:\t"
                     "ltr %w5\n\tlidt %2"
                     : "=&r"(scratch)
                     : "m"(gdt), "m"(idt), "r"(HL_USER_MODE ? HL_USER_DATA_SELECTOR : KERNEL_DATA_SELECTOR),
                       "i"(KERNEL_CODE_SELECTOR), "r"(TSS_SELECTOR), "r"(KERNEL_DATA_SELECTOR)
                     : "memory");
}

/* Lets the guest use AVX, where the CPU has it. Where CPL 0 is emulated CPUID hides XSAVE, and CPL 3 has AVX anyway. */
static void enable_avx(void) {
    uint32_t eax = 1, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if ((ecx & CPUID_1_ECX_XSAVE) == 0)
        return;
    write_cr4(read_cr4() | CR4_OSXSAVE);
    eax = 0xD, ecx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    __asm__ volatile("xsetbv" : : "c"(0), "a"(eax & XCR0_ALLOWED), "d"(0));
}

/* peb: the buffers' sizes and addresses, by turns (abi.md 3). */
void hl_kernel_init(const uint64_t *peb) {
    map(PROC_CONTROL_GVA, allocate_pages(2), 2 * HL_PAGE_SIZE, PTE_LEAF | PTE_WRITABLE | PTE_NX);
    fill_descriptor_tables();
    load_descriptor_tables();
    write_msr(MSR_FS_BASE, (uint64_t)&hl_thread_block);
    grow_stack(HL_MAIN_STACK_TOP - 1);
    if (HL_USER_MODE) {
        CONTROL->io_buffers = (struct range){peb[1], (peb[3] + peb[2] + HL_PAGE_SIZE - 1) & -(uint64_t)HL_PAGE_SIZE};
        open_ports();
        enable_avx();
    }
}
