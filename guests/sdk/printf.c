/* The printf family, without a single floating-point instruction.
 *
 * Doubles are formatted from their bits by exact decimal arithmetic on integers, so that %f, %e and %g are right
 * and work where SSE does not. The variadic entry points at the end are the only code that may touch XMM
 * registers: they save those that the caller says it used.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "printf.h"
#include "libc.h"
#include "runtime.h"

#pragma GCC push_options
#pragma GCC target("general-regs-only")

/* ---- Sinks ------------------------------------------------------------------------------------------------- */

struct sink {
    void (*emit)(struct sink *sink, const char *text, size_t size);
    void (*out)(char character, void *argument);    /* of a character sink */
    void *argument;
    char *cursor, *end;                             /* of a buffer sink */
    size_t count;                                   /* characters produced, kept or not */
};

static void emit_to_buffer(struct sink *sink, const char *text, size_t size) {
    size_t room = (size_t)(sink->end - sink->cursor);
    size_t kept = size < room ? size : room;
    memcpy(sink->cursor, text, kept);
    sink->cursor += kept;
}

static void emit_to_host(struct sink *sink, const char *text, size_t size) {
    (void)sink;
    while (size-- > 0)
        _putchar(*text++);
}

static void emit_to_function(struct sink *sink, const char *text, size_t size) {
    while (size-- > 0)
        sink->out(*text++, sink->argument);
}

static void put(struct sink *sink, const char *text, size_t size) {
    sink->emit(sink, text, size);
    sink->count += size;
}

static void put_repeated(struct sink *sink, char character, int count) {
    while (count-- > 0)
        put(sink, &character, 1);
}

/* ---- Conversion specifications ----------------------------------------------------------------------------- */

struct spec {
    bool left, plus, space, alternate, zero;
    int width;
    int precision;      /* -1: none given */
    char length;        /* 'H' for hh, 'h', 'l' (also ll, j, z, t), 'L', or 0 */
    char conversion;
};

/* va_list as the ABI lays it out: the way to take a double's bits without an SSE register. */
struct arguments {
    uint32_t gp_offset, fp_offset;
    char *overflow, *save_area;
};

#define FP_SAVE_END 176u

static uint64_t next_double_bits(struct arguments *arguments) {
    char *at = arguments->overflow;
    if (arguments->fp_offset < FP_SAVE_END) {
        at = arguments->save_area + arguments->fp_offset;
        arguments->fp_offset += 16;
    } else {
        arguments->overflow += 8;
    }
    return *(uint64_t *)at;
}

/* An x87 long double, rounded toward zero to a double: printf prints no more of it. */
static uint64_t next_long_double_bits(struct arguments *arguments) {
    char *at = (char *)(((uintptr_t)arguments->overflow + 15) & ~15ull);
    arguments->overflow = at + 16;
    uint64_t mantissa = *(uint64_t *)at, sign_exponent = *(uint16_t *)(at + 8);
    uint64_t sign = sign_exponent >> 15 << 63;
    int exponent = (int)(sign_exponent & 0x7FFF) - 16383;
    if (exponent == 16384)
        return sign | 0x7FF0000000000000 | (mantissa << 1) >> 12;
    if (exponent > 1023)
        return sign | 0x7FEFFFFFFFFFFFFF;
    if (exponent < -1022)
        return sign | (exponent < -1074 ? 0 : mantissa >> (-1011 - exponent));
    return sign | (uint64_t)(exponent + 1023) << 52 | (mantissa << 1) >> 12;
}

static uint64_t next_integer(const struct spec *spec, va_list arguments) {
    bool is_signed = spec->conversion == 'd' || spec->conversion == 'i';
    if (spec->length == 'l' || spec->conversion == 'p')
        return va_arg(arguments, uint64_t);
    uint32_t value = va_arg(arguments, uint32_t);
    if (spec->length == 'h')
        return is_signed ? (uint64_t)(int16_t)value : (uint16_t)value;
    if (spec->length == 'H')
        return is_signed ? (uint64_t)(int8_t)value : (uint8_t)value;
    return is_signed ? (uint64_t)(int32_t)value : value;
}

static const char *parse_number(const char *format, va_list arguments, int *number) {
    if (*format == '*') {
        *number = va_arg(arguments, int);
        return format + 1;
    }
    for (*number = 0; *format >= '0' && *format <= '9'; format++)
        if (*number < 100000000)
            *number = *number * 10 + (*format - '0');
    return format;
}

