/* The test guest, fourth part: real floating-point work, in SSE registers.
 *
 * On a KVM that emulates CPL 0 these end in an error, as they should.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "simpleguest.h"
#include "simpleguest_compute.h"

static float add_floats(float left, float right) { return left + right; }
static double add_doubles(double left, double right) { return left + right; }

HYPERLIGHT_WRAP_FUNCTION(add_floats, Float, 2, Float, Float)
HYPERLIGHT_WRAP_FUNCTION(add_doubles, Double, 2, Double, Double)

/* A benchmark with a known answer: the trace of a whole product of two matrices. */
static double matrix_product_trace(int32_t size) { return matrix_product((size_t)size); }

HYPERLIGHT_WRAP_FUNCTION(matrix_product_trace, Double, 1, Int)

/* A printf with doubles in the variable arguments. */
static int32_t print_double(double value) {
    return printf("%f %e %g", value, value, value);
}

HYPERLIGHT_WRAP_FUNCTION(print_double, Int, 1, Double)

/* Puts 1.2 into XMM1, for a debugger to look at before and after. */
__attribute__((noinline)) int32_t use_sse(void) {
    float value = 1.2f;
    __asm__ volatile("xorps %%xmm1, %%xmm1\n\tmovss %0, %%xmm1" : : "m"(value) : "xmm1");
    return 0;
}

HYPERLIGHT_WRAP_FUNCTION(use_sse, Int, 0)

/* XMM0 as the call finds it: zero, because the host resets the registers before every call. */
static hl_Vec *read_xmm0(const hl_FunctionCall *call) {
    (void)call;
    uint64_t xmm0[2];
    __asm__ volatile("movups %%xmm0, %0" : "=m"(xmm0));
    return hl_flatbuffer_result_from_ULong(xmm0[0] | xmm0[1]);
}

/* Fills every XMM register with ones. */
static hl_Vec *dirty_xmm(const hl_FunctionCall *call) {
    (void)call;
    uint64_t ones[2] = {UINT64_MAX, UINT64_MAX};
    __asm__ volatile("movups %0, %%xmm0\n\t"
                     "movaps %%xmm0, %%xmm1\n\tmovaps %%xmm0, %%xmm2\n\tmovaps %%xmm0, %%xmm3\n\t"
                     "movaps %%xmm0, %%xmm4\n\tmovaps %%xmm0, %%xmm5\n\tmovaps %%xmm0, %%xmm6\n\t"
                     "movaps %%xmm0, %%xmm7\n\tmovaps %%xmm0, %%xmm8\n\tmovaps %%xmm0, %%xmm9\n\t"
                     "movaps %%xmm0, %%xmm10\n\tmovaps %%xmm0, %%xmm11\n\tmovaps %%xmm0, %%xmm12\n\t"
                     "movaps %%xmm0, %%xmm13\n\tmovaps %%xmm0, %%xmm14\n\tmovaps %%xmm0, %%xmm15\n\t"
                     : : "m"(ones));
    return hl_flatbuffer_result_from_Void();
}

void register_floats(void) {
    HYPERLIGHT_REGISTER_FUNCTION("AddFloats", add_floats);
    HYPERLIGHT_REGISTER_FUNCTION("AddDoubles", add_doubles);
    HYPERLIGHT_REGISTER_FUNCTION("MatrixProductTrace", matrix_product_trace);
    HYPERLIGHT_REGISTER_FUNCTION("PrintDouble", print_double);
    HYPERLIGHT_REGISTER_FUNCTION("UseSse", use_sse);
    REGISTER_RAW("ReadXmm0", read_xmm0, ULong);
    REGISTER_RAW("DirtyXmm", dirty_xmm, Void);
}
