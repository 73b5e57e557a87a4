/* The test guest, first part: parameters and results of every type, state, memory, output, host functions.
 *
 * Names follow Hyperlight's own test guests where those have the function. Floats pass through as bits, so that
 * these functions also run on a KVM that emulates CPL 0 and refuses SSE.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "simpleguest.h"

/* ---- Every type, in and out -------------------------------------------------------------------------------- */

static const char *echo(const char *text) { return text; }
static int32_t echo_int(int32_t value) { return value; }
static uint32_t echo_uint(uint32_t value) { return value; }
static int64_t echo_long(int64_t value) { return value; }
static uint64_t echo_ulong(uint64_t value) { return value; }
static bool echo_bool(bool value) { return value; }

HYPERLIGHT_WRAP_FUNCTION(echo, String, 1, String)
HYPERLIGHT_WRAP_FUNCTION(echo_int, Int, 1, Int)
HYPERLIGHT_WRAP_FUNCTION(echo_uint, UInt, 1, UInt)
HYPERLIGHT_WRAP_FUNCTION(echo_long, Long, 1, Long)
HYPERLIGHT_WRAP_FUNCTION(echo_ulong, ULong, 1, ULong)
HYPERLIGHT_WRAP_FUNCTION(echo_bool, Bool, 1, Bool)

static hl_Vec *echo_float(const hl_FunctionCall *call) {
    return hl_flatbuffer_result_from_FloatBits(ARGUMENT(0, UInt));
}

static hl_Vec *echo_double(const hl_FunctionCall *call) {
    return hl_flatbuffer_result_from_DoubleBits(ARGUMENT(0, ULong));
}

static hl_Vec *bytes_result(hl_Vec bytes) {
    return hl_flatbuffer_result_from_Bytes(bytes.data, bytes.len);
}

static hl_Vec *echo_bytes(const hl_FunctionCall *call) {
    return bytes_result(ARGUMENT(0, VecBytes));
}

static hl_Vec *set_byte_array_to_zero(const hl_FunctionCall *call) {
    hl_Vec bytes = ARGUMENT(0, VecBytes);
    memset(bytes.data, 0, bytes.len);
    return bytes_result(bytes);
}

static hl_Vec *return_void(const hl_FunctionCall *call) {
    (void)call;
    return hl_flatbuffer_result_from_Void();
}

static hl_Vec *all_types(const hl_FunctionCall *call) {
    char single[32], precise[32], text[512];
    hl_Vec bytes = ARGUMENT(8, VecBytes);
    hl_format_double(single, sizeof single, "%g", hl_double_bits(ARGUMENT(4, UInt)));
    hl_format_double(precise, sizeof precise, "%.17g", ARGUMENT(5, ULong));
    int length = snprintf(text, sizeof text,
                          "Int:%d UInt:%u Long:%ld ULong:%lu Float:%s Double:%s String:%s Bool:%s VecBytes:",
                          ARGUMENT(0, Int), ARGUMENT(1, UInt), ARGUMENT(2, Long), ARGUMENT(3, ULong), single,
                          precise, ARGUMENT(6, String), ARGUMENT(7, Bool) ? "true" : "false");
    for (uintptr_t i = 0; i < bytes.len && length + 2 < (int)sizeof text; i++)
        length += snprintf(text + length, sizeof text - (size_t)length, "%02x", bytes.data[i]);
    return hl_flatbuffer_result_from_String(text);
}

/* A fixed amount of data each way, for benchmarks. */
static hl_Vec *in_24k_out_8k(const hl_FunctionCall *call) {
    hl_Vec bytes = ARGUMENT(0, VecBytes);
    return hl_flatbuffer_result_from_Bytes(bytes.data, bytes.len < 8192 ? bytes.len : 8192);
}

