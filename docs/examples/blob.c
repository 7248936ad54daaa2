/*
 * Look rows up in a blob: docs/blob-format.md, in C11 and POSIX, and in this one file.
 *
 *     cc -std=c11 -O2 -o blob docs/examples/blob.c
 *     ./blob BUNDLE/embeddings.safetensors --ids 1,2,3
 *
 * It is written to be read by somebody who writes a reader in another language: every rule of that
 * page which a reader has to check is checked here, and its number stands beside the check. It is
 * meant to be copied from, too. In the order of the file:
 *
 *     1. Refusals        one sentence to standard error, and exit code 2
 *     2. XXH3            the 64-bit hash that all checksums are
 *     3. JSON            a small strict reader
 *     4. Safetensors     a file is mapped, and its tensors lie side by side
 *     5. Blobs           the header: metadata, tensors, segments, aliases
 *     6. Shards          several files that make one blob
 *     7. Tied heads      a table whose rows lie in a matrix of the graph
 *     8. Lookups         rows compared with their checksums, and decoded
 *     9. Command line
 *
 * What it prints is a line of JSON for every token id and table. `vectors` has the bits of the
 * binary32 numbers, which are exact: 8 hexadecimal digits each, bytes in the order of the file.
 *
 *     {"id": 17, "table": "per_layer", "shape": [2, 3], "vectors": "0000803f..."}
 *
 * The manifest of a bundle is not read. Whoever reads it gives the `weights_digest` of its graph
 * along (T-11), and compares its `tables_digest` with the blob's `source_digest`: files of two
 * bundles may have been mixed.
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64 /* B-13: positions have 64 bits, on 32-bit systems too */

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Values are computed in binary32 (B-17), not in something wider that is rounded later. */
_Static_assert(FLT_EVAL_METHOD == 0 && sizeof(float) == 4, "float must be binary32");

/* Bytes of a file or of JSON: they end nowhere but at their length, and may hold zeros. */
struct text {
    const char *at;
    size_t length;
};

static bool is(struct text text, const char *word) {
    return text.length == strlen(word) && memcmp(text.at, word, text.length) == 0;
}

