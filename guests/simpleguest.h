/* What the parts of simpleguest share.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef SIMPLEGUEST_H
#define SIMPLEGUEST_H

#include "hyperlight_ext.h"
#include "libc.h"
#include "printf.h"

/* A parameter of a function that takes its call as it came. */
#define ARGUMENT(index, Type) (call->parameters[index].value.Type)

/* Registers such a function: name, C function, return type, parameter types. */
#define REGISTER_RAW(name, function, Ret, ...)                                                                  \
    do {                                                                                                        \
        static const hl_ParameterType types[] = {__VA_ARGS__};                                                  \
        hl_register_function_definition(name, function, sizeof types / sizeof *types, types, hl_ReturnType_##Ret); \
    } while (0)

/* Keeps a pointer alive and the memory behind it written, whatever the optimiser thinks of it. */
#define TOUCH(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

#define INT hl_ParameterType_Int
#define UINT hl_ParameterType_UInt
#define LONG hl_ParameterType_Long
#define ULONG hl_ParameterType_ULong
#define FLOAT hl_ParameterType_Float
#define DOUBLE hl_ParameterType_Double
#define STRING hl_ParameterType_String
#define BOOL hl_ParameterType_Bool
#define BYTES hl_ParameterType_VecBytes

void register_failures(void);
void register_machine(void);
void register_floats(void);

#endif