static void register_types(void) {
    HYPERLIGHT_REGISTER_FUNCTION("Echo", echo);
    HYPERLIGHT_REGISTER_FUNCTION("EchoInt", echo_int);
    HYPERLIGHT_REGISTER_FUNCTION("EchoUInt", echo_uint);
    HYPERLIGHT_REGISTER_FUNCTION("EchoLong", echo_long);
    HYPERLIGHT_REGISTER_FUNCTION("EchoULong", echo_ulong);
    HYPERLIGHT_REGISTER_FUNCTION("EchoBool", echo_bool);
    REGISTER_RAW("EchoFloat", echo_float, Float, FLOAT);
    REGISTER_RAW("EchoDouble", echo_double, Double, DOUBLE);
    REGISTER_RAW("EchoBytes", echo_bytes, VecBytes, BYTES);
    REGISTER_RAW("GetSizePrefixedBuffer", echo_bytes, VecBytes, BYTES);
    REGISTER_RAW("SetByteArrayToZero", set_byte_array_to_zero, VecBytes, BYTES);
    REGISTER_RAW("ReturnVoid", return_void, Void);
    REGISTER_RAW("AllTypes", all_types, String, INT, UINT, LONG, ULONG, FLOAT, DOUBLE, STRING, BOOL, BYTES);
    REGISTER_RAW("LargeParameters", return_void, Void, BYTES, STRING);
    REGISTER_RAW("24K_in_8K_out", in_24k_out_8k, VecBytes, BYTES);
}

/* ---- Output ------------------------------------------------------------------------------------------------ */

static int32_t print_output(const char *text) {
    return printf("%s", text);
}

HYPERLIGHT_WRAP_FUNCTION(print_output, Int, 1, String)

/* Appends " argN:<value>" in the form that the tests expect. */
static int format_argument(char *text, size_t size, uintptr_t index, const hl_Parameter *parameter) {
    const hl_ParameterValue *value = &parameter->value;
    char number[32] = "";
    switch (parameter->tag) {
    case INT: snprintf(number, sizeof number, "%d", value->Int); break;
    case UINT: snprintf(number, sizeof number, "%u", value->UInt); break;
    case LONG: snprintf(number, sizeof number, "%ld", value->Long); break;
    case ULONG: snprintf(number, sizeof number, "%lu", value->ULong); break;
    case BOOL: snprintf(number, sizeof number, "%s", value->Bool ? "true" : "false"); break;
    case FLOAT: hl_format_double(number, sizeof number, "%.3f", hl_double_bits(value->UInt)); break;
    default: return snprintf(text, size, " arg%lu:%s", index + 1, value->String);
    }
    return snprintf(text, size, " arg%lu:%s", index + 1, number);
}

static hl_Vec *print_arguments(const hl_FunctionCall *call) {
    char text[768] = "Message:";
    size_t length = strlen(text);
    for (uintptr_t i = 0; i < call->parameters_len && length < sizeof text; i++)
        length += (size_t)format_argument(text + length, sizeof text - length, i, &call->parameters[i]);
    return hl_flatbuffer_result_from_Int(printf("%s.", text));
}

/* One value by one printf conversion, such as "%-8.3e" or "%+ld". */
static hl_Vec *format_double(const hl_FunctionCall *call) {
    char text[512];
    hl_format_double(text, sizeof text, ARGUMENT(0, String), ARGUMENT(1, ULong));
    return hl_flatbuffer_result_from_String(text);
}

static hl_Vec *format_long(const hl_FunctionCall *call) {
    char text[128];
    snprintf(text, sizeof text, ARGUMENT(0, String), ARGUMENT(1, Long));
    return hl_flatbuffer_result_from_String(text);
}

static int32_t log_message(const char *text, int32_t level) {
    LOG((hl_Level)level, text);
    return 0;
}

static int32_t log_every_level(const char *text) {
    for (hl_Level level = hl_Level_Error; level <= hl_Level_Trace; level++)
        LOG(level, text);
    return 0;
}

static int32_t debug_print(const char *text) {
    hl_debug_print(text);
    return 0;
}

HYPERLIGHT_WRAP_FUNCTION(log_message, Int, 2, String, Int)
HYPERLIGHT_WRAP_FUNCTION(log_every_level, Int, 1, String)
HYPERLIGHT_WRAP_FUNCTION(debug_print, Int, 1, String)

