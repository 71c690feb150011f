/* Causal attention over a paged cache, by blocks of four pages and tiles of up to six queries.
 *
 * A query meets its keys block by block from the first position on, with a running maximum, sum and weighted sum (Milakov and
 * Gimelshein, 2018). Where rows share their first pages, their queries meet those together, as one product (Hydragen, Juravsky
 * et al., 2024; the tree of shared runs is DeFT's, Yao et al., 2024), and each goes on with its own pages from the state it
 * had: the blocks and their order are the same with and without sharing, and so are the bits.
 *
 * Layout, in lanes (one fp32, two bf16): keys [page, kv head, dim lanes, 16 positions], values [page, kv head, position lanes, dim].
 */

#define BLOCK_PAGES 4
#define BLOCK (BLOCK_PAGES * PAGE)
#if LRL_AVX512BF16
#define QUERIES 6
#else
#define QUERIES 2
#endif
#define TILES 4

typedef struct {
    const uint32_t *q;      /* query's lanes */
    float *state;           /* [16 sums, maximum in lane 0 of 16, dim weighted sums] */
    int64_t visible;        /* positions it sees */
} ISA(query);

/* One lane of positions, 64 dimensions wide: sum += weight * value for each query. */
INLINE void ISA(weigh)(f32x16 sum[][4], const uint32_t *value, const uint32_t *weight, uint32_t keep, int count, int bf16) {
    u32x16 here[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) here[c] = ISA(load_lanes)(value + c * 16) & keep;
#pragma GCC unroll 8
    for (int m = 0; m < count; m++) {
        const u32x16 w = (u32x16){0} + weight[m * BLOCK];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) sum[m][c] = ISA(dp)(sum[m][c], here[c], w, bf16);
    }
}

/* Up to four pages of one kv head that are wanted soon. */
typedef struct {
    const int32_t *page;
    int pages, kv_head;
} ISA(place);

/* One tile of queries against one block: positions `start` … `start` + 64, as far as there are pages. The first page stands in
 * for those that are missing; its scores are masked there. The pages of `next` are fetched meanwhile.
 * q_lanes: the queries, [lanes, QUERIES]. */
