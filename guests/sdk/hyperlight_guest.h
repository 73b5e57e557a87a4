/* The C API of a Hyperlight guest, release 0.14.0 (abi.md 12): what a guest written for Hyperlight includes.
 *
 *     #include "hyperlight_guest.h"
 *
 *     int32_t add(int32_t left, int32_t right) { return left + right; }
 *     HYPERLIGHT_WRAP_FUNCTION(add, Int, 2, Int, Int)
 *
 *     void hyperlight_main(void) { HYPERLIGHT_REGISTER_FUNCTION("Add", add); }
 *     hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *call) { (void)call; return NULL; }
 *
 * What this SDK offers beyond that API is in hyperlight_ext.h.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_GUEST_H
#define HYPERLIGHT_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "macro.h"

typedef enum hl_ParameterType {
    hl_ParameterType_Int = 0,
    hl_ParameterType_UInt = 1,
    hl_ParameterType_Long = 2,
    hl_ParameterType_ULong = 3,
    hl_ParameterType_Float = 4,
    hl_ParameterType_Double = 5,
    hl_ParameterType_String = 6,
    hl_ParameterType_Bool = 7,
    hl_ParameterType_VecBytes = 8,
} hl_ParameterType;

typedef enum hl_ReturnType {
    hl_ReturnType_Int = 0,
    hl_ReturnType_UInt = 1,
    hl_ReturnType_Long = 2,
    hl_ReturnType_ULong = 3,
    hl_ReturnType_Float = 4,
    hl_ReturnType_Double = 5,
    hl_ReturnType_String = 6,
    hl_ReturnType_Bool = 7,
    hl_ReturnType_Void = 8,
    hl_ReturnType_VecBytes = 9,
} hl_ReturnType;

/* The misspelt names are the API's own. */
typedef enum hl_ErrorCode {
    hl_ErrorCode_NoError = 0,
    hl_ErrorCode_UnsupportedParameterType = 2,
    hl_ErrorCode_GuestFunctionNameNotProvided = 3,
    hl_ErrorCode_GuestFunctionNotFound = 4,
    hl_ErrorCode_GuestFunctionIncorrecNoOfParameters = 5,
    hl_ErrorCode_GispatchFunctionPointerNotSet = 6,
    hl_ErrorCode_OutbError = 7,
    hl_ErrorCode_UnknownError = 8,
    hl_ErrorCode_GsCheckFailed = 10,
    hl_ErrorCode_TooManyGuestFunctions = 11,
    hl_ErrorCode_FailureInDlmalloc = 12,
    hl_ErrorCode_MallocFailed = 13,
    hl_ErrorCode_GuestFunctionParameterTypeMismatch = 14,
    hl_ErrorCode_GuestError = 15,
    hl_ErrorCode_ArrayLengthParamIsMissing = 16,
    hl_ErrorCode_HostFunctionError = 17,
} hl_ErrorCode;

enum hl_Level {
    hl_Level_Error = 1,
    hl_Level_Warn = 2,
    hl_Level_Info = 3,
    hl_Level_Debug = 4,
    hl_Level_Trace = 5,
};
typedef uintptr_t hl_Level;

typedef struct hl_Vec {
    uint8_t *data;
    uintptr_t len;
} hl_Vec;

typedef union hl_ParameterValue {
    int32_t Int;
    uint32_t UInt;
    int64_t Long;
    uint64_t ULong;
    float Float;
    double Double;
    bool Bool;
    char *String;
    hl_Vec VecBytes;
} hl_ParameterValue;

typedef struct hl_Parameter {
    hl_ParameterType tag;
    hl_ParameterValue value;
} hl_Parameter;

typedef struct hl_FunctionCall {
    const char *function_name;
    const hl_Parameter *parameters;
    uintptr_t parameters_len;
    hl_ReturnType return_type;
} hl_FunctionCall;

/* ---- What a guest defines ---------------------------------------------------------------------------------- */

/* Called once, at the end of initialise: registers the guest's functions. */
void hyperlight_main(void);

/* Called for every name that is not registered. NULL answers "no such function" (error 4). */
hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *function_call);

/* ---- Registration ------------------------------------------------------------------------------------------ */

/* Copies name and types; a later registration of the same name replaces the earlier one. The runtime checks count
 * and types before it calls function, which returns one of the results below. At most 11 parameters. */
void hl_register_function_definition(const char *name, hl_Vec *(*function)(const hl_FunctionCall *),
                                     uintptr_t param_no, const hl_ParameterType *param_types,
                                     hl_ReturnType return_type);

/* ---- Results: allocated here, owned by the runtime once returned ------------------------------------------- */

hl_Vec *hl_flatbuffer_result_from_Int(int32_t value);
hl_Vec *hl_flatbuffer_result_from_UInt(uint32_t value);
hl_Vec *hl_flatbuffer_result_from_Long(int64_t value);
hl_Vec *hl_flatbuffer_result_from_ULong(uint64_t value);
hl_Vec *hl_flatbuffer_result_from_Float(float value);
hl_Vec *hl_flatbuffer_result_from_Double(double value);
hl_Vec *hl_flatbuffer_result_from_Bool(bool value);
hl_Vec *hl_flatbuffer_result_from_Void(void);
hl_Vec *hl_flatbuffer_result_from_String(const char *value);
hl_Vec *hl_flatbuffer_result_from_Bytes(const uint8_t *data, uintptr_t len);

/* ---- Host functions ---------------------------------------------------------------------------------------- */

/* Performs the call; the arguments stay the caller's. Exactly one of the getters must follow. A getter panics
 * (abort 8) if the host function failed or returned another type. */
void hl_call_host_function(const hl_FunctionCall *function_call);

int32_t hl_get_host_return_value_as_Int(void);
uint32_t hl_get_host_return_value_as_UInt(void);
int64_t hl_get_host_return_value_as_Long(void);
uint64_t hl_get_host_return_value_as_ULong(void);
float hl_get_host_return_value_as_Float(void);
double hl_get_host_return_value_as_Double(void);
bool hl_get_host_return_value_as_Bool(void);
const char *hl_get_host_return_value_as_String(void);
hl_Vec *hl_get_host_return_value_as_VecBytes(void);

/* ---- Errors and logs --------------------------------------------------------------------------------------- */

/* Pushes an error result at once and returns. The function's own result follows it and is the one that the host
 * takes: to return an error, use hl_flatbuffer_result_from_Error of hyperlight_ext.h. */
void hl_set_error(hl_ErrorCode code, const char *message);

_Noreturn void hl_abort_with_code(int32_t code);
_Noreturn void hl_abort_with_code_and_message(int32_t code, const char *message);

/* Sends a record to the host's log if the host asked for this level. */
void hl_log(hl_Level level, const char *message, int32_t line, const char *file);

#define LOG(level, message) hl_log(level, message, __LINE__, __FILE__)

#define _alloca _alloca_wrapper

/* Appends to a line buffer; NUL or 1000 bytes send it to the host function HostPrint. */
void _putchar(char character);

#endif
