/* y = x W^T + b with W packed for streaming: units of 16 outputs, [N/16][lanes][16], so that one load takes a lane of 16
 * outputs. An output is one accumulator from the first lane to the last: its bits do not depend on the rows beside it.
 */

#if LRL_AVX512BF16
#define TILE_ROWS 8
#define TILE_UNITS 3
#define STREAM_UNITS 6
#else
#define TILE_ROWS 4
#define TILE_UNITS 1
#define STREAM_UNITS 1
#endif

typedef struct {
    const uint32_t *x;      /* [rows, lanes] */
    const uint32_t *packed; /* [units, lanes, 16] */
    const void *bias;       /* [outputs] or NULL */
    void *y;                /* [rows, outputs] */
    int64_t rows, lanes, outputs;
    int add;                /* y += the product, rounded to the storage type first, instead of y = */
} ISA(linear_args);

static __attribute__((noinline)) void ISA(store)(const ISA(linear_args) * a, const float *sums, int64_t row, int rows,
                                                 int64_t unit, int units, int bf16) {
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < units; n++) {
            const float *sum = sums + (m * units + n) * 16;
            const int64_t first = (unit + n) * 16, left = a->outputs - first;
            const size_t at = (size_t)(row + m) * a->outputs + first;
            if (left >= 16) {
                f32x16 x = ISA(load_f32)(sum);
                if (a->bias) x += ISA(get)(a->bias, first, bf16);
                if (a->add) x = ISA(rounded)(x, bf16) + ISA(get)(a->y, at, bf16);
                ISA(put)(a->y, at, x, bf16);
                continue;
            }
            for (int i = 0; i < left; i++) {
                float x = sum[i];
                if (a->bias) x += scalar(a->bias, first + i, bf16);
                if (a->add) x = rounded(x, bf16) + scalar(a->y, at + i, bf16);
                set_scalar(a->y, at + i, x, bf16);
            }
        }
}

/* `ahead` are weights needed next, as many as one unit has: fetched meanwhile where rows are many. */
INLINE void ISA(tile)(const ISA(linear_args) * a, int64_t row, int64_t unit, const uint32_t *ahead, int bf16, int rows,
                      int units) {
    const int64_t lanes = a->lanes;
    const uint32_t *x = a->x + row * lanes, *w = a->packed + unit * lanes * 16;
    f32x16 acc[8][8];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int n = 0; n < units; n++) acc[m][n] = (f32x16){0};
    for (int64_t k = 0; k < lanes; k++) {
        u32x16 weight[8];
#pragma GCC unroll 8
        for (int n = 0; n < units; n++) weight[n] = ISA(load_lanes)(w + (n * lanes + k) * 16);
        if (rows <= 2)
#pragma GCC unroll 8
            for (int n = 0; n < units; n++) __builtin_prefetch(w + (n * lanes + k) * 16 + 768, 0, 3);
        else __builtin_prefetch(ahead + k * 16, 0, 2);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const u32x16 broadcast = (u32x16){0} + x[m * lanes + k];
#pragma GCC unroll 8
            for (int n = 0; n < units; n++) acc[m][n] = ISA(dp)(acc[m][n], weight[n], broadcast, bf16);
        }
    }
    float sums[8 * 8 * 16];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int n = 0; n < units; n++) memcpy(sums + (m * units + n) * 16, &acc[m][n], 64);
    ISA(store)(a, sums, row, rows, unit, units, bf16);
}

/* Few rows stream weights through many accumulators; many rows keep them in registers and fetch the next panel meanwhile. */
INLINE void ISA(tiles)(const ISA(linear_args) * a, int64_t row, int64_t rows, int64_t unit, int units, int bf16) {
    const int64_t first = row, last = row + rows, panel = (int64_t)units * a->lanes * 16;
    const int64_t end = (a->outputs + 15) / 16 * a->lanes * 16;
    for (; row < last; row += TILE_ROWS) {
        const int64_t next = (unit + units) * a->lanes * 16 + (row - first) / TILE_ROWS * a->lanes * 16 % panel;
        const uint32_t *ahead = a->packed + (next < end - a->lanes * 16 ? next : unit * a->lanes * 16);
        switch ((last - row < TILE_ROWS ? last - row : TILE_ROWS) * 8 + units) {
#define CASE(m, n) \
    case m * 8 + n: ISA(tile)(a, row, unit, ahead, bf16, m, n); break;
            CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1)
#if LRL_AVX512BF16
#define CASES(m) CASE(m, 2) CASE(m, 3)
            CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8)
            CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
            CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(2, 4) CASE(2, 5) CASE(2, 6)
#undef CASES
#endif
#undef CASE
        }
    }
}

