/* Paged attention and its neighbours on a CPU, one query token at a time.
 *
 * Every (token, head) is computed on its own, in an order that depends on nothing but its own keys: results do not change
 * with the batch, with chunked prefill or with prefix hits. Sums are fp32 whatever the storage is.
 *
 * Keys are stored as [page, kv head, dim, 16] and values as [page, kv head, 16, dim], 16 being the page size: one page's
 * keys fill a 512-bit vector per dimension, so that scores need no horizontal sums.
 *
 * Loaded by rollout_server/kernels/native.py through ctypes; OpenMP symbols resolve against the runtime torch has loaded,
 * so that both share one thread pool.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 16
#define MAX_DIM 256
#define MAX_GROUP 16

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define CLONES __attribute__((noinline))
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

INLINE float to_f32(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

INLINE void load16(f32x16 *out, const void *base, size_t index, int bf16) {
    if (bf16) {
        u32x16 wide = __builtin_convertvector(*(const u16x16 *)((const uint16_t *)base + index), u32x16) << 16;
        memcpy(out, &wide, 64);
    } else {
        *out = *(const f32x16 *)((const float *)base + index);
    }
}

/* x = exp(x - top) for x <= top, to fp32 rounding: 2^n times a polynomial of the remainder. exp(-inf) becomes 1e-38. */
INLINE void exp16(f32x16 *x, float top) {
    f32x16 y = (*x - top) * 1.44269504088896f;
    for (int i = 0; i < 16; i++) y[i] = y[i] < -126.0f ? -126.0f : y[i];
    i32x16 n = __builtin_convertvector(y - 0.5f, i32x16);
    const f32x16 r = (y - __builtin_convertvector(n, f32x16)) * 0.693147180559945f;
    f32x16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const i32x16 power = (n + 127) << 23;
    f32x16 scale;
    memcpy(&scale, &power, 64);
    *x = p * scale;
}

typedef struct {
    const void *q;         /* [tokens, heads, dim] */
    const void *keys;      /* [pages, kv_heads, dim, PAGE] */
    const void *values;    /* [pages, kv_heads, PAGE, dim] */
    void *out;             /* [tokens, heads, dim] */
    const int32_t *pages;  /* all rows' page tables, one after the other */
    const int64_t *table;  /* [tokens]: where in `pages` the token's row begins */
    const int32_t *length; /* [tokens]: keys that the token sees */
    int64_t tokens;
    int heads, kv_heads, dim;
    float scale;
} attention_args;

INLINE void attend(const attention_args *a, int64_t token, int kv_head, float *scores, int bf16, int group, int dim) {
    const int length = a->length[token];
    const int pages = (length + PAGE - 1) / PAGE;
    const int32_t *page_table = a->pages + a->table[token];
    const size_t q_at = ((size_t)token * a->heads + (size_t)kv_head * group) * dim;
    float q[MAX_GROUP * MAX_DIM];
    for (int i = 0; i < group * dim; i++)
        q[i] = (bf16 ? to_f32(((const uint16_t *)a->q)[q_at + i]) : ((const float *)a->q)[q_at + i]) * a->scale;

    const size_t stride = (size_t)pages * PAGE;
    float top[MAX_GROUP];
    for (int g = 0; g < group; g++) top[g] = -INFINITY;
    for (int p = 0; p < pages; p++) {
        const size_t at = ((size_t)page_table[p] * a->kv_heads + kv_head) * dim * PAGE;
        f32x16 sum[MAX_GROUP];
        for (int g = 0; g < group; g++) sum[g] = (f32x16){0};
        for (int d = 0; d < dim; d++) {
            f32x16 key;
            load16(&key, a->keys, at + (size_t)d * PAGE, bf16);
            for (int g = 0; g < group; g++) sum[g] += key * q[g * dim + d];
        }
        const int valid = length - p * PAGE < PAGE ? length - p * PAGE : PAGE;
        for (int g = 0; g < group; g++) {
            float *s = scores + g * stride + (size_t)p * PAGE;
            memcpy(s, &sum[g], 64);
            for (int j = 0; j < valid; j++)
                if (s[j] > top[g]) top[g] = s[j];
            for (int j = valid; j < PAGE; j++) s[j] = -INFINITY;
        }
    }
    float norm[MAX_GROUP];
    for (int g = 0; g < group; g++) {
        float *s = scores + g * stride, total = 0;
        f32x16 totals = {0};
        for (size_t j = 0; j < stride; j += PAGE) {
            f32x16 x;
            memcpy(&x, s + j, 64);
            exp16(&x, top[g]);
            memcpy(s + j, &x, 64);
            totals += x;
        }
        for (int j = 0; j < 16; j++) total += totals[j];
        norm[g] = 1.0f / total;
    }
    f32x16 acc[MAX_GROUP * (MAX_DIM / 16)];
    const int chunks = dim / 16;
    for (int i = 0; i < group * chunks; i++) acc[i] = (f32x16){0};
    for (int p = 0; p < pages; p++) {
        const size_t at = ((size_t)page_table[p] * a->kv_heads + kv_head) * dim * PAGE;
        const int valid = length - p * PAGE < PAGE ? length - p * PAGE : PAGE;
        for (int j = 0; j < valid; j++)
            for (int c = 0; c < chunks; c++) {
                f32x16 value;
                load16(&value, a->values, at + (size_t)j * dim + (size_t)c * 16, bf16);
                for (int g = 0; g < group; g++) acc[g * chunks + c] += value * scores[g * stride + (size_t)p * PAGE + j];
            }
    }
    for (int g = 0; g < group; g++) {
        const float *sums = (const float *)(acc + g * chunks);
        for (int d = 0; d < dim; d++) {
            const float x = sums[d] * norm[g];
            if (bf16) ((uint16_t *)a->out)[q_at + (size_t)g * dim + d] = to_bf16(x);
            else ((float *)a->out)[q_at + (size_t)g * dim + d] = x;
        }
    }
}

