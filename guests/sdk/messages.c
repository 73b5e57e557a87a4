/* FlatBuffers by hand: the messages between guest and host (abi.md 10).
 *
 * The reader checks every offset before it follows it. The writer reproduces the reference's bytes: objects are
 * written from the end of the message to its start, in the order of abi.md 10.10.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "libc.h"
#include "runtime.h"

typedef uint16_t __attribute__((may_alias, aligned(1))) wire16;
typedef uint32_t __attribute__((may_alias, aligned(1))) wire32;
typedef uint64_t __attribute__((may_alias, aligned(1))) wire64;
typedef unsigned __int128 __attribute__((may_alias, aligned(1))) wire128;

/* ParameterValue and ReturnValue unions count from 1: 0 means "none". */
#define UNION_OF(enumerator) ((uint8_t)((enumerator) + 1))

#define RESULT_VALUE 1
#define RESULT_ERROR 2

const char *const hl_parameter_type_names[] = {"Int",    "UInt",   "Long", "ULong",   "Float",
                                               "Double", "String", "Bool", "VecBytes"};

/* ---- Reader ------------------------------------------------------------------------------------------------ */

struct reader {
    const uint8_t *bytes;
    uint32_t size;
    const char *type;     /* what the message should be, for the panic */
};

struct table {
    uint32_t at;
    uint32_t size;
    uint32_t vtable;
    uint32_t vtable_size;
};

static inline void require(const struct reader *reader, bool condition) {
    if (__builtin_expect(!condition, false))
        hl_panic(reader->type);
}

static struct reader open_message(const uint8_t *bytes, size_t size, const char *type) {
    struct reader reader = {bytes, size > UINT32_MAX / 2 ? UINT32_MAX / 2 : (uint32_t)size, type};
    return reader;
}

static uint32_t read32(const struct reader *reader, uint32_t at) {
    require(reader, at % 4 == 0 && at < reader->size && reader->size - at >= 4);
    return *(const wire32 *)(reader->bytes + at);
}

/* Follows the offset stored at a position. Offsets point forward, so chains of them end. */
static uint32_t follow(const struct reader *reader, uint32_t at) {
    uint32_t offset = read32(reader, at);
    require(reader, offset != 0 && offset < reader->size - at);
    return at + offset;
}

static struct table open_table(const struct reader *reader, uint32_t at) {
    uint32_t vtable = at - read32(reader, at);    /* modulo 2^32: the distance is signed */
    require(reader, vtable % 2 == 0 && vtable < reader->size && reader->size - vtable >= 4);
    uint32_t vtable_size = *(const wire16 *)(reader->bytes + vtable);
    uint32_t table_size = *(const wire16 *)(reader->bytes + vtable + 2);
    require(reader, vtable_size >= 4 && vtable_size % 2 == 0 && vtable_size <= reader->size - vtable);
    require(reader, table_size >= 4 && table_size <= reader->size - at);
    return (struct table){at, table_size, vtable, vtable_size};
}

/* The position of a field of the given size, or 0 if the table does not have it. */
static uint32_t field(const struct reader *reader, const struct table *table, unsigned slot, uint32_t size) {
    uint32_t entry = 4 + 2 * slot;
    if (entry + 2 > table->vtable_size)
        return 0;
    uint32_t offset = *(const wire16 *)(reader->bytes + table->vtable + entry);
    if (offset == 0)
        return 0;
    require(reader, offset >= 4 && offset + size <= table->size && (table->at + offset) % size == 0);
    return table->at + offset;
}

static uint8_t field8(const struct reader *reader, const struct table *table, unsigned slot) {
    uint32_t at = field(reader, table, slot, 1);
    return at != 0 ? reader->bytes[at] : 0;
}

static uint32_t required_offset(const struct reader *reader, const struct table *table, unsigned slot) {
    uint32_t at = field(reader, table, slot, 4);
    require(reader, at != 0);
    return follow(reader, at);
}