static void register_output(void) {
    static const char *const names[] = {"PrintTwoArgs",   "PrintThreeArgs", "PrintFourArgs", "PrintFiveArgs",
                                        "PrintSixArgs",   "PrintSevenArgs", "PrintEightArgs", "PrintNineArgs",
                                        "PrintTenArgs",   "PrintElevenArgs"};
    static const hl_ParameterType types[] = {STRING, INT, LONG, STRING, STRING, BOOL, BOOL, UINT, ULONG, INT, FLOAT};
    for (uintptr_t i = 0; i < sizeof names / sizeof *names; i++)
        hl_register_function_definition(names[i], print_arguments, i + 2, types, hl_ReturnType_Int);
    REGISTER_RAW("FormatDouble", format_double, String, STRING, DOUBLE);
    REGISTER_RAW("FormatLong", format_long, String, STRING, LONG);
    HYPERLIGHT_REGISTER_FUNCTION("PrintOutput", print_output);
    HYPERLIGHT_REGISTER_FUNCTION("PrintUsingPrintf", print_output);
    HYPERLIGHT_REGISTER_FUNCTION("LogMessage", log_message);
    HYPERLIGHT_REGISTER_FUNCTION("LogEveryLevel", log_every_level);
    HYPERLIGHT_REGISTER_FUNCTION("DebugPrint", debug_print);
}

/* ---- State and memory -------------------------------------------------------------------------------------- */

static int32_t counter;

static int32_t get_static(void) { return counter; }
static int32_t set_static(int32_t value) { return counter = value; }
static int32_t add_to_static(int32_t value) { return counter += value; }

HYPERLIGHT_WRAP_FUNCTION(get_static, Int, 0)
HYPERLIGHT_WRAP_FUNCTION(set_static, Int, 1, Int)
HYPERLIGHT_WRAP_FUNCTION(add_to_static, Int, 1, Int)

/* Writes the whole block, so that it really is there, and leaks it. */
static int32_t call_malloc(int32_t size) {
    char *block = malloc((size_t)size);
    TOUCH(block);
    memset(block, 0xA5, (size_t)size);
    TOUCH(block);
    return size;
}

static int32_t malloc_and_free(int32_t size) {
    char *block = malloc((size_t)size);
    TOUCH(block);
    free(block);
    return size;
}

static int32_t small_variable(void) {
    char variable[1024];
    TOUCH(variable);
    return sizeof variable;
}

static int32_t stack_allocate(int32_t size) {
    char *block = __builtin_alloca((size_t)size);
    block[0] = 1;
    TOUCH(block);
    return size;
}

/* Levels of recursion, half a kilobyte each. */
static int32_t stack_recurse(int32_t levels) {
    char variable[512];
    TOUCH(variable);
    return levels <= 0 ? 0 : 1 + stack_recurse(levels - 1);
}

HYPERLIGHT_WRAP_FUNCTION(call_malloc, Int, 1, Int)
HYPERLIGHT_WRAP_FUNCTION(malloc_and_free, Int, 1, Int)
HYPERLIGHT_WRAP_FUNCTION(small_variable, Int, 0)
HYPERLIGHT_WRAP_FUNCTION(stack_allocate, Int, 1, Int)
HYPERLIGHT_WRAP_FUNCTION(stack_recurse, Int, 1, Int)

static hl_Vec *read_init_data(const hl_FunctionCall *call) {
    (void)call;
    return hl_flatbuffer_result_from_Bytes(hl_peb()->init_data.ptr, hl_peb()->init_data.size);
}

static void register_state(void) {
    HYPERLIGHT_REGISTER_FUNCTION("GetStatic", get_static);
    HYPERLIGHT_REGISTER_FUNCTION("SetStatic", set_static);
    HYPERLIGHT_REGISTER_FUNCTION("AddToStatic", add_to_static);
    HYPERLIGHT_REGISTER_FUNCTION("CallMalloc", call_malloc);
    HYPERLIGHT_REGISTER_FUNCTION("MallocAndFree", malloc_and_free);
    HYPERLIGHT_REGISTER_FUNCTION("SmallVar", small_variable);
    HYPERLIGHT_REGISTER_FUNCTION("StackAllocate", stack_allocate);
    HYPERLIGHT_REGISTER_FUNCTION("StackRecurse", stack_recurse);
    REGISTER_RAW("ReadInitData", read_init_data, VecBytes);
}

/* ---- Host functions ---------------------------------------------------------------------------------------- */

static void call_host(const char *name, const hl_Parameter *parameters, uintptr_t count, hl_ReturnType type) {
    hl_FunctionCall call = {name, parameters, count, type};
    hl_call_host_function(&call);
}