/* The common shapes get loops of known length; anything else takes the general path. */
CLONES static void attend_bf16(const attention_args *a, int64_t token, int kv_head, float *scores) {
    const int group = a->heads / a->kv_heads;
    if (group == 3 && a->dim == 64) attend(a, token, kv_head, scores, 1, 3, 64);
    else if (group == 4 && a->dim == 128) attend(a, token, kv_head, scores, 1, 4, 128);
    else attend(a, token, kv_head, scores, 1, group, a->dim);
}

CLONES static void attend_f32(const attention_args *a, int64_t token, int kv_head, float *scores) {
    const int group = a->heads / a->kv_heads;
    if (group == 3 && a->dim == 64) attend(a, token, kv_head, scores, 0, 3, 64);
    else attend(a, token, kv_head, scores, 0, group, a->dim);
}

/* 0 on success, 1 when memory for the scores could not be had, 2 for a shape outside the limits. */
int lrl_attention(const void *q, const void *keys, const void *values, void *out, const int32_t *pages,
                  const int64_t *table, const int32_t *length, int64_t tokens, int heads, int kv_heads, int dim,
                  float scale, int bf16) {
    attention_args a = {q, keys, values, out, pages, table, length, tokens, heads, kv_heads, dim, scale};
    const int group = heads / kv_heads;
    if (dim % 16 || dim > MAX_DIM || group > MAX_GROUP) return 2;
    int longest = 1, failed = 0;
    for (int64_t t = 0; t < tokens; t++)
        if (length[t] > longest) longest = length[t];
    const size_t room = (size_t)group * ((longest + PAGE - 1) / PAGE * PAGE);
#pragma omp parallel
    {
        float *scores = malloc(room * sizeof(float));
        if (!scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < tokens * kv_heads; i++) {
            if (!scores) continue;
            if (bf16) attend_bf16(&a, i / kv_heads, (int)(i % kv_heads), scores);
            else attend_f32(&a, i / kv_heads, (int)(i % kv_heads), scores);
        }
        free(scores);
    }
    return failed;
}

/* Rotate q and k in place and store k and v at the tokens' slots.
 * qkv: [tokens, (heads + 2 kv_heads) * dim]; q_out: [tokens, heads, dim]; cos, sin: [positions, dim / 2], fp32.
 * Rounding follows the order of the reference: products are rounded to the storage type before they are added. */
INLINE float rounded(float x, int bf16) { return bf16 ? to_f32(to_bf16(x)) : x; }