static const char *parse_flags(const char *format, struct spec *spec) {
    for (;; format++) {
        switch (*format) {
        case '-': spec->left = true; break;
        case '+': spec->plus = true; break;
        case ' ': spec->space = true; break;
        case '#': spec->alternate = true; break;
        case '0': spec->zero = true; break;
        default: return format;
        }
    }
}

static const char *parse_length(const char *format, struct spec *spec) {
    for (;; format++) {
        switch (*format) {
        case 'h': spec->length = spec->length == 'h' ? 'H' : 'h'; break;
        case 'l': case 'j': case 'z': case 't': spec->length = 'l'; break;
        case 'L': spec->length = 'L'; break;
        default: return format;
        }
    }
}

/* Parses what follows a '%', up to and with the conversion character. */
static const char *parse_spec(const char *format, struct spec *spec, va_list arguments) {
    *spec = (struct spec){.precision = -1};
    format = parse_flags(format, spec);
    format = parse_number(format, arguments, &spec->width);
    if (spec->width < 0) {
        spec->left = true;
        spec->width = -spec->width;
    }
    if (*format == '.') {
        format = parse_number(format + 1, arguments, &spec->precision);
        if (spec->precision < 0)
            spec->precision = -1;
    }
    format = parse_length(format, spec);
    spec->conversion = *format;
    return *format != '\0' ? format + 1 : format;
}

/* Prefix (sign or 0x), zeros, body and the field's padding. */
static void put_padded(struct sink *sink, const struct spec *spec, const char *prefix, int zeros, const char *body,
                       int size) {
    int prefix_size = (int)strlen(prefix);
    int padding = spec->width - prefix_size - zeros - size;
    if (!spec->left)
        put_repeated(sink, ' ', padding);
    put(sink, prefix, (size_t)prefix_size);
    put_repeated(sink, '0', zeros);
    put(sink, body, (size_t)size);
    if (spec->left)
        put_repeated(sink, ' ', padding);
}

static const char *sign_prefix(const struct spec *spec, bool negative) {
    return negative ? "-" : spec->plus ? "+" : spec->space ? " " : "";
}

/* ---- Integers and text ------------------------------------------------------------------------------------- */

/* Writes the digits that end at `end`; returns their start. */
static char *digits_before(char *end, uint64_t value, unsigned base, bool upper) {
    const char *symbols = upper ? "0123456789ABCDEF" : "0123456789abcdef";
    for (; value != 0; value /= base)
        *--end = symbols[value % base];
    return end;
}

static void put_integer(struct sink *sink, const struct spec *spec, uint64_t value) {
    char buffer[64], *end = buffer + sizeof buffer;
    char conversion = spec->conversion;
    bool is_signed = conversion == 'd' || conversion == 'i';
    bool is_hex = conversion == 'x' || conversion == 'X' || conversion == 'p';
    bool negative = is_signed && (int64_t)value < 0;
    char *digits = digits_before(end, negative ? -value : value, is_hex ? 16 : conversion == 'o' ? 8 : 10,
                                 conversion == 'X');
    const char *prefix = is_signed ? sign_prefix(spec, negative) : "";
    if (is_hex && ((spec->alternate && value != 0) || conversion == 'p'))
        prefix = conversion == 'X' ? "0X" : "0x";
    int size = (int)(end - digits);
    int minimum = spec->precision < 0 ? 1 : spec->precision;
    if (conversion == 'o' && spec->alternate && minimum <= size)
        minimum = size + 1;
    if (spec->precision < 0 && spec->zero && !spec->left)
        minimum = spec->width - (int)strlen(prefix) > minimum ? spec->width - (int)strlen(prefix) : minimum;
    put_padded(sink, spec, prefix, minimum > size ? minimum - size : 0, digits, size);
}

static void put_text(struct sink *sink, const struct spec *spec, const char *text) {
    if (text == NULL)
        text = "(null)";
    size_t size = spec->precision < 0 ? strlen(text) : strnlen(text, (size_t)spec->precision);
    put_padded(sink, spec, "", 0, text, (int)size);
}

/* ---- The digits of a double -------------------------------------------------------------------------------- *
 *
 * The number is first a row of limbs of nine decimal digits around a decimal point; scaling by powers of two is
 * exact on it. Then it is a string of digits, rounded half to even where the conversion ends. */