static void call_host_without_parameters(const char *name, hl_ReturnType type) {
    hl_Parameter none = {0};
    call_host(name, &none, 0, type);
}

static int32_t add(int32_t left, int32_t right) {
    hl_Parameter parameters[] = {{INT, {.Int = left}}, {INT, {.Int = right}}};
    call_host("HostAdd", parameters, 2, hl_ReturnType_Int);
    return hl_get_host_return_value_as_Int();
}

static int32_t call_host_method(char *name, char *text) {
    hl_Parameter parameter = {STRING, {.String = text}};
    call_host(name, &parameter, 1, hl_ReturnType_Int);
    return hl_get_host_return_value_as_Int();
}

/* Calls a host function of so many Int parameters: 1, 2, 3, ... */
static int32_t call_host_with_ints(char *name, int32_t count) {
    hl_Parameter parameters[32];
    for (int32_t i = 0; i < count && i < 32; i++)
        parameters[i] = (hl_Parameter){INT, {.Int = i + 1}};
    call_host(name, parameters, (uintptr_t)count, hl_ReturnType_Int);
    return hl_get_host_return_value_as_Int();
}

HYPERLIGHT_WRAP_FUNCTION(add, Int, 2, Int, Int)
HYPERLIGHT_WRAP_FUNCTION(call_host_method, Int, 2, String, String)
HYPERLIGHT_WRAP_FUNCTION(call_host_with_ints, Int, 2, String, Int)

/* Passes this call's parameters on to a host function and its result back, whatever the types. */
static hl_Vec *forward(const hl_FunctionCall *call, const char *name, hl_ReturnType type) {
    call_host(name, call->parameters, call->parameters_len, type);
    switch (type) {
    case hl_ReturnType_Bool: return hl_flatbuffer_result_from_Bool(hl_get_host_return_value_as_Bool());
    case hl_ReturnType_Float: return hl_flatbuffer_result_from_FloatBits(hl_get_host_return_value_as_FloatBits());
    case hl_ReturnType_Double: return hl_flatbuffer_result_from_DoubleBits(hl_get_host_return_value_as_DoubleBits());
    default: return hl_flatbuffer_result_from_String(hl_get_host_return_value_as_String());
    }
}

