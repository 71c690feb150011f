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

#if LRL_DISPATCH
#define CHOOSE(name, ...)                                                                                 \
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) name##_avx512bf16(__VA_ARGS__); \
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) name##_avx2(__VA_ARGS__);    \
    else name##_portable(__VA_ARGS__)
#else
#define CHOOSE(name, ...) name##_portable(__VA_ARGS__)
#endif

void lrl_linear(const void *x, const void *packed, const void *bias, void *y, int64_t rows, int64_t lanes,
                int64_t outputs, int bf16) {
    CHOOSE(linear, x, packed, bias, y, rows, lanes, outputs, bf16);
}

void lrl_add_lora(void *y, const void *x, const int64_t *spans, const void *const *pairs, const float *scales,
                  int64_t count, int64_t inputs, int64_t outputs, int bf16) {
    CHOOSE(add_lora, y, x, spans, pairs, scales, count, inputs, outputs, bf16);
}

void lrl_add_norm(void *x, const void *delta, const void *weight, void *out, int64_t tokens, int width, float eps, int bf16) {
    CHOOSE(add_norm, x, delta, weight, out, tokens, width, eps, bf16);
}

void lrl_silu_mul(const void *gate_up, void *out, int64_t tokens, int width, int bf16) {
    CHOOSE(silu_mul, gate_up, out, tokens, width, bf16);
}

void lrl_rope_store(const void *qkv, void *q, void *keys, void *values, const float *cosines, const float *sines,
                    const int32_t *positions, const int64_t *cells, int64_t tokens, int heads, int kv_heads, int dim,
                    int bf16) {
    CHOOSE(rope_store, qkv, q, keys, values, cosines, sines, positions, cells, tokens, heads, kv_heads, dim, bf16);
}

void lrl_attention(const void *q, const void *keys, const void *values, void *out, float *states,
                   const int32_t *positions, const int32_t *offsets, const int32_t *tables, const int32_t *lines,
                   const int32_t *shared, const int32_t *bite_rows, const int64_t *bite_tokens, int64_t rows, int64_t bite, int64_t bites,
                   int64_t table_width, int heads, int kv_heads, int dim, float scale, const int32_t *runs,
                   const int32_t *run_rows, int64_t levels, const int32_t *level_runs, int bf16) {
    const attention_args a = {q,    keys,  values,      out,   states,   positions, offsets, tables, lines, shared, bite_rows,
                              bite_tokens, rows, bite, bites, table_width, heads, kv_heads, dim, scale};
    CHOOSE(attention, &a, runs, run_rows, levels, level_runs, bf16);
}

void lrl_sample(const void *logits, const float *temperatures, const double *uniforms, double *spans, int64_t *ids,
                float *logprobs, int64_t rows, int64_t vocab, int bf16) {
    CHOOSE(sample, logits, temperatures, uniforms, spans, ids, logprobs, rows, vocab, bf16);
}

/* Build tools expect an extension module to have this symbol. Nothing calls it: the library is loaded through ctypes, which
 * is why Python's headers are not needed. */
void *PyInit__kernels(void) { return NULL; }
