/* The guest runtime: the I/O stacks, guest calls, host calls, results, logs and aborts (abi.md 7, 9 and 12).
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "runtime.h"
#include "kernel.h"
#include "libc.h"
#include "printf.h"

static const hl_Peb *peb;
static uint64_t max_log_level;

const hl_Peb *hl_peb(void) {
    return peb;
}

/* ---- Aborts (abi.md 8.2, 11.5) ----------------------------------------------------------------------------- */

_Noreturn void hl_abort_with_code_and_message(int32_t code, const char *message) {
    struct hl_AbortStream stream = {0};
    hl_abort_byte(&stream, (uint8_t)code);
    hl_abort_flush(&stream);    /* the reference sends the code in an OUT of its own */
    hl_abort_text(&stream, message);
    hl_abort_end(&stream);
}

_Noreturn void hl_abort_with_code(int32_t code) {
    hl_abort_with_code_and_message(code, "");
}

_Noreturn void abort(void) {
    hl_abort_with_code(hl_ErrorCode_NoError);
}

/* Needs no heap: the panic may be about the heap. */
_Noreturn void hl_panic_at(const char *file, int line, const char *message) {
    char where[96];
    struct hl_AbortStream stream = {0};
    snprintf(where, sizeof where, "panicked at %s:%d:\n", file, line);
    hl_abort_byte(&stream, hl_ErrorCode_UnknownError);
    hl_abort_text(&stream, where);
    hl_abort_text(&stream, message);
    hl_abort_end(&stream);
}

_Noreturn void __assert_fail(const char *expression, const char *file, int line, const char *function) {
    printf("Assertion failed: %s (%s: %s: %d)\n", expression, file, function, line);
    abort();
}

/* ---- I/O stacks (abi.md 9) --------------------------------------------------------------------------------- */

#define STACK_EMPTY 8u      /* the stack pointer of an empty stack: it lies behind itself */

typedef uint64_t __attribute__((may_alias, aligned(1))) stack_word;

static stack_word *stack_at(const hl_Buffer *stack, uint64_t offset) {
    return (stack_word *)(stack->ptr + offset);
}

static _Noreturn void stack_panic(const char *format, uint64_t first, uint64_t second) {
    char text[128];
    snprintf(text, sizeof text, format, (unsigned long)first, (unsigned long)second);
    hl_panic(text);
}

/* The newest element of the input stack, in place. Dropping it invalidates the bytes. */
static hl_Vec input_top(void) {
    const hl_Buffer *stack = &peb->input_stack;
    uint64_t pointer = *stack_at(stack, 0);
    if (pointer < 2 * STACK_EMPTY || pointer > stack->size)
        stack_panic("Invalid stack pointer: %lu in pop_shared_input_data_into", pointer, 0);
    uint64_t element = *stack_at(stack, pointer - 8);
    if (element < STACK_EMPTY || element > pointer - 8)
        stack_panic("Invalid element offset: %lu below stack pointer %lu", element, pointer);
    return (hl_Vec){stack->ptr + element, pointer - 8 - element};
}

static void input_drop(const hl_Vec *element) {
    const hl_Buffer *stack = &peb->input_stack;
    *stack_at(stack, 0) = (uint64_t)(element->data - stack->ptr);
    memset(element->data, 0, element->len + 8);
}

static void output_push(const hl_Vec *message) {
    const hl_Buffer *stack = &peb->output_stack;
    uint64_t pointer = *stack_at(stack, 0), needed = message->len + 8;
    if (pointer < STACK_EMPTY || pointer > stack->size)
        stack_panic("Invalid stack pointer: %lu in push_shared_output_data", pointer, 0);
    if (needed > stack->size - pointer)
        stack_panic("Not enough space in shared output buffer. Required: %lu, Available: %lu", needed,
                    stack->size - pointer);
    memcpy(stack->ptr + pointer, message->data, message->len);
    *stack_at(stack, pointer + message->len) = pointer;
    *stack_at(stack, 0) = pointer + needed;
}

static void output_push_and_free(hl_Vec *message) {
    output_push(message);
    free(message);
}

/* ---- Results ----------------------------------------------------------------------------------------------- */