static void ISA(linear_bf16)(const ISA(linear_args) * a, int64_t row, int64_t rows, int64_t unit, int units) {
    ISA(tiles)(a, row, rows, unit, units, 1);
}

static void ISA(linear_f32)(const ISA(linear_args) * a, int64_t row, int64_t rows, int64_t unit, int units) {
    ISA(tiles)(a, row, rows, unit, units, 0);
}

static void ISA(linear_block)(const ISA(linear_args) * a, int64_t row, int64_t rows, int bf16) {
    const int64_t units = (a->outputs + 15) / 16, wide = rows <= 2 ? STREAM_UNITS : TILE_UNITS;
    for (int64_t unit = 0; unit < units; unit += wide)
        (bf16 ? ISA(linear_bf16) : ISA(linear_f32))(a, row, rows, unit, (int)(units - unit < wide ? units - unit : wide));
}

static void ISA(linear)(const void *x, const void *packed, const void *bias, void *y, int64_t rows, int64_t lanes,
                        int64_t outputs, int bf16) {
    const ISA(linear_args) a = {x, packed, bias, y, rows, lanes, outputs, 0};
    if (!rows) return;
    const int64_t units = (outputs + 15) / 16, wide = rows <= 2 ? STREAM_UNITS : TILE_UNITS;
    const int64_t chunk = rows <= 64 ? (rows + 15) / 16 * 8 : 64;
    const int64_t columns = (units + wide - 1) / wide, chunks = (rows + chunk - 1) / chunk;
    const int bite = columns >= 32 ? (int)chunks : 1; /* dynamic: other processes take a core away now and then */
#pragma omp for schedule(dynamic, bite)
    for (int64_t task = 0; task < columns * chunks; task++) {
        const int64_t unit = task / chunks * wide, row = task % chunks * chunk;
        const int n = (int)(units - unit < wide ? units - unit : wide);
        const int64_t m = rows - row < chunk ? rows - row : chunk;
        (bf16 ? ISA(linear_bf16) : ISA(linear_f32))(&a, row, m, unit, n);
    }
}

/* y[start:end] += round(round(x down^T) * scale) up^T for spans of rows, each with a low-rank pair of its own.
 * spans: [count, 3] of start, end, rank; pairs: [count, 2] of packed down and up. */
static void ISA(add_lora)(void *y, const void *x, const int64_t *spans, const void *const *pairs, const float *scales,
                          int64_t count, int64_t inputs, int64_t outputs, int bf16) {
    const int64_t lane = bf16 ? 2 : 1, size = bf16 ? 2 : 4;
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < count; s++) {
        const int64_t start = spans[3 * s], end = spans[3 * s + 1], rank = spans[3 * s + 2];
        uint32_t low[8 * 512 + 16];
        for (int64_t row = start; row < end; row += 8) {
            const int64_t rows = end - row < 8 ? end - row : 8;
            const ISA(linear_args) down = {
                (const uint32_t *)((const char *)x + row * inputs * size), pairs[2 * s], NULL, low, rows, inputs / lane, rank, 0};
            ISA(linear_block)(&down, 0, rows, bf16);
            for (int64_t i = 0; i < rows * rank; i++) set_scalar(low, i, scalar(low, i, bf16) * scales[s], bf16);
            const ISA(linear_args) up = {low, pairs[2 * s + 1], NULL, (char *)y + row * outputs * size, rows, rank / lane, outputs, 1};
            ISA(linear_block)(&up, 0, rows, bf16);
        }
    }
}

#undef TILE_ROWS
#undef TILE_UNITS
#undef STREAM_UNITS
