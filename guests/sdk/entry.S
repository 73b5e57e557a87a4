/* Where the CPU enters the guest: the first entry, the dispatch of a call, and the exceptions.
 *
 * Everything in .kernel.text stays at CPL 0. Only integer instructions of kvm-hosts.md 2.6 occur in it.
 * The rest runs at CPL 3 in a guest built for user mode (HL_USER_MODE 1), at CPL 0 in one built for kernel mode.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernel.h"

        .cfi_sections .debug_frame

/* The version note, byte for byte abi.md 4.7: Rust hosts compare it with their own version. */
        .section .note.hyperlight-version, "a", @note
        .balign 8
        .long 11, 7, 1
        .asciz "Hyperlight"
        .balign 4
        .asciz "0.14.0"
        .balign 8

/* What a host of this project reads, and others skip: whether this guest's own code runs at CPL 3 and resets its own
 * FPU, and that it takes a seed in RDI. guest.ld appends which pages of the image are the kernel part's. */
        .section .note.hyperlight-privilege, "a", @note
        .balign 8
        .long 11, 24, 2
        .asciz "Hyperlight"
        .balign 4
        .long 1, HL_PRIVILEGE_TAKES_SEED | (HL_USER_MODE * (HL_PRIVILEGE_USER_MODE | HL_PRIVILEGE_RESETS_FPU))

        .section .kernel.text, "ax", @progbits

/* First entry (abi.md 6.3): rdi PEB, rsi seed, rdx page size, rcx log level. The stack is the exception
 * stack, and nothing outside scratch is writable until hl_kernel_init has installed the page-fault handler. */
        .global entrypoint
        .type entrypoint, @function
entrypoint:
        .cfi_startproc
        .cfi_undefined rip
        mov     %rdi, %rbx
        mov     %rsi, %rbp
        mov     %rdx, %r12
        mov     %rcx, %r13
        sub     $8, %rsp
        call    hl_kernel_init                  /* rdi: the PEB */
#if HL_USER_MODE
        mov     $HL_MAIN_STACK_TOP, %rax
        push    $HL_USER_DATA_SELECTOR
        push    %rax
        push    $HL_RFLAGS_FIXED
        push    $HL_USER_CODE_SELECTOR
        lea     initialise(%rip), %rax
        push    %rax
#else
        movabs  $HL_MAIN_STACK_TOP, %rsp
#endif
        mov     %rbx, %rdi
        mov     %rbp, %rsi
        mov     %r12, %rdx
        mov     %r13, %rcx
        xor     %ebp, %ebp
#if HL_USER_MODE
        iretq
        .cfi_endproc
        .size entrypoint, . - entrypoint

        .text
        .type initialise, @function
initialise:
        .cfi_startproc
        .cfi_undefined rip
#endif
        call    hl_runtime_init
        lea     hl_dispatch(%rip), %rax         /* published in RAX, as the stack is in RSP */
        jmp     halt
        .cfi_endproc
#if HL_USER_MODE
        .size initialise, . - initialise
#else
        .size entrypoint, . - entrypoint
#endif

/* One guest call (abi.md 6.4), RDI the request for a seed. ZF asks for a TLB flush, and must be tested before the
 * stack is touched. A host that knows of user mode flushes by itself. */
        .global hl_dispatch
        .type hl_dispatch, @function
hl_dispatch:
        .cfi_startproc
        .cfi_undefined rip
        jnz     1f
#if HL_USER_MODE
        .global hl_flush_gate
hl_flush_gate:
        hlt
1:      fninit
        ldmxcsr initial_mxcsr(%rip)
        .irp    number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        pxor    %xmm\number, %xmm\number
        .endr
        call    hl_runtime_dispatch
halt:   out     %eax, $HL_PORT_HALT
        jmp     halt
#else
        mov     %cr4, %rax
        xor     $0x80, %rax                     /* toggling CR4.PGE drops every translation */
        mov     %rax, %cr4
        xor     $0x80, %rax
        mov     %rax, %cr4
1:      call    hl_runtime_dispatch
halt:   out     %eax, $HL_PORT_HALT
        cli
        hlt
        jmp     halt
#endif
        .cfi_endproc
        .size hl_dispatch, . - hl_dispatch

/* The runtime's way to the kernel part: a system call whose trap is the #GP of a HLT at CPL 3. Anyone may jump to
 * the gate; the kernel part checks what it is asked for, not who asks. */
        .global hl_service
        .type hl_service, @function
hl_service:
        .cfi_startproc
#if HL_USER_MODE
        .global hl_service_gate
hl_service_gate:
        hlt
        ret
#else
        jmp     hl_kernel_service
#endif
        .cfi_endproc
        .size hl_service, . - hl_service

#if HL_USER_MODE
        .section .rodata
        .balign 4
initial_mxcsr:
        .long   0x1F80
        .section .kernel.text
#endif

/* One stub per vector, HL_VECTOR_STUB_SIZE apart. Each makes the stack look the same: error code, vector. */
        .global hl_vector_stubs
        .balign HL_VECTOR_STUB_SIZE