static hl_Vec *number_result(hl_ReturnType type, uint64_t bits) {
    hl_ParameterValue value = {.ULong = bits};
    return hl_encode_result(type, &value);
}

hl_Vec *hl_flatbuffer_result_from_Int(int32_t value) {
    return number_result(hl_ReturnType_Int, (uint32_t)value);
}

hl_Vec *hl_flatbuffer_result_from_UInt(uint32_t value) {
    return number_result(hl_ReturnType_UInt, value);
}

hl_Vec *hl_flatbuffer_result_from_Long(int64_t value) {
    return number_result(hl_ReturnType_Long, (uint64_t)value);
}

hl_Vec *hl_flatbuffer_result_from_ULong(uint64_t value) {
    return number_result(hl_ReturnType_ULong, value);
}

hl_Vec *hl_flatbuffer_result_from_FloatBits(uint32_t bits) {
    return number_result(hl_ReturnType_Float, bits);
}

hl_Vec *hl_flatbuffer_result_from_DoubleBits(uint64_t bits) {
    return number_result(hl_ReturnType_Double, bits);
}

hl_Vec *hl_flatbuffer_result_from_Bool(bool value) {
    return number_result(hl_ReturnType_Bool, value);
}

hl_Vec *hl_flatbuffer_result_from_Void(void) {
    return number_result(hl_ReturnType_Void, 0);
}

hl_Vec *hl_flatbuffer_result_from_String(const char *text) {
    char *valid = hl_valid_utf8(text);
    hl_ParameterValue value = {.String = valid != NULL ? valid : (char *)text};
    hl_Vec *result = hl_encode_result(hl_ReturnType_String, &value);
    free(valid);
    return result;
}

hl_Vec *hl_flatbuffer_result_from_Bytes(const uint8_t *data, uintptr_t len) {
    hl_ParameterValue value = {.VecBytes = {(uint8_t *)data, len}};
    return hl_encode_result(hl_ReturnType_VecBytes, &value);
}

hl_Vec *hl_flatbuffer_result_from_Error(hl_ErrorCode code, const char *message) {
    return hl_encode_error(code, message);
}

void hl_set_error(hl_ErrorCode code, const char *message) {
    output_push_and_free(hl_encode_error(code, message));
}

/* ---- Registration ------------------------------------------------------------------------------------------ */

#define BUCKET_COUNT 64u    /* a power of two */

/* One allocation: the parameter types and the name follow the struct. */
struct guest_function {
    struct guest_function *next;
    hl_Vec *(*function)(const hl_FunctionCall *);
    uintptr_t parameter_count;
    size_t name_length;
    const char *name;
    hl_ParameterType parameter_types[];
};

static struct guest_function *functions[BUCKET_COUNT];

/* Where the entry of that name hangs, or where a new one would. */
static struct guest_function **find_function(const char *name, size_t length) {
    unsigned hash = (unsigned)length * 7;
    if (length != 0)
        hash += (uint8_t)name[0] * 5u + (uint8_t)name[length / 2] * 3u + (uint8_t)name[length - 1];
    struct guest_function **link = &functions[hash % BUCKET_COUNT];
    while (*link != NULL && ((*link)->name_length != length || memcmp((*link)->name, name, length) != 0))
        link = &(*link)->next;
    return link;
}

void hl_register_function_definition(const char *name, hl_Vec *(*function)(const hl_FunctionCall *),
                                     uintptr_t param_no, const hl_ParameterType *param_types,
                                     hl_ReturnType return_type) {
    (void)return_type;    /* the host checks what it gets (abi.md 7.2) */
    size_t types_size = param_no * sizeof *param_types, length = strlen(name);
    struct guest_function *entry = malloc(sizeof *entry + types_size + length + 1);
    struct guest_function **link = find_function(name, length), *replaced = *link;
    char *own_name = (char *)entry->parameter_types + types_size;
    *entry = (struct guest_function){replaced != NULL ? replaced->next : NULL, function, param_no, length, own_name};
    memcpy(entry->parameter_types, param_types, types_size);
    memcpy(own_name, name, length + 1);
    *link = entry;
    free(replaced);
}