#define FORWARD(function, name, Type)                                                                \
    static hl_Vec *function(const hl_FunctionCall *call) { return forward(call, name, hl_ReturnType_##Type); }
FORWARD(retrieve_bool, "HostBool", Bool)
FORWARD(retrieve_float, "HostAddFloat", Float)
FORWARD(retrieve_double, "HostAddDouble", Double)
FORWARD(retrieve_string, "HostAddStrings", String)
FORWARD(host_all_types, "HostAllTypes", String)

/* One function per return type: calls the host function named, without parameters, and returns what it returned. */
#define PARAMLESS(function, Type)                                                                    \
    static hl_Vec *function(const hl_FunctionCall *call) {                                           \
        call_host_without_parameters(ARGUMENT(0, String), hl_ReturnType_##Type);                     \
        return hl_flatbuffer_result_from_##Type(hl_get_host_return_value_as_##Type());               \
    }
PARAMLESS(paramless_int, Int)
PARAMLESS(paramless_uint, UInt)
PARAMLESS(paramless_long, Long)
PARAMLESS(paramless_ulong, ULong)
PARAMLESS(paramless_bool, Bool)
PARAMLESS(paramless_string, String)

static hl_Vec *paramless_float(const hl_FunctionCall *call) {
    call_host_without_parameters(ARGUMENT(0, String), hl_ReturnType_Float);
    return hl_flatbuffer_result_from_FloatBits(hl_get_host_return_value_as_FloatBits());
}

static hl_Vec *paramless_double(const hl_FunctionCall *call) {
    call_host_without_parameters(ARGUMENT(0, String), hl_ReturnType_Double);
    return hl_flatbuffer_result_from_DoubleBits(hl_get_host_return_value_as_DoubleBits());
}

static hl_Vec *paramless_bytes(const hl_FunctionCall *call) {
    call_host_without_parameters(ARGUMENT(0, String), hl_ReturnType_VecBytes);
    return bytes_result(*hl_get_host_return_value_as_VecBytes());
}

static hl_HostResult try_host(const char *name, hl_ReturnType type) {
    hl_Parameter none = {0};
    hl_FunctionCall call = {name, &none, 0, type};
    return hl_try_call_host_function(&call);
}

static hl_Vec *paramless_void(const hl_FunctionCall *call) {
    hl_HostResult result = try_host(ARGUMENT(0, String), hl_ReturnType_Void);
    return result.message != NULL ? hl_flatbuffer_result_from_Error(result.error, result.message)
                                  : hl_flatbuffer_result_from_Void();
}

/* The message of a host function that fails, or an empty string. */
static hl_Vec *call_host_expect_error(const hl_FunctionCall *call) {
    hl_HostResult result = try_host(ARGUMENT(0, String), hl_ReturnType_Int);
    return hl_flatbuffer_result_from_String(result.message != NULL ? result.message : "");
}

/* A host function that fails is this function's own error, and no abort. */
static hl_Vec *try_call_host(const hl_FunctionCall *call) {
    hl_HostResult result = try_host(ARGUMENT(0, String), hl_ReturnType_Int);
    if (result.message == NULL)
        return hl_flatbuffer_result_from_Int(result.value.Int);
    hl_Vec *error = hl_flatbuffer_result_from_Error(result.error, result.message);
    free(result.message);
    return error;
}

static _Noreturn hl_Vec *host_call_loop(const hl_FunctionCall *call) {
    for (;;)
        try_host(ARGUMENT(0, String), hl_ReturnType_Int);
}

static int32_t host_call_repeat(char *name, int32_t count) {
    int32_t sum = 0;
    for (int32_t i = 0; i < count; i++) {
        call_host_without_parameters(name, hl_ReturnType_Int);
        sum += hl_get_host_return_value_as_Int();
    }
    return sum;
}

HYPERLIGHT_WRAP_FUNCTION(host_call_repeat, Int, 2, String, Int)

static void register_paramless(void) {
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsI32", paramless_int, Int, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsU32", paramless_uint, UInt, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsI64", paramless_long, Long, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsU64", paramless_ulong, ULong, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsF32", paramless_float, Float, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsF64", paramless_double, Double, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsString", paramless_string, String, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsBool", paramless_bool, Bool, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsBytes", paramless_bytes, VecBytes, STRING);
    REGISTER_RAW("CallGivenParamlessHostFuncThatReturnsVoid", paramless_void, Void, STRING);
}

static void register_host_callers(void) {
    HYPERLIGHT_REGISTER_FUNCTION("Add", add);
    HYPERLIGHT_REGISTER_FUNCTION("CallHostMethod", call_host_method);
    HYPERLIGHT_REGISTER_FUNCTION("CallHostWithInts", call_host_with_ints);
    HYPERLIGHT_REGISTER_FUNCTION("HostCallRepeat", host_call_repeat);
    REGISTER_RAW("GuestRetrievesBoolValue", retrieve_bool, Bool, INT, INT);
    REGISTER_RAW("GuestRetrievesFloatValue", retrieve_float, Float, FLOAT, FLOAT);
    REGISTER_RAW("GuestRetrievesDoubleValue", retrieve_double, Double, DOUBLE, DOUBLE);
    REGISTER_RAW("GuestRetrievesStringValue", retrieve_string, String, STRING);
    REGISTER_RAW("CallHostAllTypes", host_all_types, String, INT, UINT, LONG, ULONG, FLOAT, DOUBLE, STRING, BOOL,
                 BYTES);
    REGISTER_RAW("CallHostExpectError", call_host_expect_error, String, STRING);
    REGISTER_RAW("TryCallHost", try_call_host, Int, STRING);
    REGISTER_RAW("HostCallLoop", host_call_loop, Void, STRING);
}

/* ---- The guest's two entry points -------------------------------------------------------------------------- */

void hyperlight_main(void) {
    register_types();
    register_output();
    register_state();
    register_paramless();
    register_host_callers();
    register_failures();
    register_machine();
    register_floats();
}

/* Answers one name that is deliberately not registered. */
hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *call) {
    if (strcmp(call->function_name, "ThisIsNotARealFunctionButTheNameIsImportant") != 0)
        return NULL;
    return hl_flatbuffer_result_from_Int(99);
}