static int compare_texts(const void *a, const void *b) {
    const struct text *x = a, *y = b;
    size_t shorter = x->length < y->length ? x->length : y->length;
    int order = memcmp(x->at, y->at, shorter);
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

/* ---- 1. Refusals -------------------------------------------------------------------------- */

/* A name of a file that nobody trusts, as a terminal may have it: short, and without controls. */
static const char *shown(struct text text) {
    static char buffers[4][200];
    static unsigned turn;
    char *buffer = buffers[turn++ % 4];
    size_t used = 0;
    for (size_t i = 0; i < text.length && used < sizeof buffers[0] - 5; i++) {
        unsigned char c = (unsigned char)text.at[i];
        if (c >= 0x20 && c < 0x7f)
            buffer[used++] = (char)c;
        else
            used += (size_t)snprintf(buffer + used, 5, "\\x%02x", c);
    }
    buffer[used] = 0;
    return buffer;
}

/* Say why something cannot be read, and end. A library would hand the sentence back instead. */
static _Noreturn void refuse(const char *path, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static _Noreturn void refuse(const char *path, const char *format, ...) {
    va_list values;
    va_start(values, format);
    fflush(stdout);
    fputs("error: ", stderr);
    if (path)
        fprintf(stderr, "`%s` ", path);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    exit(2);
}

static void *allocated(uint64_t count, size_t size) {
    void *memory = count <= SIZE_MAX / size ? calloc(count ? (size_t)count : 1, size) : NULL;
    if (!memory)
        refuse(NULL, "there is no memory for %" PRIu64 " times %zu bytes", count, size);
    return memory;
}

/* ---- 2. XXH3 ------------------------------------------------------------------------------ */

/*
 * XXH3, 64 bits, seed 0. Source: github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
 * tests/vectors/xxh3-64.json has hashes to compare with; `./blob --xxh3 FILE` prints one. There are
 * five ways to go by the length of the input; rows, headers and chunks take the last mostly.
 */

static uint32_t le32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t le64(const unsigned char *p) { return le32(p) | (uint64_t)le32(p + 4) << 32; }

#define PRIME32_1 UINT64_C(0x9E3779B1)
#define PRIME32_2 UINT64_C(0x85EBCA77)
#define PRIME32_3 UINT64_C(0xC2B2AE3D)
#define PRIME64_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME64_3 UINT64_C(0x165667B19E3779F9)
#define PRIME64_4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME64_5 UINT64_C(0x27D4EB2F165667C5)
#define PRIME_MX1 UINT64_C(0x165667919E3779F9)
#define PRIME_MX2 UINT64_C(0x9FB21C651E98DF25)

static const unsigned char secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* The lower and the upper half of a 128-bit product, one over the other. */
static uint64_t folded(uint64_t a, uint64_t b) {
    uint64_t a_low = a & 0xffffffff, a_high = a >> 32, b_low = b & 0xffffffff, b_high = b >> 32;
    uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
    uint64_t cross = a_low * b_high + (middle & 0xffffffff);
    return (a_high * b_high + (middle >> 32) + (cross >> 32)) ^ (a * b);
}

static uint64_t mixed(uint64_t h) {
    h = (h ^ h >> 37) * PRIME_MX1;
    return h ^ h >> 32;
}

static uint64_t mixed_as_xxh64(uint64_t h) {
    h = (h ^ h >> 33) * PRIME64_2;
    h = (h ^ h >> 29) * PRIME64_3;
    return h ^ h >> 32;
}

static uint64_t mixed_16_bytes(const unsigned char *input, const unsigned char *key) {
    return folded(le64(input) ^ le64(key), le64(input + 8) ^ le64(key + 8));
}

static uint64_t hash_of_up_to_16(const unsigned char *input, size_t length) {
    if (length == 0)
        return mixed_as_xxh64(le64(secret + 56) ^ le64(secret + 64));
    if (length <= 3) {
        uint32_t combined = (uint32_t)input[0] << 16 | (uint32_t)input[length / 2] << 24 |
                            input[length - 1] | (uint32_t)length << 8;
        return mixed_as_xxh64(combined ^ (uint64_t)(le32(secret) ^ le32(secret + 4)));
    }
    if (length <= 8) {
        uint64_t h = le32(input + length - 4) + ((uint64_t)le32(input) << 32);
        h ^= le64(secret + 8) ^ le64(secret + 16);
        h = (h ^ (h << 49 | h >> 15) ^ (h << 24 | h >> 40)) * PRIME_MX2;
        h = (h ^ ((h >> 35) + length)) * PRIME_MX2;
        return h ^ h >> 28;
    }
    uint64_t low = le64(input) ^ le64(secret + 24) ^ le64(secret + 32);
    uint64_t high = le64(input + length - 8) ^ le64(secret + 40) ^ le64(secret + 48);
    uint64_t swapped = 0;
    for (int i = 0; i < 8; i++)
        swapped = swapped << 8 | (low >> 8 * i & 0xff);
    return mixed(length + swapped + high + folded(low, high));
}

static uint64_t hash_of_up_to_240(const unsigned char *input, size_t length) {
    uint64_t sum = length * PRIME64_1;
    if (length <= 128) {
        for (size_t i = (length - 1) / 32 + 1; i-- > 0;) {
            sum += mixed_16_bytes(input + 16 * i, secret + 32 * i);
            sum += mixed_16_bytes(input + length - 16 * (i + 1), secret + 32 * i + 16);
        }
        return mixed(sum);
    }
    for (size_t i = 0; i < 8; i++)
        sum += mixed_16_bytes(input + 16 * i, secret + 16 * i);
    sum = mixed(sum);
    for (size_t i = 8; i < length / 16; i++)
        sum += mixed_16_bytes(input + 16 * i, secret + 16 * (i - 8) + 3);
    return mixed(sum + mixed_16_bytes(input + length - 16, secret + 136 - 17));
}

static void add_stripe(uint64_t sums[8], const unsigned char *input, const unsigned char *key) {
    for (int i = 0; i < 8; i++) {
        uint64_t value = le64(input + 8 * i), keyed = value ^ le64(key + 8 * i);
        sums[i ^ 1] += value;
        sums[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
}

static uint64_t xxh3(const unsigned char *input, size_t length) {
    if (length <= 16)
        return hash_of_up_to_16(input, length);
    if (length <= 240)
        return hash_of_up_to_240(input, length);
    uint64_t sums[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                        PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    /* Stripes of 64 bytes, 16 to a block; the last one may overlap the one before it. */
    for (size_t stripe = 0; stripe < (length - 1) / 64; stripe++) {
        add_stripe(sums, input + 64 * stripe, secret + 8 * (stripe % 16));
        if (stripe % 16 == 15)
            for (int i = 0; i < 8; i++)
                sums[i] = (sums[i] ^ sums[i] >> 47 ^ le64(secret + 128 + 8 * i)) * PRIME32_1;
    }
    add_stripe(sums, input + length - 64, secret + 121);
    uint64_t merged = length * PRIME64_1;
    for (int i = 0; i < 4; i++)
        merged += folded(sums[2 * i] ^ le64(secret + 11 + 16 * i),
                         sums[2 * i + 1] ^ le64(secret + 19 + 16 * i));
    return mixed(merged);
}

/* ---- 3. JSON ------------------------------------------------------------------------------ */

/*
 * The values of a document, in the order in which they begin. Containers know their first value,
 * and every value the next one of its container; 0 is none, since node 0 is the document itself.
 */
enum kind { IS_NULL, IS_BOOLEAN, IS_NUMBER, IS_STRING, IS_LIST, IS_OBJECT };

struct node {
    enum kind kind;
    uint32_t first, next, count; /* of lists and objects */
    struct text key;             /* of what is in an object */
    struct text text;            /* of a string: decoded; of a number: as it is written */
};

struct json {
    char *bytes; /* a copy; strings are decoded in place, as none becomes longer */
    size_t length, position;
    struct node *nodes;
    uint32_t num_nodes, capacity;
};

enum { DEEPEST = 16 }; /* The header has four levels. Without a limit the stack is the limit. */

static void free_json(struct json *json) {
    free(json->bytes);
    free(json->nodes);
    *json = (struct json){0};
}

/* The copy ends with a zero, which no JSON has. */
static unsigned char peek(const struct json *json) {
    return (unsigned char)json->bytes[json->position];
}

static unsigned char after_spaces(struct json *json) {
    while (peek(json) == ' ' || peek(json) == '\t' || peek(json) == '\n' || peek(json) == '\r')
        json->position++;
    return peek(json);
}

static bool take(struct json *json, const char *word) {
    size_t length = strlen(word);
    if (json->length - json->position < length ||
        memcmp(json->bytes + json->position, word, length))
        return false;
    json->position += length;
    return true;
}

static bool take_digits(struct json *json) {
    size_t begin = json->position;
    while (peek(json) >= '0' && peek(json) <= '9')
        json->position++;
    return json->position > begin;
}

/* A number without leading zeros; neither NaN nor Infinity is one. */
static bool take_number(struct json *json, struct text *number) {
    number->at = json->bytes + json->position;
    take(json, "-");
    if (!take(json, "0") && !take_digits(json))
        return false;
    if (take(json, ".") && !take_digits(json))
        return false;
    if (take(json, "e") || take(json, "E")) {
        if (!take(json, "+"))
            take(json, "-");
        if (!take_digits(json))
            return false;
    }
    number->length = (size_t)(json->bytes + json->position - number->at);
    return true;
}

static bool take_four_digits(struct json *json, uint32_t *value) {
    *value = 0;
    for (int i = 0; i < 4; i++) {
        unsigned char c = peek(json);
        unsigned char lower = c | 0x20;
        if (c >= '0' && c <= '9')
            *value = *value << 4 | (uint32_t)(c - '0');
        else if (lower >= 'a' && lower <= 'f')
            *value = *value << 4 | (uint32_t)(lower - 'a' + 10);
        else
            return false;
        json->position++;
    }
    return true;
}

static size_t write_utf8(char *at, uint32_t code) {
    if (code < 0x80) {
        at[0] = (char)code;
        return 1;
    }
    size_t more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    at[0] = (char)((0xf00 >> more & 0xff) | code >> 6 * more); /* c0, e0 or f0, and upper bits */
    for (size_t i = 1; i <= more; i++)
        at[i] = (char)(0x80 | (code >> 6 * (more - i) & 0x3f));
    return 1 + more;
}

/* Bytes of the UTF-8 character at the position; 0 where there is none. */
static size_t utf8_length(const struct json *json) {
    const unsigned char *at = (const unsigned char *)json->bytes + json->position;
    size_t length = at[0] < 0x80 ? 1 : at[0] < 0xe0 ? 2 : at[0] < 0xf0 ? 3 : 4;
    if (length == 1)
        return 1;
    if (at[0] < 0xc2 || at[0] > 0xf4 || json->length - json->position < length)
        return 0;
    for (size_t i = 1; i < length; i++)
        if (at[i] >> 6 != 2)
            return 0;
    bool too_long = (at[0] == 0xe0 && at[1] < 0xa0) || (at[0] == 0xf0 && at[1] < 0x90);
    bool surrogate = at[0] == 0xed && at[1] > 0x9f;
    return too_long || surrogate || (at[0] == 0xf4 && at[1] > 0x8f) ? 0 : length;
}

/* What follows a backslash, as UTF-8. Halves of a pair of surrogates alone are no text. */
static bool take_escape(struct json *json, char *out, size_t *written) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = peek(json) ? strchr(names, peek(json)) : NULL;
    uint32_t code, low;
    if (name) {
        json->position++;
        out[0] = values[name - names];
        *written = 1;
        return true;
    }
    if (!take(json, "u") || !take_four_digits(json, &code) || (code >= 0xdc00 && code < 0xe000))
        return false;
    if (code >= 0xd800 && code < 0xdc00) {
        if (!take(json, "\\u") || !take_four_digits(json, &low) || low < 0xdc00 || low > 0xdfff)
            return false;
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    *written = write_utf8(out, code);
    return true;
}

static bool take_string(struct json *json, struct text *string) {
    if (!take(json, "\""))
        return false;
    char *out = json->bytes + json->position;
    string->at = out;
    while (peek(json) != '"') {
        size_t written = utf8_length(json);
        if (peek(json) < 0x20 || !written) /* The zero at the end is below 0x20 too. */
            return false;
        if (take(json, "\\")) {
            if (!take_escape(json, out, &written))
                return false;
        } else {
            memmove(out, json->bytes + json->position, written);
            json->position += written;
        }
        out += written;
    }
    string->length = (size_t)(out - string->at);
    return take(json, "\"");
}

static uint32_t new_node(struct json *json) {
    if (json->num_nodes == json->capacity) {
        uint32_t capacity = json->capacity ? 2 * json->capacity : 64;
        struct node *nodes = realloc(json->nodes, capacity * sizeof *nodes);
        if (!nodes)
            refuse(NULL, "there is no memory for a header");
        json->nodes = nodes;
        json->capacity = capacity;
    }
    json->nodes[json->num_nodes] = (struct node){0};
    return json->num_nodes++;
}

/* No key twice. Sorting finds that in n log n steps, whatever the file holds. */
static bool keys_differ(const struct json *json, uint32_t object) {
    uint32_t count = json->nodes[object].count, i = 0;
    struct text *keys = allocated(count, sizeof *keys);
    for (uint32_t at = json->nodes[object].first; at; at = json->nodes[at].next)
        keys[i++] = json->nodes[at].key;
    qsort(keys, count, sizeof *keys, compare_texts);
    bool differ = true;
    for (i = 1; i < count; i++)
        differ &= compare_texts(&keys[i - 1], &keys[i]) != 0;
    free(keys);
    return differ;
}

static bool take_value(struct json *json, uint32_t self, unsigned depth);

static bool take_container(struct json *json, uint32_t self, unsigned depth) {
    bool object = json->nodes[self].kind == IS_OBJECT;
    unsigned char end = object ? '}' : ']';
    uint32_t last = 0;
    json->position++;
    if (after_spaces(json) != end) {
        for (;;) {
            uint32_t child = new_node(json);
            struct text key = {0};
            if (object) {
                after_spaces(json);
                if (!take_string(json, &key) || after_spaces(json) != ':')
                    return false;
                json->position++;
            }
            json->nodes[child].key = key;
            if (!take_value(json, child, depth + 1))
                return false;
            *(last ? &json->nodes[last].next : &json->nodes[self].first) = child;
            json->nodes[self].count++;
            last = child;
            if (after_spaces(json) != ',')
                break;
            json->position++;
        }
    }
    if (peek(json) != end)
        return false;
    json->position++;
    return !object || keys_differ(json, self);
}

static bool take_value(struct json *json, uint32_t self, unsigned depth) {
    struct text text = {0};
    unsigned char c = after_spaces(json);
    if (depth == DEEPEST)
        return false;
    if (c == '{' || c == '[') {
        json->nodes[self].kind = c == '{' ? IS_OBJECT : IS_LIST;
        return take_container(json, self, depth);
    }
    if (c == '"') {
        json->nodes[self].kind = IS_STRING;
        if (!take_string(json, &text))
            return false;
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        json->nodes[self].kind = IS_NUMBER;
        if (!take_number(json, &text))
            return false;
    } else {
        json->nodes[self].kind = c == 'n' ? IS_NULL : IS_BOOLEAN;
        if (!take(json, "null") && !take(json, "true") && !take(json, "false"))
            return false;
    }
    json->nodes[self].text = text;
    return true;
}

/* Whether a text is one JSON value. Either way free_json is to be called. */
static bool read_json(struct json *json, struct text text) {
    *json = (struct json){.bytes = allocated((uint64_t)text.length + 1, 1), .length = text.length};
    memcpy(json->bytes, text.at, text.length);
    return take_value(json, new_node(json), 0) && !after_spaces(json) &&
           json->position == json->length;
}

/* The value of a key; NULL where an object has none, and of what is no object. */
static const struct node *member(const struct json *json, const struct node *object,
                                 const char *key) {
    if (object->kind == IS_OBJECT)
        for (uint32_t at = object->first; at; at = json->nodes[at].next)
            if (is(json->nodes[at].key, key))
                return &json->nodes[at];
    return NULL;
}

/* Whether a node is an integer from `least` to below 2^53, as all integers of a header are. */
static bool integer(const struct node *node, uint64_t least, uint64_t *value) {
    if (!node || node->kind != IS_NUMBER || node->text.length > 16)
        return false;
    *value = 0;
    for (size_t i = 0; i < node->text.length; i++) {
        char c = node->text.at[i];
        if (c < '0' || c > '9')
            return false;
        *value = 10 * *value + (uint64_t)(c - '0');
    }
    return *value >= least && *value < UINT64_C(1) << 53;
}

/* Whether a node is a number that is finite as a binary32, and which one. */
static bool multiplier_of(const struct node *node, float *multiplier) {
    if (!node || node->kind != IS_NUMBER)
        return false;
    double value = strtod(node->text.at, NULL); /* The number ends before a byte that is of none. */
    *multiplier = (float)value;
    return value >= -FLT_MAX && value <= FLT_MAX;
}

/* ---- 4. Safetensors ----------------------------------------------------------------------- */

struct tensor {
    struct text name, dtype;
    uint64_t dimensions, shape[2]; /* No tensor that is known here has more. */
    uint64_t begin, end;           /* bytes of the file */
};

struct file {
    const char *path;
    unsigned char *bytes; /* the whole file, mapped; a lookup reads the pages of its rows only */
    uint64_t size, data;  /* of the file; first byte behind the header */
    struct json header;
    const struct node *metadata; /* NULL where there is none */
    struct tensor *tensors;      /* by place */
    uint64_t num_tensors;
};

/* Bytes of an element; 0 of a dtype that is not known. A blob holds U8 and U64, a tied head F32
 * too. The others are known so that it is named which rule they break (B-01). */
static uint64_t bytes_of_dtype(struct text dtype) {
    static const struct {
        const char *name;
        unsigned bytes;
    } known[] = {{"U8", 1},  {"I8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
                 {"U16", 2}, {"I16", 2}, {"F16", 2},  {"BF16", 2},    {"U32", 4},
                 {"I32", 4}, {"F32", 4}, {"U64", 8},  {"I64", 8},     {"F64", 8}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (is(dtype, known[i].name))
            return known[i].bytes;
    return 0;
}

static void map_file(struct file *file) {
    struct stat status;
    int descriptor = open(file->path, O_RDONLY);
    if (descriptor < 0 || fstat(descriptor, &status))
        refuse(file->path, "cannot be read: %s", strerror(errno));
    if (!S_ISREG(status.st_mode) || status.st_size < 8)
        refuse(file->path, "is not a safetensors file");
    file->size = (uint64_t)status.st_size;
    if (file->size > SIZE_MAX)
        refuse(file->path, "is too large for this system's addresses; a 64-bit one maps it");
    /* Whoever cuts a mapped file while it is read ends the reader: the system sends SIGBUS. */
    file->bytes = mmap(NULL, (size_t)file->size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (file->bytes == MAP_FAILED)
        refuse(file->path, "cannot be mapped: %s", strerror(errno));
    close(descriptor);
    /* Rows lie anywhere: reading on behind one would be for nothing. */
    posix_madvise(file->bytes, (size_t)file->size, POSIX_MADV_RANDOM);
}

static bool read_tensor(struct file *file, const struct node *node, struct tensor *tensor) {
    const struct json *header = &file->header;
    const struct node *dtype = member(header, node, "dtype"),
                      *shape = member(header, node, "shape"),
                      *places = member(header, node, "data_offsets");
    uint64_t value, elements = 1, begin, end;
    if (!dtype || dtype->kind != IS_STRING || !shape || shape->kind != IS_LIST || !places ||
        places->kind != IS_LIST || places->count != 2)
        return false;
    *tensor = (struct tensor){.name = node->key, .dtype = dtype->text};
    for (uint32_t at = shape->first; at; at = header->nodes[at].next) {
        if (!integer(&header->nodes[at], 0, &value))
            return false;
        if (value && elements > (UINT64_C(1) << 53) / value)
            return false; /* more than any file holds; the product must not overflow */
        elements *= value;
        if (tensor->dimensions++ < 2)
            tensor->shape[tensor->dimensions - 1] = value;
    }
    if (!integer(&header->nodes[places->first], 0, &begin) ||
        !integer(&header->nodes[header->nodes[places->first].next], begin, &end))
        return false;
    if (!bytes_of_dtype(tensor->dtype) || end - begin != elements * bytes_of_dtype(tensor->dtype))
        return false;
    tensor->begin = file->data + begin;
    tensor->end = file->data + end;
    return true;
}

static int compare_places(const void *a, const void *b) {
    const struct tensor *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin > y->begin ? 1 : -1;
    return (x->end > y->end) - (x->end < y->end);
}

/* Tensors lie side by side: no hole, no overlap, nothing behind the last one. */
static void check_layout(struct file *file) {
    uint64_t position = file->data;
    qsort(file->tensors, (size_t)file->num_tensors, sizeof *file->tensors, compare_places);
    for (uint64_t i = 0; i < file->num_tensors; i++) {
        const struct tensor *tensor = &file->tensors[i];
        if (tensor->begin != position)
            refuse(file->path, "has tensor `%s` behind a hole, or over another one",
                   shown(tensor->name));
        position = tensor->end;
    }
    if (position != file->size)
        refuse(file->path, "has %" PRIu64 " bytes; its tensors end at byte %" PRIu64, file->size,
               position);
}

/* Map a file, and refuse it where it is no safetensors file. */
static void open_file(struct file *file, const char *path) {
    *file = (struct file){.path = path};
    map_file(file);
    uint64_t length = le64(file->bytes);
    if (length > 100000000 || length > file->size - 8)
        refuse(path, "is not a safetensors file: its header claims %" PRIu64 " bytes", length);
    struct text text = {(const char *)file->bytes + 8, (size_t)length};
    file->data = 8 + length;
    if (!length || *text.at != '{' || !read_json(&file->header, text))
        refuse(path, "has a header that is not a JSON object");
    const struct node *top = file->header.nodes;
    file->tensors = allocated(top->count, sizeof *file->tensors);
    for (uint32_t at = top->first; at; at = file->header.nodes[at].next) {
        const struct node *node = &file->header.nodes[at];
        if (is(node->key, "__metadata__"))
            file->metadata = node;
        else if (!read_tensor(file, node, &file->tensors[file->num_tensors++]))
            refuse(path, "has a malformed header entry for tensor `%s`", shown(node->key));
    }
    if (file->metadata) {
        bool strings = file->metadata->kind == IS_OBJECT;
        for (uint32_t at = file->metadata->first; at; at = file->header.nodes[at].next)
            strings &= file->header.nodes[at].kind == IS_STRING;
        if (!strings)
            refuse(path, "has `__metadata__` that is not a map from string to string");
    }
    check_layout(file);
}

static void close_file(struct file *file) {
    munmap(file->bytes, (size_t)file->size);
    free_json(&file->header);
    free(file->tensors);
}

/* The text of a metadata key; its `at` is NULL where there is none. */
static struct text metadata(const struct file *file, const char *key) {
    const struct node *node = file->metadata ? member(&file->header, file->metadata, key) : NULL;
    return node ? node->text : (struct text){0};
}

static const struct tensor *tensor_of(const struct file *file, const char *name) {
    for (uint64_t i = 0; i < file->num_tensors; i++)
        if (is(file->tensors[i].name, name))
            return &file->tensors[i];
    return NULL;
}

static bool fits(const struct tensor *tensor, const char *dtype, unsigned dimensions) {
    return tensor && is(tensor->dtype, dtype) && tensor->dimensions == dimensions;
}

/* B-11 and T-06. Where there is no such checksum, that breaks another rule. */
static bool header_is_damaged(const struct file *file) {
    const struct tensor *checksum = tensor_of(file, "header_checksum");
    return fits(checksum, "U64", 1) && checksum->shape[0] == 1 &&
           le64(file->bytes + checksum->begin) != xxh3(file->bytes, (size_t)file->data);
}

/* ---- 5. Blobs ----------------------------------------------------------------------------- */

struct dtype {
    const char *name;
    unsigned bits;
    bool coded; /* codes have scales */
};

static const struct dtype dtypes[] = {{"fp32", 32, false}, {"fp16", 16, false}, {"bf16", 16, false},
                                      {"int8", 8, true},   {"int4", 4, true},   {"int2", 2, true}};

static const struct dtype *dtype_of(struct text name) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (is(name, dtypes[i].name))
            return &dtypes[i];
    return NULL;
}

enum { CHUNK_BYTES = 1 << 20, CHECKSUM_BYTES = 8 };
static const uint64_t NO_LAYER = UINT64_MAX;

/* One table's slice of a row. */
struct segment {
    struct text name, table;
    uint64_t layer; /* or NO_LAYER */
    uint64_t offset, width;
    const struct dtype *dtype;
    uint64_t group_size, scale_bytes, scale_offset; /* 0 where there are no codes */
    float multiplier;
};

/* The segments of a table: `count` of them, the first at `first`, `pitch` bytes from each other. */
struct table {
    const struct segment *first;
    uint64_t count, pitch;
};

struct alias {
    uint64_t id, row;
};

struct blob {
    struct file file;
    uint64_t num_rows, stride, rows; /* `rows` is the byte of the file at which they begin */
    uint64_t first_row, total_rows;
    const struct tensor *checksums;
    struct json segments_json, aliases_json;
    struct segment *segments; /* by offset */
    struct table *tables;     /* by name */
    struct alias *aliases;    /* by id */
    uint64_t num_segments, num_tables, num_aliases;
};

static uint64_t parts(uint64_t whole, uint64_t part) { return whole / part + (whole % part != 0); }

static uint64_t code_bytes(const struct segment *segment) {
    return parts(segment->width * segment->dtype->bits, 8);
}

/* First byte of the row behind a segment. Below 2^57: each number in it is below 2^53. */
static uint64_t segment_end(const struct segment *segment) {
    if (!segment->dtype->coded)
        return segment->offset + code_bytes(segment);
    return segment->scale_offset +
           segment->scale_bytes * parts(segment->width, segment->group_size);
}

/* Integers of the metadata are JSON inside a string. */
static bool integer_in(struct text text, uint64_t least, uint64_t *value) {
    struct json json;
    bool found = read_json(&json, text) && integer(json.nodes, least, value);
    free_json(&json);
    return found;
}

static uint64_t metadata_integer(const struct file *file, const char *key) {
    uint64_t value;
    if (!integer_in(metadata(file, key), 0, &value))
        refuse(file->path, "has metadata `%s` that is not a number of rows or bytes (B-05)", key);
    return value;
}

/* Rules about names: B-02, B-11, B-03, B-04 and B-05, in the order that says most. */
static void check_metadata(const struct file *file) {
    static const char *keys[] = {"format",         "version",     "page_size", "first_row",
                                 "num_rows_total", "row_aliases", "segments",  "source_digest"};
    if (!is(metadata(file, "format"), "pleexport-blob"))
        refuse(file->path, "is a safetensors file, but not a blob (B-02)");
    /* Before the version: a damaged one must not look like a newer one. */
    if (header_is_damaged(file))
        refuse(file->path, "is damaged: its header does not match its checksum (B-11)");
    if (!is(metadata(file, "version"), "2"))
        refuse(file->path, "has blob version `%s`; this reader knows 2 (B-03)",
               shown(metadata(file, "version")));
    for (uint32_t at = file->metadata->first; at; at = file->header.nodes[at].next) {
        bool known = false;
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
            known |= is(file->header.nodes[at].key, keys[i]);
        if (!known)
            refuse(file->path, "has `%s`, which this reader does not know (B-04)",
                   shown(file->header.nodes[at].key));
    }
    for (uint64_t i = 0; i < file->num_tensors; i++) {
        struct text name = file->tensors[i].name;
        if (!is(name, "header_checksum") && !is(name, "rows") && !is(name, "checksums"))
            refuse(file->path, "has `%s`, which this reader does not know (B-04)", shown(name));
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!metadata(file, keys[i]).at)
            refuse(file->path, "lacks the metadata `%s` (B-05)", keys[i]);
}

/* Rules about tensors: B-01, B-07, B-10, and the sums of B-12. */
static void check_tensors(struct blob *blob) {
    const struct file *file = &blob->file;
    const struct tensor *first = tensor_of(file, "header_checksum"),
                        *rows = tensor_of(file, "rows");
    blob->checksums = tensor_of(file, "checksums");
    if (!fits(first, "U64", 1) || !fits(rows, "U8", 2) || !fits(blob->checksums, "U64", 1))
        refuse(file->path, "needs tensors `header_checksum`, `rows` and `checksums` of dtypes U64, "
                           "U8 and U64 (B-01)");
    if (first->shape[0] != 1 || first != &file->tensors[0] || rows != &file->tensors[1])
        refuse(file->path, "does not begin with one `header_checksum` and its rows (B-01)");
    blob->num_rows = rows->shape[0];
    blob->stride = rows->shape[1];
    blob->rows = rows->begin;
    if (!blob->num_rows || !blob->stride || blob->stride % 64)
        refuse(file->path, "has %" PRIu64 " rows of %" PRIu64 " bytes (B-01)", blob->num_rows,
               blob->stride);
    uint64_t page_size = metadata_integer(file, "page_size");
    if (page_size < 16384 || blob->rows % page_size)
        refuse(file->path, "has rows at byte %" PRIu64 ", which is not a multiple of a page size "
               "of at least 16384 (B-07)", blob->rows);
    if (blob->checksums->shape[0] != parts(rows->end - rows->begin, CHUNK_BYTES))
        refuse(file->path, "has %" PRIu64 " checksums, not one for each chunk (B-10)",
               blob->checksums->shape[0]);
    blob->first_row = metadata_integer(file, "first_row");
    blob->total_rows = metadata_integer(file, "num_rows_total");
    if (blob->first_row + blob->num_rows > blob->total_rows)
        refuse(file->path, "says that it has %" PRIu64 " rows from %" PRIu64 " of %" PRIu64
               " (B-12)", blob->num_rows, blob->first_row, blob->total_rows);
}

static bool is_null(const struct node *node) { return node && node->kind == IS_NULL; }

/* A segment's fields, each of its type and in its range (B-06). */
static bool read_segment(const struct json *json, const struct node *node,
                         struct segment *segment) {
    const struct node *name = member(json, node, "name"), *table = member(json, node, "table"),
                      *layer = member(json, node, "layer"), *dtype = member(json, node, "dtype"),
                      *group = member(json, node, "group_size"),
                      *scale_dtype = member(json, node, "scale_dtype"),
                      *scale_offset = member(json, node, "scale_offset");
    *segment = (struct segment){.layer = NO_LAYER};
    /* Ten fields, none of them another: `count` is 10, and each of the ten is found below. */
    if (node->count != 10 || !name || name->kind != IS_STRING || !table ||
        table->kind != IS_STRING || !dtype || dtype->kind != IS_STRING)
        return false;
    segment->name = name->text;
    segment->table = table->text;
    segment->dtype = dtype_of(dtype->text);
    if (!segment->dtype || (!is_null(layer) && !integer(layer, 0, &segment->layer)) ||
        !integer(member(json, node, "offset"), 0, &segment->offset) ||
        !integer(member(json, node, "width"), 1, &segment->width) ||
        !multiplier_of(member(json, node, "multiplier"), &segment->multiplier))
        return false;
    if (!segment->dtype->coded)
        return is_null(group) && is_null(scale_dtype) && is_null(scale_offset);
    if (!scale_dtype || scale_dtype->kind != IS_STRING)
        return false;
    struct text scale = scale_dtype->text;
    segment->scale_bytes = is(scale, "fp16") ? 2 : is(scale, "fp32") ? 4 : 0;
    return segment->scale_bytes && integer(scale_offset, 0, &segment->scale_offset) &&
           integer(group, 1, &segment->group_size) && segment->group_size <= segment->width;
}

static void read_segments(struct blob *blob) {
    const char *path = blob->file.path;
    struct json *json = &blob->segments_json;
    if (!read_json(json, metadata(&blob->file, "segments")))
        refuse(path, "has metadata `segments` that is not valid JSON (B-05)");
    if (json->nodes->kind != IS_LIST || !json->nodes->count)
        refuse(path, "has no segments (B-06)");
    blob->segments = allocated(json->nodes->count, sizeof *blob->segments);
    struct text *names = allocated(json->nodes->count, sizeof *names);
    for (uint32_t at = json->nodes->first; at; at = json->nodes[at].next) {
        struct segment *segment = &blob->segments[blob->num_segments];
        if (!read_segment(json, &json->nodes[at], segment))
            refuse(path, "has malformed segment %" PRIu64 ", `%s` (B-06)", blob->num_segments,
                   shown(segment->name));
        names[blob->num_segments++] = segment->name;
    }
    qsort(names, (size_t)blob->num_segments, sizeof *names, compare_texts);
    for (uint64_t i = 1; i < blob->num_segments; i++)
        if (!compare_texts(&names[i - 1], &names[i]))
            refuse(path, "has two segments of the name `%s` (B-06)", shown(names[i]));
    free(names);
}

/* B-08: within the row, in order, without overlaps, and aligned. */
static void check_places(const struct blob *blob) {
    uint64_t position = 0;
    for (uint64_t i = 0; i < blob->num_segments; i++) {
        const struct segment *segment = &blob->segments[i];
        uint64_t codes_end = segment->offset + code_bytes(segment);
        bool coded = segment->dtype->coded;
        if (segment->offset % 4)
            refuse(blob->file.path, "has segment `%s` at byte %" PRIu64
                   ", which is no multiple of 4 (B-08)", shown(segment->name), segment->offset);
        if (coded && segment->scale_offset % segment->scale_bytes)
            refuse(blob->file.path, "has scales of segment `%s` at byte %" PRIu64
                   ", which is no multiple of %" PRIu64 " (B-08)", shown(segment->name),
                   segment->scale_offset, (uint64_t)segment->scale_bytes);
        if (segment->offset < position || (coded && segment->scale_offset < codes_end))
            refuse(blob->file.path, "has segment `%s` over what lies before it (B-08)",
                   shown(segment->name));
        position = segment_end(segment);
        if (position > blob->stride - CHECKSUM_BYTES)
            refuse(blob->file.path, "has segment `%s` up to byte %" PRIu64 " of rows of %" PRIu64
                   ", which end with a checksum (B-08)", shown(segment->name), position,
                   blob->stride);
    }
}

static int compare_tables(const void *a, const void *b) {
    const struct segment *x = *(const struct segment *const *)a,
                         *y = *(const struct segment *const *)b;
    int order = compare_texts(&x->table, &y->table);
    return order ? order : (x > y) - (x < y); /* Those of one table stay in order. */
}

/* B-08: the segments of a table are alike, and lie at equal distances, layer after layer. */
static void plan_tables(struct blob *blob) {
    const struct segment **order = allocated(blob->num_segments, sizeof *order);
    blob->tables = allocated(blob->num_segments, sizeof *blob->tables);
    for (uint64_t i = 0; i < blob->num_segments; i++)
        order[i] = &blob->segments[i];
    qsort(order, (size_t)blob->num_segments, sizeof *order, compare_tables);
    struct table *table = NULL;
    for (uint64_t i = 0; i < blob->num_segments; i++) {
        const struct segment *segment = order[i], *first = segment, *before = segment;
        if (table && !compare_texts(&table->first->table, &segment->table)) {
            first = table->first;
            before = order[i - 1];
        } else {
            table = &blob->tables[blob->num_tables++];
            table->first = segment;
        }
        if (table->count == 1)
            table->pitch = segment->offset - first->offset;
        bool alone = segment->layer == NO_LAYER && !table->count;
        bool alike = segment->width == first->width && segment->dtype == first->dtype &&
                     segment->group_size == first->group_size &&
                     segment->scale_bytes == first->scale_bytes &&
                     segment->multiplier == first->multiplier;
        bool even = segment == first || (segment->offset - before->offset == table->pitch &&
                                         segment->scale_offset - before->scale_offset ==
                                             (segment->dtype->coded ? table->pitch : 0));
        if (!(alone || segment->layer == table->count) || !alike || !even)
            refuse(blob->file.path, "has segment `%s`, which breaks the even order of its table "
                   "(B-08)", shown(segment->name));
        table->count++;
    }
    free(order);
}

static int compare_aliases(const void *a, const void *b) {
    const struct alias *x = a, *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

static const struct alias *alias_of(const struct blob *blob, uint64_t id) {
    struct alias wanted = {id, 0};
    return bsearch(&wanted, blob->aliases, (size_t)blob->num_aliases, sizeof wanted,
                   compare_aliases);
}

/* B-09: pairs of a token id and a row, which can be read in one way only. */
static void read_aliases(struct blob *blob) {
    const char *path = blob->file.path;
    struct json *json = &blob->aliases_json;
    if (!read_json(json, metadata(&blob->file, "row_aliases")))
        refuse(path, "has metadata `row_aliases` that is not valid JSON (B-05)");
    if (json->nodes->kind != IS_LIST)
        refuse(path, "has row aliases that are no list (B-09)");
    blob->aliases = allocated(json->nodes->count, sizeof *blob->aliases);
    for (uint32_t at = json->nodes->first; at; at = json->nodes[at].next) {
        struct alias *alias = &blob->aliases[blob->num_aliases++];
        const struct node *pair = &json->nodes[at], *id = &json->nodes[pair->first];
        if (pair->kind != IS_LIST || pair->count != 2 || !integer(id, 0, &alias->id) ||
            !integer(&json->nodes[id->next], 0, &alias->row) || alias->id >= blob->total_rows ||
            alias->row >= blob->total_rows)
            refuse(path, "has a row alias that is no pair of its rows (B-09)");
    }
    qsort(blob->aliases, (size_t)blob->num_aliases, sizeof *blob->aliases, compare_aliases);
    for (uint64_t i = 0; i < blob->num_aliases; i++)
        if ((i && blob->aliases[i - 1].id == blob->aliases[i].id) ||
            alias_of(blob, blob->aliases[i].row))
            refuse(path, "has row aliases that can be read in two ways (B-09)");
    free_json(json);
}

/* Open a blob, or a shard of one. This reads the header and nothing else. */
static void open_blob(struct blob *blob, const char *path) {
    *blob = (struct blob){0};
    open_file(&blob->file, path);
    check_metadata(&blob->file);
    check_tensors(blob);
    read_segments(blob);
    check_places(blob);
    read_aliases(blob);
    plan_tables(blob);
}

static void close_blob(struct blob *blob) {
    close_file(&blob->file);
    free_json(&blob->segments_json);
    free(blob->segments);
    free(blob->tables);
    free(blob->aliases);
}

/* ---- 6. Shards ---------------------------------------------------------------------------- */

static int compare_shards(const void *a, const void *b) {
    const struct blob *x = a, *y = b;
    return (x->first_row > y->first_row) - (x->first_row < y->first_row);
}

/* B-12: files are those of one blob, each row in one of them. They may come in any order. */
static void check_shards(struct blob *shards, size_t count) {
    static const char *same[] = {"page_size", "num_rows_total", "row_aliases", "segments",
                                 "source_digest"};
    uint64_t next = 0;
    if (count == 1 && shards->num_rows != shards->total_rows)
        refuse(shards->file.path, "is a shard, rows %" PRIu64 " to %" PRIu64 " of %" PRIu64
               "; give all shards of the blob (B-12)", shards->first_row,
               shards->first_row + shards->num_rows - 1, shards->total_rows);
    qsort(shards, count, sizeof *shards, compare_shards);
    for (size_t i = 0; i < count; i++) {
        bool agrees = shards[i].stride == shards->stride;
        for (size_t k = 0; k < sizeof same / sizeof *same; k++) {
            struct text own = metadata(&shards[i].file, same[k]);
            struct text others = metadata(&shards->file, same[k]);
            agrees &= compare_texts(&own, &others) == 0;
        }
        if (!agrees)
            refuse(shards[i].file.path, "and `%s` are not shards of one blob (B-12)",
                   shards->file.path);
        if (shards[i].first_row != next)
            refuse(shards[i].file.path, "begins at row %" PRIu64 "; the shards before it end at "
                   "row %" PRIu64 " (B-12)", shards[i].first_row, next);
        next += shards[i].num_rows;
    }
    if (next != shards->total_rows)
        refuse(shards->file.path, "and the other shards have %" PRIu64 " rows of %" PRIu64
               " (B-12)", next, shards->total_rows);
}

static const struct blob *shard_of(const struct blob *shards, uint64_t row) {
    while (row >= shards->first_row + shards->num_rows)
        shards++;
    return shards;
}

/* ---- 7. Tied heads ------------------------------------------------------------------------ */

struct tied {
    struct file file;
    const struct tensor *codes, *scales, *checksums;
    struct text table;
    uint64_t num_rows, width, group_size, code_bytes, num_groups;
    const struct dtype *dtype;
    float multiplier;
};

/* Rules T-02, T-06, T-03 and T-04. */
static void read_tied_metadata(struct tied *tied) {
    const struct file *file = &tied->file;
    static const char *keys[] = {"format", "version",    "table",      "width",
                                 "dtype",  "group_size", "multiplier", "weights_digest"};
    if (!is(metadata(file, "format"), "pleexport-tied"))
        refuse(file->path, "is a safetensors file, but none of a matrix with rows (T-02)");
    if (header_is_damaged(file))
        refuse(file->path, "is damaged: its header does not match its checksum (T-06)");
    if (!is(metadata(file, "version"), "1"))
        refuse(file->path, "has version `%s`; this reader knows 1 (T-03)",
               shown(metadata(file, "version")));
    bool sound = file->metadata->count == sizeof keys / sizeof *keys;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        sound &= metadata(file, keys[i]).at != NULL;
    if (!sound)
        refuse(file->path, "has metadata of other keys than those that this reader knows (T-04)");
    struct json multiplier = {0};
    tied->table = metadata(file, "table");
    tied->dtype = dtype_of(metadata(file, "dtype"));
    sound = tied->dtype && tied->dtype->coded &&
            integer_in(metadata(file, "width"), 1, &tied->width) &&
            integer_in(metadata(file, "group_size"), 1, &tied->group_size) &&
            read_json(&multiplier, metadata(file, "multiplier")) &&
            multiplier_of(multiplier.nodes, &tied->multiplier);
    free_json(&multiplier);
    if (!sound)
        refuse(file->path, "has malformed metadata (T-04)");
}

/* Rules T-01 and T-05. */
static void check_tied_tensors(struct tied *tied) {
    const struct file *file = &tied->file;
    static const struct {
        const char *name, *dtype;
        unsigned dimensions;
    } known[] = {{"header_checksum", "U64", 1}, {"codes", "U8", 2}, {"scales", "F32", 2},
                 {"checksums", "U64", 1}};
    bool sound = file->num_tensors == 4;
    for (size_t i = 0; sound && i < 4; i++)
        sound = is(file->tensors[i].name, known[i].name) &&
                fits(&file->tensors[i], known[i].dtype, known[i].dimensions);
    if (!sound)
        refuse(file->path, "does not have the tensors header_checksum, codes, scales, checksums, "
                           "in order (T-01)");
    tied->codes = &file->tensors[1];
    tied->scales = &file->tensors[2];
    tied->checksums = &file->tensors[3];
    tied->num_rows = tied->codes->shape[0];
    /* Rows are padded to whole groups, of which one may be wider than the row: below 2^54. */
    tied->num_groups = parts(tied->width, tied->group_size);
    tied->code_bytes = parts(tied->num_groups * tied->group_size * tied->dtype->bits, 8);
    if (!tied->num_rows || file->tensors[0].shape[0] != 1 ||
        tied->codes->shape[1] != tied->code_bytes || tied->scales->shape[0] != tied->num_rows ||
        tied->scales->shape[1] != tied->num_groups || tied->checksums->shape[0] != tied->num_rows)
        refuse(file->path, "has tensors of other shapes than %" PRIu64 " rows of %" PRIu64
               " elements in groups of %" PRIu64 " need (T-05)", tied->num_rows, tied->width,
               tied->group_size);
}

/* Open the file of a tied head, which goes with a blob (T-07) and with a graph (T-11). */
static void open_tied(struct tied *tied, const char *path, const struct blob *blob,
                      const char *weights_digest) {
    *tied = (struct tied){0};
    open_file(&tied->file, path);
    read_tied_metadata(tied);
    check_tied_tensors(tied);
    for (uint64_t i = 0; i < blob->num_tables; i++)
        if (!compare_texts(&blob->tables[i].first->table, &tied->table))
            refuse(path, "does not go with `%s`: both have table `%s` (T-07)", blob->file.path,
                   shown(tied->table));
    if (tied->num_rows < blob->total_rows)
        refuse(path, "has %" PRIu64 " rows, fewer than `%s` (T-07)", tied->num_rows,
               blob->file.path);
    if (weights_digest && !is(metadata(&tied->file, "weights_digest"), weights_digest))
        refuse(path, "is of another bundle: its graph is not that of the manifest (T-11)");
}

/* ---- 8. Lookups --------------------------------------------------------------------------- */

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float half(const unsigned char *p) {
    uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) /* infinities and NaN */
        return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent) /* The bias of a half is 15, that of a float 127. */
        return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    float small = (float)fraction * 0x1p-24f; /* zero and subnormal halves, exactly */
    return sign ? -small : small;
}

/* Element e of a segment without its scale. In packed codes, lowest bits come first. */
static float element(const struct dtype *dtype, const unsigned char *codes, uint64_t e) {
    if (dtype->bits == 32)
        return float_of(le32(codes + 4 * e));
    if (dtype->bits == 16)
        return dtype->name[0] == 'f' ? half(codes + 2 * e)
                                     : float_of((uint32_t)codes[2 * e] << 16 |
                                                (uint32_t)codes[2 * e + 1] << 24);
    if (dtype->bits == 8)
        return (float)(codes[e] < 128 ? codes[e] : codes[e] - 256);
    if (dtype->bits == 4)
        return (float)((codes[e / 2] >> 4 * (e % 2) & 15) - 8);
    return (float)((codes[e / 4] >> 2 * (e % 4) & 3) - 2);
}

/* B-17: code times scale times multiplier, in binary32 and in this order. Places are those that the
 * header says; what else lies in a row is not looked at (B-18). */
static void decode_segment(const struct segment *segment, const unsigned char *row, float *vector) {
    const unsigned char *scales = row + segment->scale_offset;
    for (uint64_t e = 0; e < segment->width; e++) {
        float value = element(segment->dtype, row + segment->offset, e);
        if (segment->dtype->coded) {
            uint64_t group = e / segment->group_size;
            value *= segment->scale_bytes == 2 ? half(scales + 2 * group)
                                               : float_of(le32(scales + 4 * group));
        }
        vector[e] = value * segment->multiplier;
    }
}

/* B-16: a row, copied out of the file and compared with its checksum. What is decoded is the copy,
 * so nothing that happens to the file in between gets through. */
static void take_row(const struct blob *shards, uint64_t row, unsigned char *copy) {
    const struct blob *shard = shard_of(shards, row);
    uint64_t body = shard->stride - CHECKSUM_BYTES;
    memcpy(copy, shard->file.bytes + shard->rows + (row - shard->first_row) * shard->stride,
           (size_t)shard->stride);
    if (xxh3(copy, (size_t)body) != le64(copy + body))
        refuse(shard->file.path, "is damaged: the row of token id %" PRIu64 " does not match its "
               "checksum (B-16)", row);
}

/* T-09: the same of a tied head, whose codes and scales lie apart. */
static void take_tied_row(const struct tied *tied, uint64_t row, unsigned char *copy) {
    const unsigned char *bytes = tied->file.bytes;
    uint64_t scale_bytes = 4 * tied->num_groups, checked = tied->code_bytes + scale_bytes;
    memcpy(copy, bytes + tied->codes->begin + row * tied->code_bytes, (size_t)tied->code_bytes);
    memcpy(copy + tied->code_bytes, bytes + tied->scales->begin + row * scale_bytes,
           (size_t)scale_bytes);
    for (int i = 0; i < 8; i++)
        copy[checked + (unsigned)i] = (unsigned char)(row >> 8 * i);
    if (xxh3(copy, (size_t)checked + 8) != le64(bytes + tied->checksums->begin + 8 * row))
        refuse(tied->file.path, "is damaged: the row of token id %" PRIu64 " does not match its "
               "checksum (T-09)", row);
}

/* T-10: codes are stored plus half of their range, those of 8 bits too; scales are binary32. */
static void decode_tied(const struct tied *tied, const unsigned char *copy, float *vector) {
    const unsigned char *scales = copy + tied->code_bytes;
    for (uint64_t e = 0; e < tied->width; e++) {
        bool bytes = tied->dtype->bits == 8;
        float code = bytes ? (float)(copy[e] - 128) : element(tied->dtype, copy, e);
        float scale = float_of(le32(scales + 4 * (e / tied->group_size)));
        vector[e] = code * scale * tied->multiplier;
    }
}

/* Ask the system to read bytes of a file that are not in memory yet, and do not wait. */
static void ask_for(const struct file *file, uint64_t begin, uint64_t length) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), into = begin % page;
    posix_madvise(file->bytes + (begin - into), (size_t)(length + into), POSIX_MADV_WILLNEED);
}

/* All rows of a prompt are asked for before one is touched: page faults read one by one. */
static void ask_for_row(const struct blob *shards, const struct tied *tied, uint64_t row) {
    const struct blob *shard = shard_of(shards, row);
    ask_for(&shard->file, shard->rows + (row - shard->first_row) * shard->stride, shard->stride);
    if (tied) {
        ask_for(&tied->file, tied->codes->begin + row * tied->code_bytes, tied->code_bytes);
        ask_for(&tied->file, tied->scales->begin + row * 4 * tied->num_groups,
                4 * tied->num_groups);
        ask_for(&tied->file, tied->checksums->begin + 8 * row, 8);
    }
}

/* B-14 and B-15, and T-08: the row of a token id, its alias applied. */
static uint64_t row_of(const struct blob *blob, int64_t id) {
    if (id < 0 || (uint64_t)id >= blob->total_rows)
        refuse(NULL, "token id %" PRId64 " has no row; ids go from 0 to %" PRIu64 " (B-14)", id,
               blob->total_rows - 1);
    const struct alias *alias = alias_of(blob, (uint64_t)id);
    return alias ? alias->row : (uint64_t)id;
}

/* B-19: compare every row and every chunk. Rows in other places have sound checksums of their own;
 * those of their chunks tell. */
static void verify(const struct blob *shards, size_t count, const struct tied *tied) {
    unsigned char *copy = allocated(shards->stride, 1);
    for (size_t i = 0; i < count; i++) {
        const struct blob *shard = &shards[i];
        posix_madvise(shard->file.bytes, (size_t)shard->file.size, POSIX_MADV_SEQUENTIAL);
        uint64_t bytes = shard->num_rows * shard->stride;
        for (uint64_t row = 0; row < shard->num_rows; row++)
            take_row(shards, shard->first_row + row, copy);
        for (uint64_t begin = 0; begin < bytes; begin += CHUNK_BYTES) {
            uint64_t length = bytes - begin < CHUNK_BYTES ? bytes - begin : CHUNK_BYTES;
            uint64_t stored = le64(shard->file.bytes + shard->checksums->begin +
                                   begin / CHUNK_BYTES * CHECKSUM_BYTES);
            if (xxh3(shard->file.bytes + shard->rows + begin, (size_t)length) != stored)
                refuse(shard->file.path, "is damaged: the rows of token ids %" PRIu64 " to %" PRIu64
                       " lie in other places, or the checksum of their chunk is wrong (B-19)",
                       shard->first_row + begin / shard->stride,
                       shard->first_row + (begin + length - 1) / shard->stride);
        }
    }
    free(copy);
    if (tied) {
        copy = allocated(tied->code_bytes + 4 * tied->num_groups + 8, 1);
        for (uint64_t row = 0; row < tied->num_rows; row++)
            take_tied_row(tied, row, copy);
        free(copy);
    }
}

/* ---- 9. Command line ---------------------------------------------------------------------- */

static void print_begin(int64_t id, struct text table) {
    printf("{\"id\": %" PRId64 ", \"table\": \"", id);
    for (size_t i = 0; i < table.length; i++) { /* The name is UTF-8, as all strings of a header. */
        unsigned char c = (unsigned char)table.at[i];
        if (c < 0x20 || c == '"' || c == '\\' || c == 0x7f)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
}

static void print_vector(const float *vector, uint64_t width) {
    for (uint64_t e = 0; e < width; e++) {
        uint32_t bits;
        memcpy(&bits, &vector[e], sizeof bits);
        printf("%02x%02x%02x%02x", bits & 0xff, bits >> 8 & 0xff, bits >> 16 & 0xff, bits >> 24);
    }
}

static void print_row(const struct blob *blob, int64_t id, const unsigned char *row) {
    for (uint64_t i = 0; i < blob->num_tables; i++) {
        const struct table *table = &blob->tables[i];
        struct segment segment = *table->first;
        float *vector = allocated(segment.width, sizeof *vector);
        print_begin(id, segment.table);
        printf("\", \"shape\": [");
        if (segment.layer != NO_LAYER)
            printf("%" PRIu64 ", ", table->count);
        printf("%" PRIu64 "], \"vectors\": \"", segment.width);
        for (uint64_t layer = 0; layer < table->count; layer++) {
            decode_segment(&segment, row, vector);
            print_vector(vector, segment.width);
            segment.offset += table->pitch;
            segment.scale_offset += table->pitch;
        }
        puts("\"}");
        free(vector);
    }
}

static void print_tied_row(const struct tied *tied, int64_t id, const unsigned char *copy) {
    float *vector = allocated(tied->width, sizeof *vector);
    decode_tied(tied, copy, vector);
    print_begin(id, tied->table);
    printf("\", \"shape\": [%" PRIu64 "], \"vectors\": \"", tied->width);
    print_vector(vector, tied->width);
    puts("\"}");
    free(vector);
}

/* Print what a list of token ids looks up, such as `1,2,3`. */
static void look_up(const struct blob *shards, const struct tied *tied, const char *list) {
    size_t count = 1, i = 0;
    for (const char *at = list; *at; at++)
        count += *at == ',';
    int64_t *ids = allocated(count, sizeof *ids);
    for (char *end = (char *)list; i < count; i++) {
        const char *begin = end + (i > 0);
        errno = 0;
        ids[i] = strtoll(begin, &end, 10);
        if (end == begin || errno || *end != (i + 1 < count ? ',' : 0))
            refuse(NULL, "`--ids` takes integers with commas between them, not `%s`", list);
    }
    for (i = 0; i < count; i++)
        ask_for_row(shards, tied, row_of(shards, ids[i]));
    unsigned char *row = allocated(shards->stride, 1), *tied_row = NULL;
    if (tied)
        tied_row = allocated(tied->code_bytes + 4 * tied->num_groups + 8, 1);
    for (i = 0; i < count; i++) {
        take_row(shards, row_of(shards, ids[i]), row);
        if (tied)
            take_tied_row(tied, row_of(shards, ids[i]), tied_row);
        print_row(shards, ids[i], row);
        if (tied)
            print_tied_row(tied, ids[i], tied_row);
    }
    free(row);
    free(tied_row);
    free(ids);
}

static void print_hash(const char *path) {
    struct file file = {.path = path};
    struct stat status;
    if (!stat(path, &status) && status.st_size < 8) { /* too short for map_file */
        unsigned char bytes[8];
        FILE *stream = fopen(path, "rb");
        size_t length = stream ? fread(bytes, 1, sizeof bytes, stream) : 0;
        if (stream)
            fclose(stream);
        printf("%016" PRIx64 "\n", xxh3(bytes, length));
        return;
    }
    map_file(&file);
    printf("%016" PRIx64 "\n", xxh3(file.bytes, (size_t)file.size));
    close_file(&file);
}

static const char usage[] =
    "usage: blob FILE... [--ids 1,2,3] [--tied FILE] [--weights-digest DIGEST] [--verify]\n"
    "       blob --xxh3 FILE...\n\n"
    "FILE...           a blob, or all its shards\n"
    "--ids             print what token ids look up\n"
    "--tied            the file of a tied head, whose table is looked up too\n"
    "--weights-digest  what its graph's digest has to be: the manifest's\n"
    "--verify          compare every row and chunk with its checksum\n"
    "--xxh3            print the XXH3-64 of files\n";

int main(int count, char **words) {
    const char *ids = NULL, *tied_path = NULL, *weights_digest = NULL;
    bool whole = false, hash = false;
    struct blob *shards = allocated((uint64_t)count, sizeof *shards);
    size_t num_shards = 0;
    for (int i = 1; i < count; i++) {
        const char **value = !strcmp(words[i], "--ids")              ? &ids
                             : !strcmp(words[i], "--tied")           ? &tied_path
                             : !strcmp(words[i], "--weights-digest") ? &weights_digest
                                                                     : NULL;
        if (value && i + 1 < count)
            *value = words[++i];
        else if (!strcmp(words[i], "--verify"))
            whole = true;
        else if (!strcmp(words[i], "--xxh3"))
            hash = true;
        else if (words[i][0] == '-')
            refuse(NULL, "`%s` is no option, or lacks its value\n\n%s", words[i], usage);
        else if (hash)
            print_hash(words[i]);
        else
            open_blob(&shards[num_shards++], words[i]);
    }
    if (!hash) {
        struct tied tied;
        if (!num_shards)
            refuse(NULL, "there is no file to read\n\n%s", usage);
        check_shards(shards, num_shards);
        if (tied_path)
            open_tied(&tied, tied_path, shards, weights_digest);
        if (whole)
            verify(shards, num_shards, tied_path ? &tied : NULL);
        if (ids)
            look_up(shards, tied_path ? &tied : NULL, ids);
        if (tied_path)
            close_file(&tied.file);
    }
    for (size_t i = 0; i < num_shards; i++)
        close_blob(&shards[i]);
    free(shards);
    if (fflush(stdout) || ferror(stdout))
        refuse(NULL, "the output cannot be written: %s", strerror(errno));
    return 0;
}