/* ---- Guest calls (abi.md 7.2) ------------------------------------------------------------------------------ */

static hl_Vec *error_result(hl_ErrorCode code, const char *format, ...) {
    char text[512];    /* names may be longer: the text is cut */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return hl_encode_error(code, text);
}

/* The error result for parameters that do not fit, or NULL. */
static hl_Vec *check_parameters(const hl_FunctionCall *call, const struct guest_function *entry) {
    if (call->parameters_len != entry->parameter_count)
        return error_result(hl_ErrorCode_GuestFunctionIncorrecNoOfParameters,
                            "Called function %s with %lu parameters but it takes %lu.", call->function_name,
                            call->parameters_len, entry->parameter_count);
    for (uintptr_t i = 0; i < call->parameters_len; i++)
        if (call->parameters[i].tag != entry->parameter_types[i])
            return error_result(hl_ErrorCode_GuestFunctionParameterTypeMismatch,
                                "Expected parameter type %s for parameter index %lu of function %s but got %s.",
                                hl_parameter_type_names[entry->parameter_types[i]], i, call->function_name,
                                hl_parameter_type_names[call->parameters[i].tag]);
    return NULL;
}

static hl_Vec *call_guest_function(const hl_FunctionCall *call, uint8_t call_type) {
    if (call_type != HL_CALL_TYPE_GUEST)
        return error_result(hl_ErrorCode_GuestError, "Invalid function call type: Host, should be Guest.");
    if (call->parameters_len > HL_MAX_PARAMETERS)
        return error_result(hl_ErrorCode_GuestError,
                            "Function %s has too many parameters: %lu (max allowed is %u).", call->function_name,
                            call->parameters_len, HL_MAX_PARAMETERS);
    const struct guest_function *entry = *find_function(call->function_name, strlen(call->function_name));
    hl_Vec *result;
    if (entry == NULL)
        result = c_guest_dispatch_function(call);
    else if ((result = check_parameters(call, entry)) == NULL)
        result = entry->function(call);
    return result != NULL ? result
                          : hl_encode_error(hl_ErrorCode_GuestFunctionNotFound, call->function_name);
}

/* The C library's, if the guest uses rand. */
extern void srand(unsigned seed) __attribute__((weak));

static void seed_randomness(unsigned seed) {
    if (srand != NULL)
        srand(seed);
}

/* The call is copied and popped before the function runs: the input stack is then free for host results. */
void hl_runtime_dispatch(uint64_t seed_request) {
    hl_FunctionCall call;
    hl_Parameter parameters[HL_MAX_PARAMETERS];
    uint8_t call_type;
    if (seed_request >> 32 & 1)
        seed_randomness((unsigned)seed_request);
    hl_Vec element = input_top();
    size_t size = element.len;
    uint8_t *message = memcpy(malloc(size + 1), element.data, size);
    input_drop(&element);
    hl_decode_call(message, size, &call, parameters, &call_type);
    output_push_and_free(call_guest_function(&call, call_type));
    free(message);
}

/* ---- Host calls (abi.md 7.3) ------------------------------------------------------------------------------- */

void hl_call_host_function(const hl_FunctionCall *function_call) {
    output_push_and_free(hl_encode_call(function_call, HL_CALL_TYPE_HOST));
    hl_port_out32(HL_PORT_CALL, 0);
}

static const char *error_name(hl_ErrorCode code) {
    switch (code) {
    case hl_ErrorCode_HostFunctionError: return "HostFunctionError";
    case hl_ErrorCode_GuestError: return "GuestError";
    default: return "UnknownError";
    }
}

static _Noreturn void host_value_panic(const char *what, const char *kind, const char *message) {
    char text[768];
    snprintf(text, sizeof text,
             "Unable to get host return value as %s: HyperlightGuestError { kind: %s, message: \"%s\" }", what, kind,
             message);
    hl_panic(text);
}

