/* Vectors of sixteen 32-bit lanes, and what the kernels do with them. Included once per instruction set by kernels.c.
 *
 * A lane holds one fp32 number or two neighbouring bf16 numbers, the first in the low half. `dp` multiplies lanes and adds
 * into fp32, so that one kernel body serves both types: with bf16 it has half as many lanes along the summed dimension. */

INLINE f32x16 ISA(load_f32)(const void *at) {
    f32x16 x;
    memcpy(&x, at, 64);
    return x;
}

INLINE u32x16 ISA(load_lanes)(const void *at) {
    u32x16 x;
    memcpy(&x, at, 64);
    return x;
}

INLINE f32x16 ISA(as_f32)(u32x16 bits) {
    f32x16 x;
    memcpy(&x, &bits, 64);
    return x;
}

INLINE f32x16 ISA(splat)(float x) { return (f32x16){0} + x; }

INLINE f32x16 ISA(dp)(f32x16 sum, u32x16 a, u32x16 b, int bf16) {
#if LRL_AVX512BF16
    if (bf16) return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    return (f32x16)_mm512_fmadd_ps((__m512)ISA(as_f32)(a), (__m512)ISA(as_f32)(b), (__m512)sum);
#else
    if (bf16) {
        sum += ISA(as_f32)(a << 16) * ISA(as_f32)(b << 16);
        return sum + ISA(as_f32)(a & 0xffff0000u) * ISA(as_f32)(b & 0xffff0000u);
    }
    return sum + ISA(as_f32)(a) * ISA(as_f32)(b);
#endif
}

INLINE f32x16 ISA(widen)(u16x16 x) { return ISA(as_f32)(__builtin_convertvector(x, u32x16) << 16); }

/* Round to nearest even. Not a number stays one: the payload's top bit survives the shift. */
INLINE u16x16 ISA(narrow)(f32x16 x) {
#if LRL_AVX512BF16
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    u16x16 out;
    memcpy(&out, &narrow, 32);
    return out;
#else
    u32x16 bits;
    memcpy(&bits, &x, 64);
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, u16x16);
#endif
}

INLINE f32x16 ISA(rounded)(f32x16 x, int bf16) { return bf16 ? ISA(widen)(ISA(narrow)(x)) : x; }

/* Sixteen numbers of the storage type at `index`. */
INLINE f32x16 ISA(get)(const void *base, size_t index, int bf16) {
    if (!bf16) return ISA(load_f32)((const float *)base + index);
    u16x16 x;
    memcpy(&x, (const uint16_t *)base + index, 32);
    return ISA(widen)(x);
}

INLINE void ISA(put)(void *base, size_t index, f32x16 x, int bf16) {
    if (!bf16) {
        memcpy((float *)base + index, &x, 64);
        return;
    }
    const u16x16 narrow = ISA(narrow)(x);
    memcpy((uint16_t *)base + index, &narrow, 32);
}

INLINE f32x16 ISA(larger)(f32x16 a, f32x16 b) {
#if LRL_AVX512BF16
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

/* Sums and maxima of lanes in one fixed order. */
INLINE float ISA(sum)(f32x16 x) {
    float s[16];
    memcpy(s, &x, 64);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

INLINE float ISA(top)(f32x16 x) {
#if LRL_AVX512BF16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float s[16];
    memcpy(s, &x, 64);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] = s[i] > s[i + width] ? s[i] : s[i + width];
    return s[0];
#endif
}

/* exp(x) for x <= 88, to fp32 rounding, or to 4e-5 where `rough`: 2^n times a polynomial of the remainder. Below -87 it is
 * 1e-38, not zero. */
INLINE f32x16 ISA(exp_)(f32x16 x, int rough) {
    const f32x16 y = ISA(larger)(x * 1.44269504088896f, ISA(splat)(-126.0f));
#if LRL_AVX512BF16
    const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)y, 0);
#else
    f32x16 nearest = y;
    for (int i = 0; i < 16; i++) nearest[i] += y[i] < 0 ? -0.5f : 0.5f;
    const i32x16 whole = __builtin_convertvector(nearest, i32x16);
    const f32x16 n = __builtin_convertvector(whole, f32x16);
#endif
    const f32x16 r = (y - n) * 0.693147180559945f;
    f32x16 p = ISA(splat)(1.0f / 24);
    if (!rough) {
        p = r * (1.0f / 5040) + 1.0f / 720;
        p = p * r + 1.0f / 120;
        p = p * r + 1.0f / 24;
    }
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if LRL_AVX512BF16
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const i32x16 power = (whole + 127) << 23;
    f32x16 scale;
    memcpy(&scale, &power, 64);
    return p * scale;
#endif
}

INLINE f32x16 ISA(exp)(f32x16 x) { return ISA(exp_)(x, 0); }
