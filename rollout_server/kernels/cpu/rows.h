/* What happens to one token's row between the linear maps: norm, rotation, activation. */

/* Root-mean-square norm with the residual added first: x += delta (stored back); out = norm(x) * weight. */
INLINE void ISA(norm_row)(void *x, const void *delta, const void *weight, void *out, int64_t token, int width, float eps,
                          int bf16) {
    const size_t at = (size_t)token * width;
    const int whole = width / 16 * 16;
    f32x16 squares = {0};
    for (int i = 0; i < whole; i += 16) {
        f32x16 v = ISA(get)(x, at + i, bf16);
        if (delta) {
            v = ISA(rounded)(v + ISA(get)(delta, at + i, bf16), bf16);
            ISA(put)(x, at + i, v, bf16);
        }
        squares += v * v;
    }
    float sum = ISA(sum)(squares);
    for (int i = whole; i < width; i++) {
        float v = scalar(x, at + i, bf16);
        if (delta) set_scalar(x, at + i, v = rounded(v + scalar(delta, at + i, bf16), bf16), bf16);
        sum += v * v;
    }
    const float r = 1.0f / sqrtf(sum / width + eps);
    for (int i = 0; i < whole; i += 16) {
        const f32x16 v = ISA(rounded)(ISA(get)(x, at + i, bf16) * r, bf16);
        ISA(put)(out, at + i, v * ISA(get)(weight, i, bf16), bf16);
    }
    for (int i = whole; i < width; i++)
        set_scalar(out, at + i, rounded(scalar(x, at + i, bf16) * r, bf16) * scalar(weight, i, bf16), bf16);
}

static void ISA(norm_bf16)(void *x, const void *delta, const void *weight, void *out, int64_t t, int width, float eps) {
    ISA(norm_row)(x, delta, weight, out, t, width, eps, 1);
}

static void ISA(norm_f32)(void *x, const void *delta, const void *weight, void *out, int64_t t, int width, float eps) {
    ISA(norm_row)(x, delta, weight, out, t, width, eps, 0);
}

static void ISA(add_norm)(void *x, const void *delta, const void *weight, void *out, int64_t tokens, int width, float eps,
                          int bf16) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) (bf16 ? ISA(norm_bf16) : ISA(norm_f32))(x, delta, weight, out, t, width, eps);
}

/* silu(gate) * up. gate_up: [tokens, 2 width]; silu is rounded to the storage type before the product. */
INLINE void ISA(silu_row)(const void *gate_up, void *out, int64_t token, int width, int bf16) {
    const size_t from = (size_t)token * 2 * width, to = (size_t)token * width;
    int i = 0;
    for (; i + 16 <= width; i += 16) {
        const f32x16 gate = ISA(get)(gate_up, from + i, bf16), up = ISA(get)(gate_up, from + width + i, bf16);
        const f32x16 minus = -1.0f * ISA(larger)(gate, ISA(splat)(-87.0f));
        ISA(put)(out, to + i, ISA(rounded)(gate / (1.0f + ISA(exp)(minus)), bf16) * up, bf16);
    }
    for (; i < width; i++) {
        const float gate = scalar(gate_up, from + i, bf16), up = scalar(gate_up, from + width + i, bf16);
        set_scalar(out, to + i, rounded(gate / (1.0f + expf(-gate)), bf16) * up, bf16);
    }
}

static void ISA(silu_bf16)(const void *gate_up, void *out, int64_t t, int width) { ISA(silu_row)(gate_up, out, t, width, 1); }

static void ISA(silu_f32)(const void *gate_up, void *out, int64_t t, int width) { ISA(silu_row)(gate_up, out, t, width, 0); }

static void ISA(silu_mul)(const void *gate_up, void *out, int64_t tokens, int width, int bf16) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) (bf16 ? ISA(silu_bf16) : ISA(silu_f32))(gate_up, out, t, width);
}

/* Rotate q and k and store k and v in the tokens' cells.
 * qkv: [tokens, (heads + 2 kv_heads) * dim]; q_out: [tokens, heads, dim]; cos, sin: [positions, dim / 2], fp32.
 * Rounding follows the order of the reference: products are rounded to the storage type before they are added. */