#define LIMB 1000000000u
#define LIMB_DIGITS 9
#define INTEGER_LIMBS 36       /* 309 digits before the point, and one limb for the 53 bits on their way */
#define FRACTION_LIMBS 121     /* 1074 digits behind it */

struct limbs {
    int first, end;            /* the limbs in use; those before INTEGER_LIMBS lie before the point */
    uint32_t limb[INTEGER_LIMBS + FRACTION_LIMBS];
};

/* 0.d1d2d3... times ten to the power of `point`; d1 is not zero. Digits past `count` are zeros. */
struct digits {
    int point, count;
    char text[LIMB_DIGITS * (INTEGER_LIMBS + FRACTION_LIMBS)];
};

static void shift_left(struct limbs *limbs, unsigned shift) {
    uint32_t carry = 0;
    for (int i = limbs->end - 1; i >= limbs->first; i--) {
        uint64_t value = ((uint64_t)limbs->limb[i] << shift) + carry;
        limbs->limb[i] = (uint32_t)(value % LIMB);
        carry = (uint32_t)(value / LIMB);
    }
    if (carry != 0)
        limbs->limb[--limbs->first] = carry;
}

/* shift is at most 9: two to that power divides a limb's range, so remainders carry over whole. */
static void shift_right(struct limbs *limbs, unsigned shift) {
    uint32_t carry = 0, mask = (1u << shift) - 1;
    for (int i = limbs->first; i < limbs->end; i++) {
        uint32_t remainder = limbs->limb[i] & mask;
        limbs->limb[i] = (limbs->limb[i] >> shift) + carry;
        carry = remainder * (LIMB >> shift);
    }
    if (carry != 0)
        limbs->limb[limbs->end++] = carry;
    if (limbs->limb[limbs->first] == 0)
        limbs->first++;
}

static void scale(struct limbs *limbs, uint64_t mantissa, int exponent) {
    limbs->first = limbs->end = INTEGER_LIMBS;
    for (; mantissa != 0; mantissa /= LIMB)
        limbs->limb[--limbs->first] = (uint32_t)(mantissa % LIMB);
    for (int left = exponent; left > 0; left -= 29)
        shift_left(limbs, left > 29 ? 29 : (unsigned)left);
    for (int right = -exponent; right > 0; right -= 9)
        shift_right(limbs, right > 9 ? 9 : (unsigned)right);
}

/* The digits of a finite double, sign apart. Zero has none. */
static void expand(struct digits *digits, uint64_t bits) {
    struct limbs limbs;
    int exponent = (int)(bits >> 52 & 0x7FF);
    uint64_t mantissa = bits & 0xFFFFFFFFFFFFF;
    digits->point = digits->count = 0;
    if (exponent == 0 && mantissa == 0)
        return;
    scale(&limbs, exponent != 0 ? mantissa | 1ull << 52 : mantissa, (exponent != 0 ? exponent : 1) - 1075);
    digits->point = LIMB_DIGITS * (INTEGER_LIMBS - limbs.first);
    for (int i = limbs.first; i < limbs.end; i++)
        for (uint32_t unit = LIMB / 10, rest = limbs.limb[i]; unit != 0; rest %= unit, unit /= 10)
            if (rest / unit != 0 || digits->count != 0)
                digits->text[digits->count++] = (char)('0' + rest / unit);
            else
                digits->point--;
}

static bool rounds_up(const struct digits *digits, int kept) {
    if (digits->text[kept] != '5')
        return digits->text[kept] > '5';
    for (int i = kept + 1; i < digits->count; i++)
        if (digits->text[i] != '0')
            return true;
    return kept > 0 && (digits->text[kept - 1] & 1) != 0;
}

static void round_to(struct digits *digits, int kept) {
    if (kept >= digits->count)
        return;
    bool up = kept >= 0 && rounds_up(digits, kept);
    digits->count = kept > 0 ? kept : 0;
    if (!up)
        return;
    int i = kept;
    while (i > 0 && digits->text[i - 1] == '9')
        i--;
    digits->count = i;
    if (i > 0) {
        digits->text[i - 1]++;
    } else {
        digits->text[digits->count++] = '1';
        digits->point++;
    }
}

/* ---- Doubles ----------------------------------------------------------------------------------------------- */

/* Digits from index `from` on, zeros where the number has none. */
static void put_digits(struct sink *sink, const struct digits *digits, int from, int count) {
    for (; count > 0; from++, count--)
        put(sink, from >= 0 && from < digits->count ? &digits->text[from] : "0", 1);
}