/* A vector of bytes, or an absent one. */
static hl_Vec read_bytes(const struct reader *reader, const struct table *table, unsigned slot) {
    uint32_t at = field(reader, table, slot, 4);
    if (at == 0)
        return (hl_Vec){NULL, 0};
    at = follow(reader, at);
    uint32_t length = read32(reader, at);
    require(reader, length <= reader->size - at - 4);
    return (hl_Vec){(uint8_t *)reader->bytes + at + 4, length};
}

static char *read_string(const struct reader *reader, const struct table *table, unsigned slot) {
    hl_Vec bytes = read_bytes(reader, table, slot);
    if (bytes.data == NULL)
        return (char *)"";
    require(reader, bytes.data + bytes.len < reader->bytes + reader->size && bytes.data[bytes.len] == '\0');
    return (char *)bytes.data;
}

/* The number in slot 0 of a value table, zero-extended from its own width. Floats travel as their bits. */
static uint64_t read_number(const struct reader *reader, const struct table *table, hl_ParameterType type) {
    static const uint8_t sizes[] = {4, 4, 8, 8, 4, 8, 0, 1};
    uint32_t at = field(reader, table, 0, sizes[type]);
    if (at == 0)
        return 0;
    const uint8_t *value = reader->bytes + at;
    return sizes[type] == 8 ? *(const wire64 *)value : sizes[type] == 4 ? *(const wire32 *)value : *value != 0;
}

static hl_ParameterValue read_value(const struct reader *reader, const struct table *table,
                                    hl_ParameterType type) {
    hl_ParameterValue value = {.VecBytes = {NULL, 0}};
    if (type == hl_ParameterType_String)
        value.String = read_string(reader, table, 0);
    else if (type == hl_ParameterType_VecBytes)
        value.VecBytes = read_bytes(reader, table, 0);
    else
        value.ULong = read_number(reader, table, type);
    return value;
}

static hl_Parameter read_parameter(const struct reader *reader, uint32_t at) {
    struct table parameter = open_table(reader, at);
    uint8_t type = field8(reader, &parameter, 0);
    require(reader, type >= 1 && type <= UNION_OF(hl_ParameterType_VecBytes));
    struct table value = open_table(reader, required_offset(reader, &parameter, 1));
    hl_ParameterType tag = (hl_ParameterType)(type - 1);
    return (hl_Parameter){tag, read_value(reader, &value, tag)};
}

void hl_decode_call(const uint8_t *message, size_t size, hl_FunctionCall *call, hl_Parameter *parameters,
                    uint8_t *call_type) {
    struct reader reader = open_message(message, size, "Unable to convert buffer to FunctionCall");
    struct table table = open_table(&reader, follow(&reader, 4));
    *call_type = field8(&reader, &table, 2);
    uint8_t return_type = field8(&reader, &table, 3);
    require(&reader, *call_type == HL_CALL_TYPE_GUEST || *call_type == HL_CALL_TYPE_HOST);
    require(&reader, return_type <= hl_ReturnType_VecBytes && field(&reader, &table, 0, 4) != 0);
    *call = (hl_FunctionCall){read_string(&reader, &table, 0), parameters, 0, (hl_ReturnType)return_type};
    uint32_t at = field(&reader, &table, 1, 4);
    if (at == 0)
        return;
    uint32_t vector = follow(&reader, at);
    call->parameters_len = read32(&reader, vector);
    for (uint32_t i = 0; i < call->parameters_len && i < HL_MAX_PARAMETERS; i++)
        parameters[i] = read_parameter(&reader, follow(&reader, vector + 4 + 4 * i));
}

static void read_result_value(const struct reader *reader, const struct table *box, hl_HostResult *result) {
    uint8_t type = field8(reader, box, 0);
    require(reader, type >= 1 && type <= UNION_OF(hl_ReturnType_VecBytes));
    struct table value = open_table(reader, required_offset(reader, box, 1));
    result->type = (hl_ReturnType)(type - 1);
    if (result->type == hl_ReturnType_VecBytes)
        result->value.VecBytes = read_bytes(reader, &value, 1);
    else if (result->type != hl_ReturnType_Void)
        result->value = read_value(reader, &value, (hl_ParameterType)result->type);
}