INLINE void ISA(block)(const attention_args *a, const ISA(query) * queries, const uint32_t *q_lanes, int count,
                       const int32_t *page, int pages, ISA(place) next, int64_t start, int kv_head, int bf16) {
    const int dim = a->dim, lanes = bf16 ? dim / 2 : dim;
    const size_t head = (size_t)lanes * PAGE, stride = head * a->kv_heads;
    const uint32_t *key[BLOCK_PAGES], *value[BLOCK_PAGES], *key_ahead[BLOCK_PAGES], *value_ahead[BLOCK_PAGES];
    for (int p = 0; p < BLOCK_PAGES; p++) {
        const size_t at = page[p < pages ? p : 0] * stride + kv_head * head;
        const size_t ahead = next.page[p < next.pages ? p : 0] * stride + next.kv_head * head;
        key[p] = (const uint32_t *)a->keys + at;
        value[p] = (const uint32_t *)a->values + at;
        key_ahead[p] = (const uint32_t *)a->keys + ahead;
        value_ahead[p] = (const uint32_t *)a->values + ahead;
    }
    f32x16 score[QUERIES][BLOCK_PAGES];
#pragma GCC unroll 8
    for (int m = 0; m < count; m++)
#pragma GCC unroll 4
        for (int p = 0; p < BLOCK_PAGES; p++) score[m][p] = (f32x16){0};
    for (int k = 0; k < lanes; k++) {
        u32x16 here[BLOCK_PAGES];
#pragma GCC unroll 4
        for (int p = 0; p < BLOCK_PAGES; p++) here[p] = ISA(load_lanes)(key[p] + k * PAGE);
#pragma GCC unroll 4
        for (int p = 0; p < BLOCK_PAGES; p++) __builtin_prefetch(key_ahead[p] + k * PAGE, 0, 3);
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) {
            const u32x16 q = (u32x16){0} + q_lanes[k * QUERIES + m];
#pragma GCC unroll 4
            for (int p = 0; p < BLOCK_PAGES; p++) score[m][p] = ISA(dp)(score[m][p], here[p], q, bf16);
        }
    }
    uint32_t weight[QUERIES][BLOCK] __attribute__((aligned(64)));
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 8
    for (int m = 0; m < count; m++) {
        float *state = queries[m].state;
        const int64_t left = queries[m].visible - start;
        f32x16 best = ISA(splat)(-INFINITY);
#pragma GCC unroll 4
        for (int p = 0; p < BLOCK_PAGES; p++) {
            score[m][p] *= a->scale;
            if (left < (p + 1) * PAGE) {
                const i32x16 hidden = lane >= (int32_t)(left > p * PAGE ? left - p * PAGE : 0);
                f32x16 low = ISA(splat)(-INFINITY);
                u32x16 bits, none;
                memcpy(&bits, &score[m][p], 64);
                memcpy(&none, &low, 64);
                bits = (bits & ~(u32x16)hidden) | (none & (u32x16)hidden);
                memcpy(&score[m][p], &bits, 64);
            }
            best = ISA(larger)(best, score[m][p]);
        }
        const float before = state[16], now = ISA(top)(best);
        const float top = now > before ? now : before;
        f32x16 sums = ISA(load_f32)(state);
        if (top > before) {
            const float shrink = before == -INFINITY ? 0.0f : ISA(exp)(ISA(splat)(before - top))[0];
            sums *= shrink;
            for (int d = 0; d < dim; d += 16) {
                const f32x16 x = ISA(load_f32)(state + 32 + d) * shrink;
                memcpy(state + 32 + d, &x, 64);
            }
            state[16] = top;
        }
#pragma GCC unroll 4
        for (int p = 0; p < BLOCK_PAGES; p++) {
            f32x16 w = top == -INFINITY ? ISA(splat)(0.0f) : ISA(exp_)(score[m][p] - top, bf16);
            if (left < (p + 1) * PAGE) {
                const i32x16 hidden = lane >= (int32_t)(left > p * PAGE ? left - p * PAGE : 0);
                u32x16 bits;
                memcpy(&bits, &w, 64);
                bits &= ~(u32x16)hidden;
                memcpy(&w, &bits, 64);
            }
            sums += w;
            ISA(put)(weight[m], p * PAGE, w, bf16);
        }
        memcpy(state, &sums, 64);
    }
    const int pair = bf16 ? 2 : 1, steps = PAGE / pair;
    int seen[BLOCK_PAGES]; /* positions of each page that the last query, which sees most, sees: the rest may be anything */
    for (int p = 0; p < BLOCK_PAGES; p++) {
        const int64_t left = queries[count - 1].visible - start - p * PAGE;
        seen[p] = left > PAGE ? PAGE : left > 0 ? (int)left : 0;
    }
    for (int d = 0; d < dim; d += 64) {
        const int wide = dim - d < 64 ? (dim - d) / 16 : 4;
        f32x16 sum[QUERIES][4];
        if (wide == 4) {
#pragma GCC unroll 8
            for (int m = 0; m < count; m++)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) sum[m][c] = ISA(load_f32)(queries[m].state + 32 + d + c * 16);
            for (int p = 0; p < pages; p++) {
                const int whole = seen[p] / pair;
                for (int j = 0; j < whole; j++) {
                    ISA(weigh)(sum, value[p] + j * dim + d, &weight[0][p * steps + j], ~0u, count, bf16);
#pragma GCC unroll 4
                    for (int c = 0; c < 4; c++) __builtin_prefetch(value_ahead[p] + j * dim + d + c * 16, 0, 3);
                }
                if (seen[p] % pair) /* one position of a lane is beyond what anyone here sees */
                    ISA(weigh)(sum, value[p] + whole * dim + d, &weight[0][p * steps + whole], 0xffffu, count, bf16);
            }
#pragma GCC unroll 8
            for (int m = 0; m < count; m++)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) memcpy(queries[m].state + 32 + d + c * 16, &sum[m][c], 64);
        } else {
            for (int c = 0; c < wide; c++) {
#pragma GCC unroll 8
                for (int m = 0; m < count; m++) sum[m][0] = ISA(load_f32)(queries[m].state + 32 + d + c * 16);
                for (int p = 0; p < pages; p++)
                    for (int j = 0; j < (seen[p] + pair - 1) / pair; j++) {
                        const uint32_t keep = (j + 1) * pair > seen[p] ? 0xffffu : ~0u;
                        const u32x16 here = ISA(load_lanes)(value[p] + j * dim + d + c * 16) & keep;
#pragma GCC unroll 8
                        for (int m = 0; m < count; m++)
                            sum[m][0] = ISA(dp)(sum[m][0], here, (u32x16){0} + weight[m][p * steps + j], bf16);
                    }
#pragma GCC unroll 8
                for (int m = 0; m < count; m++) memcpy(queries[m].state + 32 + d + c * 16, &sum[m][0], 64);
            }
        }
    }
}

