/* The floor: what a host in C needs for the same work, by the same ioctls, on the same guest image.
 *
 * floor.py starts it with the number of a memory file that holds everything a guest needs: numbers and kernel
 * structs, the messages of each call, and memory files with the image. Then it asks, on standard input, for `count`
 * samples of `operation`, and gets as many times in nanoseconds on standard output. What a host can prepare once is
 * prepared once. Each answer of the guest is checked, as a host must check it.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "simpleguest_compute.h"

enum { PORT_CALL_HOST = 101, PORT_HALT = 108 };
enum { EMPTY_STACK = 8, PAGE = 4096, MAX_WORDS = 8, BASE_ADDRESS = 0x1000 };

/* ---- What floor.py hands over; floor.py spells the same in `struct` codes ------------------------------------- */

struct image {
    uint64_t fd;        /* memory file */
    uint64_t size, memory_size, tables_size;
    uint64_t scratch_size, scratch_gpa, scratch_tables_offset, input_size, output_size;
    uint64_t writable;  /* by the guest: whether this machine's kernel copies at the first write */
    struct { uint64_t offset, value; } words[MAX_WORDS];
    struct kvm_regs entry, next_entry;
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
};

struct message {        /* bytes of the job file */
    uint64_t begin, size;
};

struct conversation {   /* a call; then, for each host function, what the guest asks and the answer; the result */
    struct message call, request, answer, result;
};

struct job {
    uint64_t resets_fpu, filters_msrs, cpuid_begin, signal_number;
    struct image fresh, ready;
    struct conversation echo, add, spin;
};

static const uint8_t *job_bytes;
static const struct job *job;
static int kvm_fd;

