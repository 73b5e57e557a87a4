/* Wrapping and registering guest functions (abi.md 12.5).
 *
 *     HYPERLIGHT_WRAP_FUNCTION(add, Int, 2, Int, Int)      at file scope
 *     HYPERLIGHT_REGISTER_FUNCTION("Add", add);            in hyperlight_main
 *
 * Types are the variant names of hl_ReturnType (not Void, not VecBytes) and hl_ParameterType.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef HYPERLIGHT_GUEST_MACRO_H
#define HYPERLIGHT_GUEST_MACRO_H

#include "hyperlight_guest.h"

#define HYPERLIGHT_WRAP_FUNCTION(function, Ret, n, ...)                                                    \
    hl_Vec *_call_##function(const hl_FunctionCall *function_call) {                                       \
        (void)function_call;                                                                               \
        return hl_flatbuffer_result_from_##Ret(function(HL_ARGUMENTS_##n(__VA_ARGS__)));                   \
    }                                                                                                      \
    uintptr_t _##function##_parameter_count = n;                                                           \
    hl_ReturnType _##function##_return_type = hl_ReturnType_##Ret;                                         \
    hl_ParameterType _##function##_parameter_types[] = {HL_TYPES_##n(__VA_ARGS__)};

#define HYPERLIGHT_REGISTER_FUNCTION(name, function)                                                       \
    hl_register_function_definition(name, &_call_##function, _##function##_parameter_count,                \
                                    _##function##_parameter_types, _##function##_return_type)

#define HL_ARGUMENT(index, Type) function_call->parameters[index].value.Type
#define HL_ARGUMENTS_0(...)
#define HL_ARGUMENTS_1(A) HL_ARGUMENT(0, A)
#define HL_ARGUMENTS_2(A, B) HL_ARGUMENTS_1(A), HL_ARGUMENT(1, B)
#define HL_ARGUMENTS_3(A, B, C) HL_ARGUMENTS_2(A, B), HL_ARGUMENT(2, C)
#define HL_ARGUMENTS_4(A, B, C, D) HL_ARGUMENTS_3(A, B, C), HL_ARGUMENT(3, D)
#define HL_ARGUMENTS_5(A, B, C, D, E) HL_ARGUMENTS_4(A, B, C, D), HL_ARGUMENT(4, E)
#define HL_ARGUMENTS_6(A, B, C, D, E, F) HL_ARGUMENTS_5(A, B, C, D, E), HL_ARGUMENT(5, F)
#define HL_ARGUMENTS_7(A, B, C, D, E, F, G) HL_ARGUMENTS_6(A, B, C, D, E, F), HL_ARGUMENT(6, G)
#define HL_ARGUMENTS_8(A, B, C, D, E, F, G, H) HL_ARGUMENTS_7(A, B, C, D, E, F, G), HL_ARGUMENT(7, H)
#define HL_ARGUMENTS_9(A, B, C, D, E, F, G, H, I) HL_ARGUMENTS_8(A, B, C, D, E, F, G, H), HL_ARGUMENT(8, I)
#define HL_ARGUMENTS_10(A, B, C, D, E, F, G, H, I, J) HL_ARGUMENTS_9(A, B, C, D, E, F, G, H, I), HL_ARGUMENT(9, J)
#define HL_ARGUMENTS_11(A, B, C, D, E, F, G, H, I, J, K) \
    HL_ARGUMENTS_10(A, B, C, D, E, F, G, H, I, J), HL_ARGUMENT(10, K)

#define HL_TYPES_0(...) (hl_ParameterType)0
#define HL_TYPES_1(A) hl_ParameterType_##A
#define HL_TYPES_2(A, B) HL_TYPES_1(A), hl_ParameterType_##B
#define HL_TYPES_3(A, B, C) HL_TYPES_2(A, B), hl_ParameterType_##C
#define HL_TYPES_4(A, B, C, D) HL_TYPES_3(A, B, C), hl_ParameterType_##D
#define HL_TYPES_5(A, B, C, D, E) HL_TYPES_4(A, B, C, D), hl_ParameterType_##E
#define HL_TYPES_6(A, B, C, D, E, F) HL_TYPES_5(A, B, C, D, E), hl_ParameterType_##F
#define HL_TYPES_7(A, B, C, D, E, F, G) HL_TYPES_6(A, B, C, D, E, F), hl_ParameterType_##G
#define HL_TYPES_8(A, B, C, D, E, F, G, H) HL_TYPES_7(A, B, C, D, E, F, G), hl_ParameterType_##H
#define HL_TYPES_9(A, B, C, D, E, F, G, H, I) HL_TYPES_8(A, B, C, D, E, F, G, H), hl_ParameterType_##I
#define HL_TYPES_10(A, B, C, D, E, F, G, H, I, J) HL_TYPES_9(A, B, C, D, E, F, G, H, I), hl_ParameterType_##J
#define HL_TYPES_11(A, B, C, D, E, F, G, H, I, J, K) HL_TYPES_10(A, B, C, D, E, F, G, H, I, J), hl_ParameterType_##K

#endif