INLINE void ISA(rope_row)(const void *qkv, void *q_out, void *keys, void *values, const float *cosines,
                          const float *sines, int position, int64_t cell, int64_t token, int heads, int kv_heads, int dim,
                          int bf16) {
    const int half = dim / 2;
    const size_t from = (size_t)token * (heads + 2 * kv_heads) * dim;
    const float *cosine = cosines + (size_t)position * half, *sine = sines + (size_t)position * half;
    const size_t page = (size_t)(cell / PAGE), offset = (size_t)(cell % PAGE);
    float rotated[MAX_DIM];
    for (int h = 0; h < heads + kv_heads; h++) {
        const size_t i = from + (size_t)h * dim;
        int d = 0;
        for (; d + 16 <= half; d += 16) {
            const f32x16 x = ISA(get)(qkv, i + d, bf16), y = ISA(get)(qkv, i + d + half, bf16);
            const f32x16 c = ISA(rounded)(ISA(load_f32)(cosine + d), bf16), s = ISA(rounded)(ISA(load_f32)(sine + d), bf16);
            const f32x16 a = ISA(rounded)(ISA(rounded)(x * c, bf16) - ISA(rounded)(y * s, bf16), bf16);
            const f32x16 b = ISA(rounded)(ISA(rounded)(y * c, bf16) + ISA(rounded)(x * s, bf16), bf16);
            memcpy(rotated + d, &a, 64);
            memcpy(rotated + d + half, &b, 64);
        }
        for (; d < half; d++) {
            const float x = scalar(qkv, i + d, bf16), y = scalar(qkv, i + d + half, bf16);
            const float c = rounded(cosine[d], bf16), s = rounded(sine[d], bf16);
            rotated[d] = rounded(rounded(x * c, bf16) - rounded(y * s, bf16), bf16);
            rotated[d + half] = rounded(rounded(y * c, bf16) + rounded(x * s, bf16), bf16);
        }
        if (h < heads) {
            const size_t o = ((size_t)token * heads + h) * dim;
            for (int j = 0; j < dim; j += 16) ISA(put)(q_out, o + j, ISA(load_f32)(rotated + j), bf16);
        } else {
            const int lanes = bf16 ? dim / 2 : dim;
            uint32_t lane[MAX_DIM], *to = (uint32_t *)keys + (page * kv_heads + (h - heads)) * lanes * PAGE + offset;
            for (int j = 0; j < dim; j += 16) ISA(put)(lane, j, ISA(load_f32)(rotated + j), bf16);
            for (int j = 0; j < lanes; j++) to[(size_t)j * PAGE] = lane[j];
        }
    }
    for (int h = 0; h < kv_heads; h++) {
        const size_t i = from + (size_t)(heads + kv_heads + h) * dim, o = (page * kv_heads + h) * PAGE * dim;
        if (bf16) {
            uint16_t *pair = (uint16_t *)values + o + offset / 2 * 2 * dim + offset % 2;
            for (int d = 0; d < dim; d++) pair[2 * d] = ((const uint16_t *)qkv)[i + d];
        } else {
            memcpy((float *)values + o + offset * dim, (const float *)qkv + i, dim * sizeof(float));
        }
    }
}

static void ISA(rope_bf16)(const void *qkv, void *q, void *k, void *v, const float *c, const float *s, int position,
                           int64_t cell, int64_t token, int heads, int kv_heads, int dim) {
    ISA(rope_row)(qkv, q, k, v, c, s, position, cell, token, heads, kv_heads, dim, 1);
}

static void ISA(rope_f32)(const void *qkv, void *q, void *k, void *v, const float *c, const float *s, int position,
                          int64_t cell, int64_t token, int heads, int kv_heads, int dim) {
    ISA(rope_row)(qkv, q, k, v, c, s, position, cell, token, heads, kv_heads, dim, 0);
}

static void ISA(rope_store)(const void *qkv, void *q, void *keys, void *values, const float *cosines, const float *sines,
                            const int32_t *positions, const int64_t *cells, int64_t tokens, int heads, int kv_heads,
                            int dim, int bf16) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        (bf16 ? ISA(rope_bf16) : ISA(rope_f32))(qkv, q, keys, values, cosines, sines, positions[t], cells[t], t, heads,
                                                kv_heads, dim);
}
