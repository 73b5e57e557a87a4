/* The smallest guest: greets whoever its first argument names, through the host's HostPrint.
 *
 *     hyperlight run hello World
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "hyperlight_guest.h"
#include "libc.h"
#include "printf.h"

static int32_t greet(const char *name) {
    printf("Hello, %s!\n", name);
    return 0;
}

void hyperlight_main(void) {}

/* A registered function takes a fixed number of parameters. `hyperlight run` calls Main with as many strings as
 * the user typed, so Main is answered here, where every call arrives that nobody registered for. */
hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *call) {
    if (strcmp(call->function_name, "Main") != 0)
        return NULL;
    bool named = call->parameters_len > 0 && call->parameters[0].tag == hl_ParameterType_String;
    return hl_flatbuffer_result_from_Int(greet(named ? call->parameters[0].value.String : "World"));
}