hl_HostResult hl_decode_result(const uint8_t *message, size_t size) {
    struct reader reader = open_message(message, size, "Unable to convert buffer to FunctionCallResult");
    struct table table = open_table(&reader, follow(&reader, 4));
    uint8_t kind = field8(&reader, &table, 0);
    require(&reader, kind == RESULT_VALUE || kind == RESULT_ERROR);
    struct table inner = open_table(&reader, required_offset(&reader, &table, 1));
    hl_HostResult result = {.type = hl_ReturnType_Void};
    if (kind == RESULT_VALUE) {
        read_result_value(&reader, &inner, &result);
    } else {
        uint32_t code = field(&reader, &inner, 0, 8);
        result.error = code != 0 ? (hl_ErrorCode) * (const wire64 *)(message + code) : hl_ErrorCode_NoError;
        result.message = read_string(&reader, &inner, 1);
    }
    return result;
}

/* ---- Writer ------------------------------------------------------------------------------------------------ *
 *
 * Positions are counted from the end of the message: an object's position is the number of bytes from its first
 * byte to the end. They stay valid while the message grows downwards. */

#define MAX_SLOTS 6
#define MAX_VTABLES 8           /* distinct shapes in one message: eleven parameter types share seven */

/* A vtable as it is written, zeros behind it: its size, the table's size, the fields' offsets in the table. */
union vtable {
    uint16_t entry[2 + MAX_SLOTS];
    unsigned __int128 all;
};

struct writer {
    uint8_t *head;              /* the lowest byte written */
    uint8_t *end;
    uint32_t alignment;         /* the largest so far: the whole message becomes a multiple of it */
    uint32_t table;             /* where the table being written begins */
    uint32_t slots;             /* how many fields it may have */
    uint32_t fields[MAX_SLOTS]; /* their positions, 0 = absent */
    uint32_t vtable_count;
    struct {
        uint32_t position;
        union vtable vtable;
    } vtables[MAX_VTABLES];
    hl_Vec *message;
};

/* What the objects beside payload strings and vectors may take, with room for padding. */
#define FIXED_SIZE 128

static void begin_message(struct writer *writer, size_t payload_size) {
    size_t capacity = FIXED_SIZE + payload_size;
    writer->message = malloc(sizeof *writer->message + capacity);
    writer->head = writer->end = (uint8_t *)(writer->message + 1) + capacity;
    writer->alignment = 4;
    writer->vtable_count = 0;
}

static inline uint32_t position(const struct writer *writer) {
    return (uint32_t)(writer->end - writer->head);
}

/* Pads so that an object of that alignment may follow once `following` more bytes are written. */
static inline void align(struct writer *writer, uint32_t alignment, uint32_t following) {
    uint32_t padding = -(position(writer) + following) & (alignment - 1);
    *(wire64 *)(writer->head - 8) = 0;    /* at most seven of these bytes stay */
    writer->head -= padding;
    if (alignment > writer->alignment)
        writer->alignment = alignment;
}

static inline void put8(struct writer *writer, uint8_t value) {
    *--writer->head = value;
}

static inline void put32(struct writer *writer, uint32_t value) {
    align(writer, 4, 0);
    writer->head -= 4;
    *(wire32 *)writer->head = value;
}

static inline void put64(struct writer *writer, uint64_t value) {
    align(writer, 8, 0);
    writer->head -= 8;
    *(wire64 *)writer->head = value;
}

static inline void put_offset(struct writer *writer, uint32_t target) {
    align(writer, 4, 0);
    put32(writer, position(writer) + 4 - target);
}

static void put_raw(struct writer *writer, const void *data, size_t size) {
    writer->head -= size;
    memcpy(writer->head, data, size);
}

static uint32_t put_vector(struct writer *writer, const void *data, size_t size) {
    align(writer, 4, (uint32_t)size);
    put_raw(writer, data, size);
    put32(writer, (uint32_t)size);
    return position(writer);
}

/* A string made of two pieces: log messages have a prefix. */
static uint32_t put_joined(struct writer *writer, const char *first, const char *second) {
    size_t first_size = strlen(first), second_size = strlen(second);
    align(writer, 4, (uint32_t)(first_size + second_size + 1));
    put8(writer, 0);
    put_raw(writer, second, second_size);
    put_raw(writer, first, first_size);
    put32(writer, (uint32_t)(first_size + second_size));
    return position(writer);
}