/* The pending host result, in place, of the given type. The caller drops the element. */
static hl_ParameterValue host_value(hl_ReturnType type, const char *what, const hl_Vec *element) {
    hl_HostResult result = hl_decode_result(element->data, element->len);
    if (result.message != NULL)
        host_value_panic(what, error_name(result.error), result.message);
    if (result.type != type)
        host_value_panic(what, "UnsupportedParameterType", "the host function returned another type");
    return result.value;
}

static uint64_t host_number(hl_ReturnType type, const char *what) {
    hl_Vec element = input_top();
    uint64_t bits = host_value(type, what, &element).ULong;
    input_drop(&element);
    return bits;
}

int32_t hl_get_host_return_value_as_Int(void) {
    return (int32_t)host_number(hl_ReturnType_Int, "int");
}

uint32_t hl_get_host_return_value_as_UInt(void) {
    return (uint32_t)host_number(hl_ReturnType_UInt, "uint");
}

int64_t hl_get_host_return_value_as_Long(void) {
    return (int64_t)host_number(hl_ReturnType_Long, "long");
}

uint64_t hl_get_host_return_value_as_ULong(void) {
    return host_number(hl_ReturnType_ULong, "ulong");
}

uint32_t hl_get_host_return_value_as_FloatBits(void) {
    return (uint32_t)host_number(hl_ReturnType_Float, "float");
}

uint64_t hl_get_host_return_value_as_DoubleBits(void) {
    return host_number(hl_ReturnType_Double, "double");
}

bool hl_get_host_return_value_as_Bool(void) {
    return host_number(hl_ReturnType_Bool, "bool");
}

const char *hl_get_host_return_value_as_String(void) {
    hl_Vec element = input_top();
    char *text = strdup(host_value(hl_ReturnType_String, "string", &element).String);
    input_drop(&element);
    return text;
}

static uint8_t *copy_bytes(const hl_Vec *bytes) {
    return memcpy(malloc(bytes->len + 1), bytes->data, bytes->len);    /* never NULL, however short */
}

hl_Vec *hl_get_host_return_value_as_VecBytes(void) {
    hl_Vec element = input_top();
    hl_Vec bytes = host_value(hl_ReturnType_VecBytes, "vecbytes", &element).VecBytes;
    hl_Vec *vec = malloc(sizeof *vec);
    *vec = (hl_Vec){copy_bytes(&bytes), bytes.len};
    input_drop(&element);
    return vec;
}

hl_HostResult hl_try_call_host_function(const hl_FunctionCall *function_call) {
    hl_call_host_function(function_call);
    hl_Vec element = input_top();
    hl_HostResult result = hl_decode_result(element.data, element.len);
    if (result.message != NULL)
        result.message = strdup(result.message);
    else if (result.type == hl_ReturnType_String)
        result.value.String = strdup(result.value.String);
    else if (result.type == hl_ReturnType_VecBytes)
        result.value.VecBytes.data = copy_bytes(&result.value.VecBytes);
    input_drop(&element);
    return result;
}

/* ---- Output: HostPrint, logs, debug print ------------------------------------------------------------------ */

#define PRINT_BUFFER_SIZE 1000u

static char print_buffer[PRINT_BUFFER_SIZE + 1];
static size_t print_length;

/* Prints the first bytes of the buffer, and moves what follows them to its start. */
static void host_print(size_t size) {
    char rest[HL_UTF8_MAX];
    size_t rest_size = print_length - size;
    memcpy(rest, print_buffer + size, rest_size);
    print_buffer[size] = '\0';
    char *valid = hl_valid_utf8(print_buffer);
    hl_Parameter text = {hl_ParameterType_String, {.String = valid != NULL ? valid : print_buffer}};
    hl_FunctionCall call = {"HostPrint", &text, 1, hl_ReturnType_Int};
    hl_call_host_function(&call);
    hl_get_host_return_value_as_Int();
    free(valid);
    memcpy(print_buffer, rest, rest_size);
    print_length = rest_size;
}

/* A full buffer leaves out a character that it holds only the beginning of. */
void _putchar(char character) {
    if (character == '\0') {
        host_print(print_length);
        return;
    }
    print_buffer[print_length++] = character;
    if (print_length == PRINT_BUFFER_SIZE)
        host_print(PRINT_BUFFER_SIZE - hl_unfinished_utf8(print_buffer, PRINT_BUFFER_SIZE));
}