/* The digits before the point, the point, `precision` digits behind it, and a tail such as e+05. */
static void put_number(struct sink *sink, const struct spec *spec, const char *prefix, const struct digits *digits,
                       int integers, int precision, const char *tail) {
    int first = integers < 0 ? 0 : integers;
    bool point = precision > 0 || spec->alternate;
    int size = (int)strlen(prefix) + (first != 0 ? first : 1) + point + precision + (int)strlen(tail);
    int padding = spec->width - size;
    if (!spec->left && !spec->zero)
        put_repeated(sink, ' ', padding);
    put(sink, prefix, strlen(prefix));
    if (!spec->left && spec->zero)
        put_repeated(sink, '0', padding);
    put_digits(sink, digits, first != 0 ? 0 : -1, first != 0 ? first : 1);
    put(sink, ".", point);
    put_digits(sink, digits, integers, precision);
    put(sink, tail, strlen(tail));
    if (spec->left)
        put_repeated(sink, ' ', padding);
}

static void put_scientific(struct sink *sink, const struct spec *spec, const char *prefix,
                           const struct digits *digits, int precision, char letter) {
    char buffer[8], *end = buffer + sizeof buffer - 1, *tail;
    int exponent = digits->count != 0 ? digits->point - 1 : 0;
    *end = '\0';
    tail = digits_before(end, (uint64_t)(exponent < 0 ? -exponent : exponent), 10, false);
    while (end - tail < 2)
        *--tail = '0';
    *--tail = exponent < 0 ? '-' : '+';
    *--tail = letter;
    put_number(sink, spec, prefix, digits, 1, precision, tail);
}

/* %g: the shorter of the two styles, without trailing zeros unless '#' asks for them. */
static void put_general(struct sink *sink, const struct spec *spec, const char *prefix, struct digits *digits,
                        int precision, char letter) {
    int significant = precision == 0 ? 1 : precision;
    round_to(digits, significant);
    int exponent = digits->count != 0 ? digits->point - 1 : 0;
    if (!spec->alternate) {
        while (digits->count > 0 && digits->text[digits->count - 1] == '0')
            digits->count--;
    }
    bool scientific = exponent < -4 || exponent >= significant;
    int shown = spec->alternate ? significant : digits->count > 1 ? digits->count : 1;
    if (scientific) {
        put_scientific(sink, spec, prefix, digits, shown - 1, letter);
    } else {
        int fraction = shown - 1 - exponent;
        put_number(sink, spec, prefix, digits, digits->point, fraction > 0 ? fraction : 0, "");
    }
}

static void put_not_finite(struct sink *sink, struct spec *spec, const char *prefix, bool is_nan, bool upper) {
    const char *name = is_nan ? (upper ? "NAN" : "nan") : (upper ? "INF" : "inf");
    put_padded(sink, spec, prefix, 0, name, 3);
}

static void put_double(struct sink *sink, struct spec *spec, uint64_t bits) {
    struct digits digits;
    const char *prefix = sign_prefix(spec, bits >> 63);
    bool upper = spec->conversion < 'a';
    int precision = spec->precision < 0 ? 6 : spec->precision;
    if ((bits >> 52 & 0x7FF) == 0x7FF) {
        put_not_finite(sink, spec, prefix, (bits << 12) != 0, upper);
        return;
    }
    expand(&digits, bits);
    switch (spec->conversion | 0x20) {
    case 'f':
        round_to(&digits, digits.point + precision);
        put_number(sink, spec, prefix, &digits, digits.point, precision, "");
        break;
    case 'e':
        round_to(&digits, precision + 1);
        put_scientific(sink, spec, prefix, &digits, precision, upper ? 'E' : 'e');
        break;
    default:
        put_general(sink, spec, prefix, &digits, precision, upper ? 'E' : 'e');
    }
}

/* ---- The interpreter --------------------------------------------------------------------------------------- */

static void store_count(const struct sink *sink, const struct spec *spec, void *target) {
    switch (spec->length) {
    case 'H': *(int8_t *)target = (int8_t)sink->count; break;
    case 'h': *(int16_t *)target = (int16_t)sink->count; break;
    case 'l': *(int64_t *)target = (int64_t)sink->count; break;
    default: *(int32_t *)target = (int32_t)sink->count;
    }
}