static uint32_t put_string(struct writer *writer, const char *text) {
    return put_joined(writer, "", text);
}

static inline void begin_table(struct writer *writer, uint32_t slots) {
    writer->table = position(writer);
    writer->slots = slots;
    for (uint32_t i = 0; i < slots; i++)
        writer->fields[i] = 0;
}

static inline void field_is_here(struct writer *writer, unsigned slot) {
    writer->fields[slot] = position(writer);
}

static inline void add8(struct writer *writer, unsigned slot, uint8_t value) {
    if (value != 0) {
        put8(writer, value);
        field_is_here(writer, slot);
    }
}

static inline void add32(struct writer *writer, unsigned slot, uint32_t value) {
    if (value != 0) {
        put32(writer, value);
        field_is_here(writer, slot);
    }
}

static inline void add64(struct writer *writer, unsigned slot, uint64_t value) {
    if (value != 0) {
        put64(writer, value);
        field_is_here(writer, slot);
    }
}

static inline void add_offset(struct writer *writer, unsigned slot, uint32_t target) {
    put_offset(writer, target);
    field_is_here(writer, slot);
}

/* The position of an equal vtable written earlier, or of this one, now written: tables of one shape share it. */
static uint32_t share_vtable(struct writer *writer, const union vtable *vtable) {
    for (uint32_t i = 0; i < writer->vtable_count; i++)
        if (writer->vtables[i].vtable.all == vtable->all)
            return writer->vtables[i].position;
    unsigned size = vtable->entry[0];
    *(wire128 *)(writer->head - 16) = vtable->all << 8 * (sizeof *vtable - size);    /* ends at the head */
    writer->head -= size;
    writer->vtables[writer->vtable_count].vtable = *vtable;
    return writer->vtables[writer->vtable_count++].position = position(writer);
}

static uint32_t end_table(struct writer *writer) {
    put32(writer, 0);    /* the distance to the vtable, known below */
    uint32_t table = position(writer), slots = writer->slots;
    while (slots > 0 && writer->fields[slots - 1] == 0)
        slots--;
    union vtable vtable = {{(uint16_t)(4 + 2 * slots), (uint16_t)(table - writer->table)}};
    for (uint32_t i = 0; i < slots; i++)
        if (writer->fields[i] != 0)
            vtable.entry[2 + i] = (uint16_t)(table - writer->fields[i]);
    *(wire32 *)(writer->end - table) = share_vtable(writer, &vtable) - table;
    return table;
}

/* A table { type, value offset }, as unions are stored: the offset is slot 1 and is written first. */
static uint32_t put_union(struct writer *writer, uint8_t type, uint32_t value) {
    begin_table(writer, 2);
    add_offset(writer, 1, value);
    add8(writer, 0, type);
    return end_table(writer);
}

static hl_Vec *end_message(struct writer *writer, uint32_t root) {
    align(writer, writer->alignment, 8);
    put_offset(writer, root);
    put32(writer, position(writer));
    writer->message->data = writer->head;
    writer->message->len = position(writer);
    return writer->message;
}

/* One value table of abi.md 10.1, Void included: a parameter or, vectors apart, a return value. */
static uint32_t put_value(struct writer *writer, hl_ReturnType type, const hl_ParameterValue *value) {
    uint32_t payload = 0;
    if (type == hl_ReturnType_String)
        payload = put_string(writer, value->String);
    begin_table(writer, 1);
    if (type == hl_ReturnType_String)
        add_offset(writer, 0, payload);
    else if (type == hl_ReturnType_Bool)
        add8(writer, 0, value->Bool);
    else if (type == hl_ReturnType_Long || type == hl_ReturnType_ULong || type == hl_ReturnType_Double)
        add64(writer, 0, value->ULong);
    else if (type != hl_ReturnType_Void)
        add32(writer, 0, value->UInt);
    return end_table(writer);
}

static uint32_t put_bytes_parameter(struct writer *writer, const hl_Vec *bytes) {
    uint32_t payload = put_vector(writer, bytes->data, bytes->len);
    begin_table(writer, 1);
    add_offset(writer, 0, payload);
    return end_table(writer);
}