/* Up to TILES tiles against positions `from` … `to`; `from` is a multiple of the block; after it comes `then`.
 * Queries that see nothing of a block sit it out: they stand first, since later tokens see more. */
INLINE void ISA(walk)(const attention_args *a, const ISA(query) * queries, int count, const int32_t *table, int64_t from,
                      int64_t to, int kv_head, ISA(place) then, int bf16) {
    const int lanes = bf16 ? a->dim / 2 : a->dim;
    const int tiles = (count + QUERIES - 1) / QUERIES, size = (count + tiles - 1) / tiles;
    uint32_t gathered[MAX_DIM * QUERIES * TILES];
    for (int m = 0; m < count; m++)
        for (int k = 0; k < lanes; k++) gathered[((m / size) * lanes + k) * QUERIES + m % size] = queries[m].q[k];
    for (int64_t start = from; start < to; start += BLOCK) {
        const int64_t left = to - start;
        const int pages = left >= BLOCK ? BLOCK_PAGES : (int)((left + PAGE - 1) / PAGE);
        const int32_t *page = table + start / PAGE;
        const int more = left >= 2 * BLOCK ? BLOCK_PAGES : (int)((left - BLOCK + PAGE - 1) / PAGE);
        const ISA(place) next = left > BLOCK ? (ISA(place)){page + BLOCK_PAGES, more, kv_head} : then;
        for (int first = 0; first < count; first += size) {
            const ISA(query) *tile = queries + first;
            const uint32_t *q_lanes = gathered + first / size * lanes * QUERIES;
            int n = count - first < size ? count - first : size;
            while (n && tile->visible <= start) tile++, q_lanes++, n--;
            switch (n) {
#define CASE(m) \
    case m: ISA(block)(a, tile, q_lanes, m, page, pages, next, start, kv_head, bf16); break;
                CASE(1) CASE(2)
#if LRL_AVX512BF16
                CASE(3) CASE(4) CASE(5) CASE(6)
#endif
#undef CASE
            }
        }
    }
}

static __attribute__((noinline)) void ISA(walk_bf16)(const attention_args *a, const ISA(query) * queries, int count,
                                                     const int32_t *table, int64_t from, int64_t to, int kv_head,
                                                     ISA(place) then) {
    ISA(walk)(a, queries, count, table, from, to, kv_head, then, 1);
}

static __attribute__((noinline)) void ISA(walk_f32)(const attention_args *a, const ISA(query) * queries, int count,
                                                    const int32_t *table, int64_t from, int64_t to, int kv_head,
                                                    ISA(place) then) {
    ISA(walk)(a, queries, count, table, from, to, kv_head, then, 0);
}

INLINE void ISA(fresh)(float *state, int dim) {
    memset(state, 0, (32 + dim) * sizeof(float));
    state[16] = -INFINITY;
}

/* One shared run and one kv head: the queries of all its rows, tile by tile. */
static void ISA(shared)(const attention_args *a, const int32_t *run, const int32_t *rows, int kv_head, int64_t part,
                        int64_t parts, int bf16) {
    const int count = run[0], first = run[1], last = run[2], group = a->heads / a->kv_heads;
    const int32_t *table = a->tables + (int64_t)a->lines[rows[0]] * a->table_width;
    const ISA(place) again = {table + first, last - first < BLOCK_PAGES ? last - first : BLOCK_PAGES, kv_head};
    ISA(query) queries[QUERIES * TILES];
    int filled = 0;
    const int64_t from = count * part / parts, to = count * (part + 1) / parts;
    for (int64_t i = from; i < to; i++) {
        const int row = rows[i];
        for (int64_t t = a->offsets[row]; t < a->offsets[row + 1]; t++)
            for (int g = 0; g < group; g++) {
                const int64_t at = t * a->heads + kv_head * group + g;
                queries[filled++] = (ISA(query)){(const uint32_t *)((const char *)a->q + at * a->dim * (bf16 ? 2 : 4)),
                                                 a->states + at * (32 + a->dim), INT64_MAX};
                if (filled == QUERIES * TILES) {
                    (bf16 ? ISA(walk_bf16) : ISA(walk_f32))(a, queries, filled, table, (int64_t)first * PAGE,
                                                            (int64_t)last * PAGE, kv_head, again);
                    filled = 0;
                }
            }
    }
    if (filled)
        (bf16 ? ISA(walk_bf16) : ISA(walk_f32))(a, queries, filled, table, (int64_t)first * PAGE, (int64_t)last * PAGE,
                                                kv_head, again);
}