INLINE void rope_token(const void *qkv, void *q_out, void *keys, void *values, const float *cosines, const float *sines,
                       int position, int64_t slot, int64_t token, int heads, int kv_heads, int dim, int bf16) {
    const int half = dim / 2;
    const size_t width = (size_t)(heads + 2 * kv_heads) * dim, from = token * width;
    const float *cosine = cosines + (size_t)position * half, *sine = sines + (size_t)position * half;
    const size_t page = (size_t)(slot / PAGE), offset = (size_t)(slot % PAGE);
    for (int h = 0; h < heads + kv_heads; h++) {
        for (int d = 0; d < half; d++) {
            const size_t i = from + (size_t)h * dim + d;
            const float x = bf16 ? to_f32(((const uint16_t *)qkv)[i]) : ((const float *)qkv)[i];
            const float y = bf16 ? to_f32(((const uint16_t *)qkv)[i + half]) : ((const float *)qkv)[i + half];
            const float c = rounded(cosine[d], bf16), s = rounded(sine[d], bf16);
            const float a = rounded(x * c, bf16) - rounded(y * s, bf16);
            const float b = rounded(y * c, bf16) + rounded(x * s, bf16);
            if (h < heads) {
                const size_t o = ((size_t)token * heads + h) * dim + d;
                if (bf16) ((uint16_t *)q_out)[o] = to_bf16(a), ((uint16_t *)q_out)[o + half] = to_bf16(b);
                else ((float *)q_out)[o] = a, ((float *)q_out)[o + half] = b;
            } else {
                const size_t o = ((page * kv_heads + (h - heads)) * dim + d) * PAGE + offset;
                if (bf16) ((uint16_t *)keys)[o] = to_bf16(a), ((uint16_t *)keys)[o + (size_t)half * PAGE] = to_bf16(b);
                else ((float *)keys)[o] = a, ((float *)keys)[o + (size_t)half * PAGE] = b;
            }
        }
    }
    const size_t size = bf16 ? 2 : 4;
    for (int h = 0; h < kv_heads; h++)
        memcpy((char *)values + ((page * kv_heads + h) * PAGE + offset) * dim * size,
               (const char *)qkv + (from + (size_t)(heads + kv_heads + h) * dim) * size, dim * size);
}

CLONES static void rope_bf16(const void *qkv, void *q, void *k, void *v, const float *c, const float *s, int position,
                             int64_t slot, int64_t token, int heads, int kv_heads, int dim) {
    rope_token(qkv, q, k, v, c, s, position, slot, token, heads, kv_heads, dim, 1);
}

CLONES static void rope_f32(const void *qkv, void *q, void *k, void *v, const float *c, const float *s, int position,
                            int64_t slot, int64_t token, int heads, int kv_heads, int dim) {
    rope_token(qkv, q, k, v, c, s, position, slot, token, heads, kv_heads, dim, 0);
}

void lrl_rope_store(const void *qkv, void *q, void *keys, void *values, const float *cosines, const float *sines,
                    const int32_t *positions, const int64_t *slots, int64_t tokens, int heads, int kv_heads, int dim,
                    int bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        if (bf16) rope_bf16(qkv, q, keys, values, cosines, sines, positions[t], slots[t], t, heads, kv_heads, dim);
        else rope_f32(qkv, q, keys, values, cosines, sines, positions[t], slots[t], t, heads, kv_heads, dim);
    }
}

/* Root-mean-square norm with the residual added first: x += delta (stored back); out = norm(x) * weight. */
INLINE void norm_token(void *x, const void *delta, const void *weight, void *out, int64_t token, int width, float eps,
                       int bf16) {
    const size_t at = (size_t)token * width;
    float sum = 0;
    if (bf16) {
        uint16_t *row = (uint16_t *)x + at, *to = (uint16_t *)out + at;
        const uint16_t *add = delta ? (const uint16_t *)delta + at : NULL, *w = weight;
        if (add)
            for (int i = 0; i < width; i++) row[i] = to_bf16(to_f32(row[i]) + to_f32(add[i]));
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; i++) sum += to_f32(row[i]) * to_f32(row[i]);
        const float r = 1.0f / sqrtf(sum / width + eps);
        for (int i = 0; i < width; i++) to[i] = to_bf16(rounded(to_f32(row[i]) * r, 1) * to_f32(w[i]));
    } else {
        float *row = (float *)x + at, *to = (float *)out + at;
        const float *add = delta ? (const float *)delta + at : NULL, *w = weight;
        if (add)
            for (int i = 0; i < width; i++) row[i] += add[i];
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; i++) sum += row[i] * row[i];
        const float r = 1.0f / sqrtf(sum / width + eps);
        for (int i = 0; i < width; i++) to[i] = row[i] * r * w[i];
    }
}

CLONES static void norm_bf16(void *x, const void *delta, const void *weight, void *out, int64_t t, int width, float eps) {
    norm_token(x, delta, weight, out, t, width, eps, 1);
}

CLONES static void norm_f32(void *x, const void *delta, const void *weight, void *out, int64_t t, int width, float eps) {
    norm_token(x, delta, weight, out, t, width, eps, 0);
}

void lrl_add_norm(void *x, const void *delta, const void *weight, void *out, int64_t tokens, int width, float eps,
                  int bf16) {
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (int64_t t = 0; t < tokens; t++) {
        if (bf16) norm_bf16(x, delta, weight, out, t, width, eps);
        else norm_f32(x, delta, weight, out, t, width, eps);
    }
}

/* Build tools expect an extension module to have this symbol. Nothing calls it: the library is loaded through ctypes, which
 * is why Python's headers are not needed. */
void *PyInit__attention(void) { return NULL; }
