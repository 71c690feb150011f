/* The decoder's operations on a CPU, for float32 and bfloat16. Sums are fp32 whatever the storage is.
 *
 * Every result depends on its own token alone, in an order that neither batch size nor chunked prefill, prefix hits or
 * shared prefixes change: batch invariance costs nothing here.
 *
 * The bodies are compiled once per instruction set and chosen at run time. Loaded by rollout_server/kernels/native.py
 * through ctypes; OpenMP symbols resolve against the runtime that torch has loaded, so that both share one thread pool.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LRL_DISPATCH 1
#include <immintrin.h>
#endif

#define PAGE 16
#define MAX_DIM 256
#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

static inline float to_f32(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float rounded(float x, int bf16) { return bf16 ? to_f32(to_bf16(x)) : x; }

static inline float scalar(const void *base, size_t index, int bf16) {
    return bf16 ? to_f32(((const uint16_t *)base)[index]) : ((const float *)base)[index];
}

static inline void set_scalar(void *base, size_t index, float x, int bf16) {
    if (bf16) ((uint16_t *)base)[index] = to_bf16(x);
    else ((float *)base)[index] = x;
}

typedef struct {
    const void *q; /* [tokens, heads, dim] */
    const void *keys, *values;
    void *out;                  /* [tokens, heads, dim] */
    float *states;              /* [tokens, heads, 32 + dim], where runs are shared */
    const int32_t *positions;   /* [tokens] */
    const int32_t *offsets;     /* [rows + 1] */
    const int32_t *tables;      /* [lines, table_width] */
    const int32_t *lines;       /* [rows] */
    const int32_t *shared;      /* [rows]: leading pages that shared runs have covered, or NULL */
    const int32_t *bite_rows;   /* [bites]: tasks of a few tokens each, so that long rows spread over threads */
    const int64_t *bite_tokens; /* [bites] */
    int64_t rows, bite, bites, table_width; /* `bite`: tokens of one task */
    int heads, kv_heads, dim;
    float scale;
} attention_args;

#if LRL_DISPATCH
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,bmi2,prefer-vector-width=512")
#define LRL_AVX512BF16 1
#define ISA(name) name##_avx512bf16
#include "bodies.h"
#undef ISA
#undef LRL_AVX512BF16
#pragma GCC pop_options

#define LRL_AVX512BF16 0
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,f16c")
#define ISA(name) name##_avx2
#include "bodies.h"
#undef ISA
#pragma GCC pop_options
#else
#define LRL_AVX512BF16 0
#endif

#define ISA(name) name##_portable
#include "bodies.h"
#undef ISA

/* The highest instruction set that may be used: 0 portable, 1 AVX2, 2 AVX-512 BF16. Lowered only to test the others. */
static int highest = 2;

void lrl_use_at_most(int level) { highest = level; }

#if LRL_DISPATCH
#define CHOOSE(name, ...)                                                                                 \
    if (highest > 1 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) name##_avx512bf16(__VA_ARGS__); \
    else if (highest > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) name##_avx2(__VA_ARGS__); \
    else name##_portable(__VA_ARGS__)
#else
#define CHOOSE(name, ...) name##_portable(__VA_ARGS__)
#endif

/* An operation as data. The functions above share its loops among the threads of the parallel region they are called in, with a
 * barrier after each; all threads of the region call them with the same arguments. */
enum { LINEAR, ADD_LORA, ADD_NORM, SILU_MUL, ROPE_STORE, ATTENTION };

typedef struct {
    int64_t kind, bf16;
    const void *p[16];
    int64_t n[8];
    double f;
} operation;

static void perform(const operation *o) {
    const void *const *p = o->p;
    const int64_t *n = o->n;
    const int bf16 = (int)o->bf16;
    switch (o->kind) {
        case LINEAR: CHOOSE(linear, p[0], p[1], p[2], (void *)p[3], n[0], n[1], n[2], bf16); break;
        case ADD_LORA: CHOOSE(add_lora, (void *)p[0], p[1], p[2], p[3], p[4], n[0], n[1], n[2], bf16); break;
        case ADD_NORM: CHOOSE(add_norm, (void *)p[0], p[1], p[2], (void *)p[3], n[0], (int)n[1], (float)o->f, bf16); break;
        case SILU_MUL: CHOOSE(silu_mul, p[0], (void *)p[1], n[0], (int)n[1], bf16); break;
        case ROPE_STORE:
            CHOOSE(rope_store, p[0], (void *)p[1], (void *)p[2], (void *)p[3], p[4], p[5], p[6], p[7], n[0], (int)n[1], (int)n[2],
                   (int)n[3], bf16);
            break;
        case ATTENTION: {
            const attention_args a = {p[0], p[1], p[2], (void *)p[3], (void *)p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11],
                                      n[0], n[1], n[2], n[3], (int)n[4], (int)n[5], (int)n[6], (float)o->f};
            CHOOSE(attention, &a, p[12], p[13], n[7], p[14], bf16);
            break;
        }
    }
}

/* Operations one after the other, by all threads: a single one, or a whole recorded pass without a return to Python. */
void lrl_run(const operation *operations, int64_t count, int64_t parallel) {
#pragma omp parallel if (parallel)
    for (int64_t i = 0; i < count; i++) perform(operations + i);
}

void lrl_draw(const void *logits, const float *temperatures, const double *uniforms, double *spans, int64_t *ids,
                float *logprobs, float *entropies, int64_t rows, int64_t vocab, int bf16) {
#pragma omp parallel
    { CHOOSE(sample, logits, temperatures, uniforms, spans, ids, logprobs, entropies, rows, vocab, bf16); }
}

/* Build tools expect an extension module to have this symbol. Nothing calls it: the library is loaded through ctypes, which
 * is why Python's headers are not needed. */
void *PyInit__kernels(void) { return NULL; }