/* `tokens` tokens of one row and one kv head, from the position where sharing ended to their own. */
static void ISA(own)(const attention_args *a, int row, int64_t token, int tokens, int kv_head, ISA(place) then, int bf16) {
    const int group = a->heads / a->kv_heads, dim = a->dim, all = tokens * group;
    const int32_t *table = a->tables + (int64_t)a->lines[row] * a->table_width;
    const int64_t from = a->shared ? (int64_t)a->shared[row] * PAGE : 0;
    float local[QUERIES * TILES * (32 + MAX_DIM)] __attribute__((aligned(64)));
    for (int done = 0; done < all;) {
        const int count = all - done < QUERIES * TILES ? all - done : QUERIES * TILES;
        ISA(query) queries[QUERIES * TILES];
        int64_t to = 0;
        for (int i = 0; i < count; i++) {
            const int64_t t = token + (done + i) / group, at = t * a->heads + kv_head * group + (done + i) % group;
            to = (int64_t)a->positions[t] + 1;
            float *state = from ? a->states + at * (32 + dim) : local + i * (32 + dim);
            if (!from) ISA(fresh)(state, dim);
            queries[i] = (ISA(query)){(const uint32_t *)((const char *)a->q + at * dim * (bf16 ? 2 : 4)), state, to};
        }
        (bf16 ? ISA(walk_bf16) : ISA(walk_f32))(a, queries, count, table, from, to, kv_head, then);
        for (int i = 0; i < count; i++) {
            const int64_t t = token + (done + i) / group, at = t * a->heads + kv_head * group + (done + i) % group;
            const float norm = 1.0f / ISA(sum)(ISA(load_f32)(queries[i].state));
            for (int d = 0; d < dim; d += 16)
                ISA(put)(a->out, at * dim + d, ISA(load_f32)(queries[i].state + 32 + d) * norm, bf16);
        }
        done += count;
    }
}

/* Work of equal kind is spread over threads: shared runs level by level (a run's rows are a subset of its parent's),
 * then every row's own pages. */
static void ISA(attention)(const attention_args *a, const int32_t *runs, const int32_t *run_rows, int64_t levels,
                           const int32_t *level_runs, int bf16) {
    const int64_t tokens = a->offsets[a->rows];
    if (levels) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens * a->heads; i++) ISA(fresh)(a->states + i * (32 + a->dim), a->dim);
    }
    for (int64_t level = 0; level < levels; level++) {
        const int64_t first = level_runs[level], count = level_runs[level + 1] - first, parts = 4;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * a->kv_heads * parts; i++) {
            const int32_t *run = runs + 4 * (first + i / (a->kv_heads * parts));
            ISA(shared)(a, run, run_rows + run[3], (int)(i / parts % a->kv_heads), i % parts, parts, bf16);
        }
    }
    const int64_t tasks = a->bites * a->kv_heads;
    const int turn = tasks >= 64 ? 2 * a->kv_heads : 1; /* tasks that one thread does in a row */
#pragma omp for schedule(dynamic, turn)
    for (int64_t i = 0; i < tasks; i++) {
        const int64_t b = i / a->kv_heads, after = (i + 1 < tasks ? i + 1 : i) / a->kv_heads;
        const int row = a->bite_rows[b], next = a->bite_rows[after];
        const int64_t token = a->bite_tokens[b], left = a->offsets[row + 1] - token;
        const int64_t skip = a->shared ? a->shared[next] : 0, end = a->positions[a->bite_tokens[after]] / PAGE + 1;
        const ISA(place) then = {a->tables + (int64_t)a->lines[next] * a->table_width + skip,
                                 end - skip < BLOCK_PAGES ? (int)(end - skip) : BLOCK_PAGES, (int)((i + 1) % a->kv_heads)};
        ISA(own)(a, row, token, (int)(left < a->bite ? left : a->bite), (int)(i % a->kv_heads), then, bf16);
    }
}

#undef BLOCK_PAGES
#undef BLOCK
#undef QUERIES
#undef TILES