static void convert(struct sink *sink, struct spec *spec, va_list arguments) {
    char character;
    switch (spec->conversion) {
    case 'd': case 'i': case 'u': case 'x': case 'X': case 'o': case 'p':
        put_integer(sink, spec, next_integer(spec, arguments));
        break;
    case 'c':
        character = (char)va_arg(arguments, int);
        put_padded(sink, spec, "", 0, &character, 1);
        break;
    case 's':
        put_text(sink, spec, va_arg(arguments, const char *));
        break;
    case 'f': case 'F': case 'e': case 'E': case 'g': case 'G':
        put_double(sink, spec, spec->length == 'L' ? next_long_double_bits((struct arguments *)arguments)
                                                   : next_double_bits((struct arguments *)arguments));
        break;
    case 'n':
        store_count(sink, spec, va_arg(arguments, void *));
        break;
    default:    /* "%%", and what no conversion is: shown as it stands */
        if (spec->conversion != '\0')
            put(sink, &spec->conversion, 1);
    }
}

static int format_to(struct sink *sink, const char *format, va_list arguments) {
    struct spec spec;
    while (*format != '\0') {
        const char *literal = format;
        while (*format != '\0' && *format != '%')
            format++;
        if (format != literal)
            put(sink, literal, (size_t)(format - literal));
        if (*format == '%') {
            format = parse_spec(format + 1, &spec, arguments);
            convert(sink, &spec, arguments);
        }
    }
    return (int)sink->count;
}

int vsnprintf(char *buffer, size_t size, const char *format, va_list arguments) {
    struct sink sink = {.emit = emit_to_buffer, .cursor = buffer, .end = size != 0 ? buffer + size - 1 : buffer};
    int count = format_to(&sink, format, arguments);
    if (size != 0)
        *sink.cursor = '\0';
    return count;
}

int vprintf(const char *format, va_list arguments) {
    struct sink sink = {.emit = emit_to_host};
    int count = format_to(&sink, format, arguments);
    _putchar('\0');    /* sends the text, even an empty one */
    return count;
}

static int format_to_function(void (*out)(char character, void *argument), void *argument, const char *format,
                              va_list arguments) {
    struct sink sink = {.emit = emit_to_function, .out = out, .argument = argument};
    return format_to(&sink, format, arguments);
}

int puts(const char *text) {
    while (*text != '\0')
        _putchar(*text++);
    _putchar('\n');
    _putchar('\0');
    return 0;
}

int putchar(int character) {
    _putchar((char)character);
    return (unsigned char)character;
}

int hl_format_double(char *buffer, size_t size, const char *conversion, uint64_t bits) {
    uint64_t save_area[FP_SAVE_END / 8];
    save_area[6] = bits;    /* where a va_list keeps the first XMM register */
    va_list arguments;
    struct arguments only_one = {48, 48, NULL, (char *)save_area};
    memcpy(arguments, &only_one, sizeof only_one);
    return vsnprintf(buffer, size, conversion, arguments);
}

uint64_t hl_double_bits(uint32_t float_bits) {
    uint64_t sign = (uint64_t)(float_bits >> 31) << 63, mantissa = float_bits & 0x7FFFFF;
    int exponent = (int)(float_bits >> 23 & 0xFF);
    if (exponent == 0xFF)
        return sign | 0x7FF0000000000000 | mantissa << 29;
    if (exponent == 0 && mantissa == 0)
        return sign;
    for (exponent += exponent == 0; mantissa >> 23 == 0 && (float_bits >> 23 & 0xFF) == 0; exponent--)
        mantissa <<= 1;    /* subnormal floats are normal doubles */
    return sign | (uint64_t)(exponent + 1023 - 127) << 52 | (mantissa & 0x7FFFFF) << 29;
}

#pragma GCC pop_options

/* ---- Variadic entry points --------------------------------------------------------------------------------- */

int printf(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int count = vprintf(format, arguments);
    va_end(arguments);
    return count;
}

int snprintf(char *buffer, size_t size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int count = vsnprintf(buffer, size, format, arguments);
    va_end(arguments);
    return count;
}

int sprintf(char *buffer, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int count = vsnprintf(buffer, (size_t)INT32_MAX, format, arguments);
    va_end(arguments);
    return count;
}

int fctprintf(void (*out)(char character, void *argument), void *argument, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int count = format_to_function(out, argument, format, arguments);
    va_end(arguments);
    return count;
}
