/* A guest with more static memory than the default scratch: every page written becomes a page of scratch.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "hyperlight_guest.h"
#include "libc.h"

static uint8_t array[1024 * 1024];

/* Writes all of the array. Needs a scratch of 16 MiB or so; with the default one it ends in code 13. */
static int32_t set_static(void) {
    memset(array, 1, sizeof array);
    return sizeof array;
}

HYPERLIGHT_WRAP_FUNCTION(set_static, Int, 0)

void hyperlight_main(void) {
    HYPERLIGHT_REGISTER_FUNCTION("SetStatic", set_static);
}

hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *call) {
    (void)call;
    return NULL;
}