static void must(int succeeded, const char *what) {
    if (!succeeded) {
        fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* ---- Memory --------------------------------------------------------------------------------------------------- */

/* Both lie in one mapping, scratch first, with a page that nobody can touch before, between and after them. */
struct memory {
    uint8_t *scratch, *image, *outer;
    uint64_t outer_size;
};

static void map_at(uint8_t *place, uint64_t size, int fd, uint64_t offset) {
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | (fd < 0 ? MAP_ANONYMOUS : 0);
    must(mmap(place, size, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset) != MAP_FAILED, "mmap");
}

static void write_u64(uint8_t *place, uint64_t value) { memcpy(place, &value, sizeof value); }

static uint64_t read_u64(const uint8_t *place) {
    uint64_t value;
    memcpy(&value, place, sizeof value);
    return value;
}

static void write_words(const struct image *image, struct memory memory) {
    for (int i = 0; i < MAX_WORDS && image->words[i].offset; i++)
        write_u64(memory.scratch + image->words[i].offset, image->words[i].value);
    write_u64(memory.scratch, EMPTY_STACK);
    write_u64(memory.scratch + image->input_size, EMPTY_STACK);
}

static struct memory map_memory(const struct image *image) {
    int fd = (int)image->fd;
    struct memory memory = {.outer_size = image->scratch_size + image->size + 3 * PAGE};
    memory.outer = mmap(NULL, memory.outer_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(memory.outer != MAP_FAILED, "mmap");
    memory.scratch = memory.outer + PAGE;
    memory.image = memory.scratch + image->scratch_size + PAGE;
    map_at(memory.scratch, image->scratch_size, -1, 0);
    map_at(memory.image, image->size, fd, 0);
    map_at(memory.scratch + image->scratch_tables_offset, image->tables_size, fd, image->memory_size);
    write_words(image, memory);
    return memory;
}

/* ---- The VM --------------------------------------------------------------------------------------------------- */

struct vm {
    const struct image *image;
    struct memory memory;
    int vm_fd, vcpu_fd, run_size, pagemap_fd, is_restored;
    struct kvm_run *run;
};

static void set_slot(int vm_fd, uint32_t slot, uint64_t gpa, const uint8_t *hva, uint64_t size, int writable) {
    struct kvm_userspace_memory_region region = {
        .slot = slot, .flags = writable ? 0 : KVM_MEM_READONLY, .guest_phys_addr = gpa,
        .memory_size = size, .userspace_addr = (uint64_t)hva};
    must(ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region) == 0, "KVM_SET_USER_MEMORY_REGION");
}

/* Lets the guest have FS.base, GS.base and KernelGSBase, and no other model-specific register. */
static void filter_msrs(int vm_fd) {
    struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {KVM_MSR_EXIT_REASON_FILTER}};
    must(ioctl(vm_fd, KVM_ENABLE_CAP, &cap) == 0, "KVM_ENABLE_CAP");
    uint8_t bitmap[8] = {7};
    struct kvm_msr_filter filter = {.flags = KVM_MSR_FILTER_DEFAULT_DENY};
    filter.ranges[0] = (struct kvm_msr_filter_range){
        .flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .nmsrs = 3, .base = 0xC0000100, .bitmap = bitmap};
    must(ioctl(vm_fd, KVM_X86_SET_MSR_FILTER, &filter) == 0, "KVM_X86_SET_MSR_FILTER");
}

static struct vm create_vm(const struct image *image) {
    struct vm vm = {.image = image, .memory = map_memory(image), .pagemap_fd = -1};
    do /* the kernel gives up where a signal is pending */
        vm.vm_fd = ioctl(kvm_fd, KVM_CREATE_VM, 0);
    while (vm.vm_fd < 0 && errno == EINTR);
    must(vm.vm_fd >= 0, "KVM_CREATE_VM");
    set_slot(vm.vm_fd, 0, BASE_ADDRESS, vm.memory.image, image->size, (int)image->writable);
    set_slot(vm.vm_fd, 1, image->scratch_gpa, vm.memory.scratch, image->scratch_size, 1);
    vm.vcpu_fd = ioctl(vm.vm_fd, KVM_CREATE_VCPU, 0);
    must(vm.vcpu_fd >= 0, "KVM_CREATE_VCPU");
    must(ioctl(vm.vcpu_fd, KVM_SET_CPUID2, job_bytes + job->cpuid_begin) == 0, "KVM_SET_CPUID2");
    if (job->filters_msrs) /* not straight after the slots: KVM would wait for milliseconds */
        filter_msrs(vm.vm_fd);
    vm.run_size = ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    vm.run = mmap(NULL, (size_t)vm.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm.vcpu_fd, 0);
    must(vm.run != MAP_FAILED, "mmap of kvm_run");
    return vm;
}

static void close_vm(struct vm *vm) {
    munmap(vm->run, (size_t)vm->run_size);
    if (vm->pagemap_fd >= 0)
        close(vm->pagemap_fd);
    close(vm->vcpu_fd);
    close(vm->vm_fd);
    munmap(vm->memory.outer, vm->memory.outer_size);
}

static void load(struct vm *vm, const struct kvm_regs *registers) {
    vm->run->s.regs.regs = *registers;
    vm->run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
}

/* Special registers and events, as general registers, are set at the next KVM_RUN: that spares two ioctls. */
static void load_state(struct vm *vm) {
    static const struct kvm_vcpu_events events;
    vm->run->s.regs.sregs = vm->image->sregs;
    vm->run->s.regs.events = events;
    vm->run->kvm_dirty_regs = KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
}

/* Sets what snapshots keep beside that. */
static void set_platform(struct vm *vm) {
    static struct { struct kvm_msrs header; struct kvm_msr_entry entry; } msrs = {{.nmsrs = 1}, {.index = 0xC0000102}};
    must(ioctl(vm->vcpu_fd, KVM_SET_XCRS, &vm->image->xcrs) == 0, "KVM_SET_XCRS");
    must(ioctl(vm->vcpu_fd, KVM_SET_MSRS, &msrs) == 1, "KVM_SET_MSRS");
}

/* Puts every register that a guest can change back. */
static void reset_vcpu(struct vm *vm) {
    static const struct kvm_debugregs debugregs;
    static const struct kvm_xsave xsave = {.region = {[0] = 0x37F, [6] = 0x1F80, [128] = 3}};
    must(ioctl(vm->vcpu_fd, KVM_SET_DEBUGREGS, &debugregs) == 0, "KVM_SET_DEBUGREGS");
    must(ioctl(vm->vcpu_fd, KVM_SET_XSAVE, &xsave) == 0, "KVM_SET_XSAVE");
    set_platform(vm);
    load_state(vm);
    vm->is_restored = 1;
}

/* ---- Calls ---------------------------------------------------------------------------------------------------- */

static void push(uint8_t *stack, uint64_t size, struct message message) {
    uint64_t top = read_u64(stack), end = top + message.size;
    must(top >= EMPTY_STACK && top <= size && end + 8 <= size, "push");
    memcpy(stack + top, job_bytes + message.begin, message.size);
    write_u64(stack + end, top);
    write_u64(stack, end + 8);
}

/* Takes the top message away and insists that it is the one expected. */
static void pop(uint8_t *stack, uint64_t size, struct message expected) {
    uint64_t top = read_u64(stack);
    must(top >= 2 * EMPTY_STACK && top <= size, "pop");
    uint64_t element = read_u64(stack + top - 8);
    must(element >= EMPTY_STACK && element <= top - 16 && expected.size <= top - element - 8, "element");
    must(memcmp(stack + element, job_bytes + expected.begin, expected.size) == 0, "the guest's answer");
    write_u64(stack, element);
    memset(stack + element, 0, top - element);
}

/* Runs the guest until it halts; returns 0 where a signal ended it before. */
static int run_until_halt(struct vm *vm, const struct conversation *talk) {
    uint8_t *input = vm->memory.scratch, *output = input + vm->image->input_size;
    for (;;) {
        if (ioctl(vm->vcpu_fd, KVM_RUN, 0) < 0) {
            must(errno == EINTR, "KVM_RUN");
            return 0;
        }
        struct kvm_run *run = vm->run;
        must(run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT, "exit");
        if (run->io.port == PORT_HALT)
            return 1;
        must(run->io.port == PORT_CALL_HOST && talk->request.size, "port");
        pop(output, vm->image->output_size, talk->request);
        push(input, vm->image->input_size, talk->answer);
    }
}

static void begin_call(struct vm *vm, const struct conversation *talk) {
    static const struct kvm_fpu fpu = {.fcw = 0x37F, .mxcsr = 0x1F80};
    write_u64(vm->memory.scratch, EMPTY_STACK);
    push(vm->memory.scratch, vm->image->input_size, talk->call);
    load(vm, vm->is_restored ? &vm->image->entry : &vm->image->next_entry);
    vm->is_restored = 0;
    if (!job->resets_fpu)
        must(ioctl(vm->vcpu_fd, KVM_SET_FPU, &fpu) == 0, "KVM_SET_FPU");
}

static void call(struct vm *vm, const struct conversation *talk) {
    begin_call(vm, talk);
    must(run_until_halt(vm, talk), "interrupted");
    pop(vm->memory.scratch + vm->image->input_size, vm->image->output_size, talk->result);
}

enum { WINDOW = 1 << 20, MAX_CHANGED = 64 };

struct changes {
    uint64_t count, pages[MAX_CHANGED]; /* offsets */
    uint64_t end;                       /* of the search */
};

static int add_changed(struct changes *changes, uint64_t page) {
    if (changes->count == MAX_CHANGED)
        return 0;
    changes->pages[changes->count++] = page;
    return 1;
}

/* <linux/fs.h> since 6.7 */
struct scan_order {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct scan_region {
    uint64_t start, end, categories;
};
#define SCAN_PAGEMAP _IOWR('f', 16, struct scan_order)
enum { IS_FILE = 1 << 2, IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4 };

/* As find_changes; returns -1 where the kernel is older. */
static int scan_changes(const struct vm *vm, const uint8_t *begin, uint64_t size, struct changes *changes) {
    static struct scan_region found[MAX_CHANGED];
    struct scan_order order = {
        .size = sizeof order, .start = (uint64_t)begin, .end = (uint64_t)begin + size, .vec = (uint64_t)found,
        .vec_len = MAX_CHANGED, .max_pages = MAX_CHANGED + 1, .category_inverted = IS_FILE, .category_mask = IS_FILE,
        .category_anyof_mask = IS_PRESENT | IS_SWAPPED};
    int count = ioctl(vm->pagemap_fd, SCAN_PAGEMAP, &order);
    if (count < 0)
        return -1;
    for (int i = 0; i < count; i++)
        for (uint64_t page = found[i].start; page < found[i].end; page += PAGE)
            if (!add_changed(changes, page - (uint64_t)begin))
                return 0;
    changes->end = size;
    return order.walk_end == order.end;
}

static int read_changes(const struct vm *vm, const uint8_t *begin, uint64_t size, struct changes *changes) {
    static uint64_t entries[WINDOW / PAGE];
    changes->end = size < WINDOW ? size : WINDOW;
    size_t count = changes->end / PAGE, bytes = count * sizeof *entries;
    ssize_t got = pread(vm->pagemap_fd, entries, bytes, (off_t)((uint64_t)begin / PAGE * sizeof *entries));
    must(got == (ssize_t)bytes, "pagemap");
    for (uint64_t i = 0; i < count; i++)
        if (entries[i] >> 62 && !(entries[i] >> 61 & 1)) /* there, or swapped out; and not a file's page */
            if (!add_changed(changes, i * PAGE))
                return 0;
    return 1;
}

/* Finds the pages of a private mapping that were written to; returns 0 where there are many. */
static int find_changes(const struct vm *vm, const uint8_t *begin, uint64_t size, struct changes *changes) {
    static int can_scan = 1;
    changes->count = 0;
    int found = can_scan ? scan_changes(vm, begin, size, changes) : -1;
    can_scan = found >= 0;
    return can_scan ? found : read_changes(vm, begin, size, changes);
}

static void discard(uint8_t *begin, uint64_t size) {
    must(madvise(begin, size, MADV_DONTNEED) == 0, "madvise");
}

static int any_in(const struct changes *changes, uint64_t begin, uint64_t end) {
    for (uint64_t i = 0; i < changes->count; i++)
        if (changes->pages[i] >= begin && changes->pages[i] < end)
            return 1;
    return 0;
}

/* Puts both memories back to the snapshot. Few changed pages are written over in place, which is cheaper than the
 * faults after a discard. This floor is for guests in user mode and the host's own copy-on-write, whose tables stay as
 * they are where KVM shadows them. Where it does not, the processor marks in them what it used, and all is discarded. */
static void restore(struct vm *vm) {
    const struct image *image = vm->image;
    uint64_t tables = image->scratch_tables_offset, image_from = image->scratch_size + PAGE, kept = 0;
    struct changes changes;
    if (vm->pagemap_fd < 0)
        vm->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    must(find_changes(vm, vm->memory.scratch, image_from + image->size, &changes),
         "more pages have changed than this floor is for");
    if (!any_in(&changes, tables, tables + image->tables_size)) {
        for (uint64_t i = 0; i < changes.count; i++) {
            uint64_t at = changes.pages[i];
            if (at < image_from)
                memset(vm->memory.scratch + at, 0, PAGE);
            else
                must(pread((int)image->fd, vm->memory.scratch + at, PAGE, (off_t)(at - image_from)) == PAGE, "pread");
        }
        kept = changes.end;
    }
    if (kept < image->scratch_size)
        discard(vm->memory.scratch + kept, image->scratch_size - kept);
    uint64_t kept_image = kept > image_from ? kept - image_from : 0;
    if (kept_image < image->size)
        discard(vm->memory.image + kept_image, image->size - kept_image);
    write_words(image, vm->memory);
    reset_vcpu(vm);
}

static struct vm from_snapshot(void) {
    struct vm vm = create_vm(&job->ready);
    set_platform(&vm);
    load_state(&vm);
    vm.is_restored = 1;
    return vm;
}

/* Creates the VM and runs the guest's own initialisation. */
static struct vm create_initialized(void) {
    struct vm vm = create_vm(&job->fresh);
    must(ioctl(vm.vcpu_fd, KVM_SET_SREGS, &job->fresh.sregs) == 0, "KVM_SET_SREGS");
    load(&vm, &job->fresh.entry);
    must(run_until_halt(&vm, &job->echo), "interrupted");
    struct kvm_regs halted;
    must(ioctl(vm.vcpu_fd, KVM_GET_REGS, &halted) == 0 && halted.rsp % 16 == 0, "KVM_GET_REGS");
    return vm;
}

/* ---- Interrupts ----------------------------------------------------------------------------------------------- */

struct kick {
    pthread_t target;
    struct kvm_run *run;
    uint64_t begin;
};

static void ignore(int number) { (void)number; }

/* Waits 10 ms, so that the guest runs, and ends its run. */
static void *kick(void *argument) {
    struct kick *kick = argument;
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    kick->begin = now();
    kick->run->immediate_exit = 1;
    pthread_kill(kick->target, (int)job->signal_number);
    return NULL;
}

static uint64_t interrupt_latency(struct vm *vm) {
    struct kick order = {.target = pthread_self(), .run = vm->run};
    pthread_t thread;
    begin_call(vm, &job->spin);
    must(pthread_create(&thread, NULL, kick, &order) == 0, "pthread_create");
    int halted = run_until_halt(vm, &job->spin);
    uint64_t end = now();
    must(!halted, "the guest ended by itself");
    pthread_join(thread, NULL);
    vm->run->immediate_exit = 0;
    return end - order.begin;
}

/* ---- Samples -------------------------------------------------------------------------------------------------- */

enum operation { CREATE, CALL, CALL_HOST, CALL_RESTORE, RESTORE, FROM_SNAPSHOT, INTERRUPT, LOOP, MATRIX };

static struct vm *living_vm(void) {
    static struct vm vm;
    if (!vm.run)
        vm = from_snapshot();
    return &vm;
}

/* Closed when all samples have been taken: closing a VM keeps the kernel busy beyond its end. */
enum { MAX_MADE = 1024 };
static struct vm made[MAX_MADE];
static int made_count;

static uint64_t timed_creation(int first_call) {
    uint64_t begin = now();
    struct vm vm = first_call ? from_snapshot() : create_initialized();
    if (first_call)
        call(&vm, &job->echo);
    uint64_t end = now();
    must(made_count < MAX_MADE, "too many VMs");
    made[made_count++] = vm;
    return end - begin;
}

static uint64_t timed_interrupt(void) {
    struct vm vm = from_snapshot();
    uint64_t latency = interrupt_latency(&vm);
    close_vm(&vm);
    return latency;
}

static uint64_t sample(enum operation operation, uint64_t size) {
    switch (operation) {
    case CREATE: return timed_creation(0);
    case FROM_SNAPSHOT: return timed_creation(1);
    case INTERRUPT: return timed_interrupt();
    default: break;
    }
    int is_guest = operation != LOOP && operation != MATRIX;
    struct vm *vm = is_guest ? living_vm() : NULL;
    if (operation == RESTORE)
        call(vm, &job->echo);
    volatile double product;
    uint64_t begin = now();
    switch (operation) {
    case CALL: call(vm, &job->echo); break;
    case CALL_HOST: call(vm, &job->add); break;
    case CALL_RESTORE: call(vm, &job->echo); restore(vm); break;
    case RESTORE: restore(vm); break;
    case LOOP: turn(size); break;
    case MATRIX: product = matrix_product(size); (void)product; break;
    default: must(0, "unknown operation");
    }
    return now() - begin;
}

int main(int argument_count, char **arguments) {
    must(argument_count == 2, "usage: floor FD");
    int fd = atoi(arguments[1]);
    off_t size = lseek(fd, 0, SEEK_END);
    job_bytes = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
    must(size > 0 && job_bytes != MAP_FAILED, "the job");
    job = (const struct job *)job_bytes;
    must(fwrite(&(uint64_t){sizeof *job}, 8, 1, stdout) == 1 && fflush(stdout) == 0, "stdout");
    kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    must(kvm_fd >= 0, "/dev/kvm");
    struct sigaction action = {.sa_handler = ignore};
    must(sigaction((int)job->signal_number, &action, NULL) == 0, "sigaction");
    struct { uint64_t operation, count, size; } order;
    while (fread(&order, sizeof order, 1, stdin) == 1) {
        for (uint64_t i = 0; i < order.count; i++) {
            uint64_t time_ns = sample((enum operation)order.operation, order.size);
            must(fwrite(&time_ns, sizeof time_ns, 1, stdout) == 1, "stdout");
        }
        must(fflush(stdout) == 0, "stdout");
        while (made_count > 0)
            close_vm(&made[--made_count]);
    }
    return 0;
}