void hl_log(hl_Level level, const char *message, int32_t line, const char *file) {
    static const char *const prefixes[] = {"ERROR: ", "WARN: ", "INFO: ", "DEBUG: ", "TRACE: "};
    if (level < hl_Level_Error || level > hl_Level_Trace || level > max_log_level)
        return;
    uint8_t record_level = (uint8_t)(hl_Level_Trace - level);    /* Error 4 … Trace 0 (abi.md 11.2) */
    output_push_and_free(
        hl_encode_log(record_level, prefixes[level - hl_Level_Error], message, file, (uint32_t)line));
    hl_port_out32(HL_PORT_LOG, 0);
}

void hl_debug_print(const char *text) {
    for (; *text != '\0'; text++)
        hl_port_out32(HL_PORT_DEBUG_PRINT, (uint8_t)*text);
}

void hl_out32(uint16_t port, uint32_t value) {
    hl_port_out32(port, value);
}

/* ---- Memory and exceptions: the kernel part's services ----------------------------------------------------- */

_Static_assert(sizeof(hl_ExceptionContext) == sizeof(struct hl_ExceptionFrame), "one layout, two names");

uint64_t hl_handled_vectors;
static hl_ExceptionHandler exception_handlers[HL_VECTOR_COUNT];

void hl_map_gpa(uint64_t gva, uint64_t gpa, uint64_t size, unsigned flags) {
    uint64_t pages_size = (size + HL_PAGE_SIZE - 1) & -(uint64_t)HL_PAGE_SIZE;
    if ((gva | gpa) % HL_PAGE_SIZE != 0)
        hl_panic("hl_map_gpa: an address does not begin a page");
    if (!hl_service(HL_SERVICE_MAP, gva, gpa, pages_size, flags))
        hl_panic("hl_map_gpa: these addresses belong to the kernel part");
}

bool hl_is_mapped(uint64_t gva) {
    return hl_service(HL_SERVICE_IS_MAPPED, gva, 0, 0, 0);
}

void hl_set_exception_handler(unsigned vector, hl_ExceptionHandler handler) {
    if (vector >= HL_VECTOR_COUNT)
        hl_panic("hl_set_exception_handler: no such vector");
    exception_handlers[vector] = handler;
    hl_handled_vectors &= ~(1ull << vector);
    hl_handled_vectors |= (uint64_t)(handler != NULL) << vector;
    hl_service(HL_SERVICE_VECTOR, vector, 0, 0, 0);    /* an exception has its gate already */
}

void hl_enable_interrupts(bool enable) {
    hl_service(HL_SERVICE_INTERRUPTS, enable, 0, 0, 0);
}

/* Called by the upcall in entry.S. */
bool hl_runtime_exception(unsigned vector, hl_ExceptionContext *context, uint64_t fault_address) {
    return exception_handlers[vector](context, fault_address);
}

/* ---- Initialise (abi.md 7.1) ------------------------------------------------------------------------------- */

struct hl_ThreadBlock hl_thread_block = {.self = &hl_thread_block};

/* A buffer on the stack overran: noticed by functions built with a stack protector, as the C library's are. */
_Noreturn void __stack_chk_fail(void) {
    hl_abort_with_code(hl_ErrorCode_GsCheckFailed);
}

/* musl has two names for it, and would keep it in its own thread's structure. */
int *__errno_location(void) {
    static int number;
    return &number;
}

int *___errno_location(void) __attribute__((alias("__errno_location")));

void hl_runtime_init(const void *peb_address, uint64_t seed, uint64_t page_size, uint64_t log_level) {
    (void)page_size;
    peb = peb_address;
    max_log_level = log_level;
    if (log_level > hl_Level_Trace)
        hl_panic("Invalid log level");
    hl_thread_block.canary = seed & ~0xFFull;    /* its zero byte stops string functions */
    hl_heap_init(peb->guest_heap.ptr, peb->guest_heap.size);
    seed_randomness((unsigned)((((uintptr_t)peb_address << 8) ^ (seed >> 4)) >> 32));
    hyperlight_main();
}