static uint32_t put_bytes_result(struct writer *writer, const hl_Vec *bytes) {
    uint32_t payload = put_vector(writer, bytes->data, bytes->len);
    begin_table(writer, 2);
    add_offset(writer, 1, payload);
    add32(writer, 0, (uint32_t)bytes->len);
    return end_table(writer);
}

static uint32_t put_parameter(struct writer *writer, const hl_Parameter *parameter) {
    uint32_t value = parameter->tag == hl_ParameterType_VecBytes
                         ? put_bytes_parameter(writer, &parameter->value.VecBytes)
                         : put_value(writer, (hl_ReturnType)parameter->tag, &parameter->value);
    return put_union(writer, UNION_OF(parameter->tag), value);
}

static size_t parameters_size(const hl_FunctionCall *call) {
    size_t size = 0;
    for (uintptr_t i = 0; i < call->parameters_len; i++) {
        const hl_Parameter *parameter = &call->parameters[i];
        size += 64;
        if (parameter->tag == hl_ParameterType_String)
            size += strlen(parameter->value.String);
        else if (parameter->tag == hl_ParameterType_VecBytes)
            size += parameter->value.VecBytes.len;
    }
    return size;
}

hl_Vec *hl_encode_call(const hl_FunctionCall *call, uint8_t call_type) {
    struct writer writer;
    begin_message(&writer, strlen(call->function_name) + parameters_size(call));
    uint32_t positions[call->parameters_len + 1], vector = 0;
    uint32_t name = put_string(&writer, call->function_name);
    for (uintptr_t i = 0; i < call->parameters_len; i++)
        positions[i] = put_parameter(&writer, &call->parameters[i]);
    if (call->parameters_len != 0) {
        for (uintptr_t i = call->parameters_len; i > 0; i--)
            put_offset(&writer, positions[i - 1]);
        put32(&writer, (uint32_t)call->parameters_len);
        vector = position(&writer);
    }
    begin_table(&writer, 4);
    if (vector != 0)
        add_offset(&writer, 1, vector);
    add_offset(&writer, 0, name);
    add8(&writer, 3, (uint8_t)call->return_type);
    add8(&writer, 2, call_type);
    return end_message(&writer, end_table(&writer));
}

hl_Vec *hl_encode_result(hl_ReturnType type, const hl_ParameterValue *value) {
    size_t payload = type == hl_ReturnType_String     ? strlen(value->String)
                     : type == hl_ReturnType_VecBytes ? value->VecBytes.len
                                                      : 0;
    struct writer writer;
    begin_message(&writer, payload);
    uint32_t table = type == hl_ReturnType_VecBytes ? put_bytes_result(&writer, &value->VecBytes)
                                                    : put_value(&writer, type, value);
    uint32_t box = put_union(&writer, UNION_OF(type), table);
    return end_message(&writer, put_union(&writer, RESULT_VALUE, box));
}

hl_Vec *hl_encode_error(uint64_t code, const char *message) {
    struct writer writer;
    begin_message(&writer, strlen(message));
    uint32_t text = put_string(&writer, message);
    begin_table(&writer, 2);
    add64(&writer, 0, code);
    add_offset(&writer, 1, text);
    return end_message(&writer, put_union(&writer, RESULT_ERROR, end_table(&writer)));
}

hl_Vec *hl_encode_log(uint8_t level, const char *prefix, const char *message, const char *file, uint32_t line) {
    struct writer writer;
    begin_message(&writer, strlen(prefix) + strlen(message) + strlen(file));
    uint32_t text = put_joined(&writer, prefix, message);
    uint32_t source = put_string(&writer, "Unknown"), caller = put_string(&writer, "");
    uint32_t source_file = put_string(&writer, file);
    begin_table(&writer, 6);
    add32(&writer, 5, line);
    add_offset(&writer, 4, source_file);
    add_offset(&writer, 3, caller);
    add_offset(&writer, 1, source);
    add_offset(&writer, 0, text);
    add8(&writer, 2, level);
    return end_message(&writer, end_table(&writer));
}