hl_vector_stubs:
        .set    vector, 0
        .rept   HL_VECTOR_COUNT
        .balign HL_VECTOR_STUB_SIZE
        .if vector == 14
        jmp     page_fault
        .else
        .if vector != 8 && vector != 17 && vector != 30 && (vector < 10 || vector > 14)
        push    $0
        .endif
        push    $vector
        jmp     exception
        .endif
        .set    vector, vector + 1
        .endr

/* Page faults that the kernel part resolves itself save only what a C function may change. */
        .macro save_register register
        push    \register
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset \register, 0
        .endm

        .type page_fault, @function
page_fault:
        .cfi_startproc simple                   /* a debugger finds the way back to the code that faulted */
        .cfi_signal_frame
        .cfi_def_cfa %rsp, 16                   /* error code, RIP | CS, RFLAGS, RSP, SS */
        .cfi_offset %rip, -8
        .cfi_offset %rsp, 16
        save_register %rax
        save_register %rcx
        save_register %rdx
        save_register %rsi
        save_register %rdi
        save_register %r8
        save_register %r9
        save_register %r10
        save_register %r11
        mov     72(%rsp), %rdi                  /* the error code */
        sub     $8, %rsp
        .cfi_adjust_cfa_offset 8
        cld
        call    hl_kernel_page_fault
        test    %al, %al
        lea     8(%rsp), %rsp                   /* from here to the jump nothing changes ZF */
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rdx
        pop     %rcx
        pop     %rax
        jz      1f
        add     $8, %rsp
        iretq
1:      push    $14
        jmp     exception
        .cfi_endproc
        .size page_fault, . - page_fault

        .macro save_frame
        push    %rax
        push    %rbx
        push    %rcx
        push    %rdx
        push    %rsi
        push    %rdi
        push    %rbp
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        sub     $512 - 24, %rsp
        .rept   3                               /* where the last x87 operation was: AMD's FXSAVE may leave that out */
        push    $0
        .endr
        fxsave  (%rsp)
        mov     %es, %eax
        push    %rax
        push    %fs
        push    %gs
        mov     %ds, %eax
        push    %rax
        .endm

/* The segment registers are left alone: nothing changes them, and a load would clear FS and GS base. */
        .macro restore_frame_and_return
        fxrstor HL_FRAME_FXSAVE(%rsp)
        add     $HL_FRAME_FXSAVE + 512, %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rbp
        pop     %rdi
        pop     %rsi
        pop     %rdx
        pop     %rcx
        pop     %rbx
        pop     %rax
        add     $16, %rsp                       /* vector and error code */
        iretq
        .endm

/* Every other exception: the frame of abi.md 11.4, for the guest's own handler or for the abort text. */
        .type exception, @function
exception:
        save_frame
        mov     %rsp, %rdi
        cld
        call    hl_kernel_exception             /* returns if the frame now leads to the upcall */
        restore_frame_and_return
        .size exception, . - exception

        .text

/* The guest's own exception handler runs here, on the interrupted stack and privilege, as a signal handler
 * would: edi vector, rsi and rsp the copied frame, rdx the faulting address. It may fault in its turn. IRETQ goes back
 * at either privilege. */
        .global hl_exception_upcall
        .type hl_exception_upcall, @function
hl_exception_upcall:
        mov     %rdx, %rbx
        call    hl_runtime_exception
        test    %al, %al
        jz      1f
        restore_frame_and_return
1:      mov     $HL_SERVICE_ABORT, %edi
        mov     %rsp, %rsi
        mov     %rbx, %rdx
        call    hl_service                      /* comes back if the frame was tampered with */
        jmp     halt
        .size hl_exception_upcall, . - hl_exception_upcall

/* Floating-point arguments and results pass through the runtime as integers. These four adaptors use only the
 * SSE moves that an emulated CPL 0 knows, so that a float can be handed on wherever it comes from. */
        .macro float_argument name, target, register
        .global \name
        .type \name, @function
\name:  sub     $24, %rsp
        movups  %xmm0, (%rsp)
        mov     (%rsp), \register
        add     $24, %rsp
        jmp     \target
        .size \name, . - \name
        .endm

        .macro float_result name, target
        .global \name
        .type \name, @function
\name:  sub     $24, %rsp
        call    \target
        mov     %rax, (%rsp)
        movq    $0, 8(%rsp)
        movups  (%rsp), %xmm0
        add     $24, %rsp
        ret
        .size \name, . - \name
        .endm

        float_argument hl_flatbuffer_result_from_Float, hl_flatbuffer_result_from_FloatBits, %edi
        float_argument hl_flatbuffer_result_from_Double, hl_flatbuffer_result_from_DoubleBits, %rdi
        float_result hl_get_host_return_value_as_Float, hl_get_host_return_value_as_FloatBits
        float_result hl_get_host_return_value_as_Double, hl_get_host_return_value_as_DoubleBits

        .section .note.GNU-stack, "", @progbits
