/* Unfiltered sampling: one row of logits to an id by inverse CDF, its log-prob under the distribution it was drawn from, and that
 * distribution's entropy. Two levels, so that only one span of the vocabulary is summed in order: 256 ids each.
 *
 * With x the logits below the largest, over the temperature, the entropy is log(sum exp x) - sum(x exp x) / sum exp x. There x is
 * FAINTEST at least, where exp has reached its smallest: 0 times infinity is not a number. */

#define SPAN 256
#define FAINTEST -88.0f

INLINE void ISA(sample_row)(const void *logits, int64_t row, int64_t vocab, float temperature, double uniform, double *spans,
                            int64_t *id, float *logprob, float *entropy, int bf16) {
    const size_t at = (size_t)row * vocab;
    const int64_t whole = vocab / 16 * 16;
    const float cold = temperature == 0.0f, sharpness = cold ? 1.0f : 1.0f / temperature;
    f32x16 best = ISA(splat)(-INFINITY);
    for (int64_t i = 0; i < whole; i += 16) best = ISA(larger)(best, ISA(get)(logits, at + i, bf16));
    float top = ISA(top)(best);
    for (int64_t i = whole; i < vocab; i++) {
        const float x = scalar(logits, at + i, bf16);
        top = x > top ? x : top;
    }
    double total = 0, weighted = 0;
    int64_t count = 0;
    for (int64_t first = 0; first < vocab; first += SPAN, count++) {
        f32x16 sums = {0}, weights = {0};
        int64_t i = first;
        for (; i + 16 <= vocab && i < first + SPAN; i += 16) {
            const f32x16 x = ISA(larger)((ISA(get)(logits, at + i, bf16) - top) * sharpness, ISA(splat)(FAINTEST));
            const f32x16 p = ISA(exp)(x);
            sums += p;
            weights += p * x;
        }
        float sum = ISA(sum)(sums), weight = ISA(sum)(weights);
        for (; i < vocab && i < first + SPAN; i++) {
            const float x = (scalar(logits, at + i, bf16) - top) * sharpness, p = expf(x);
            sum += p;
            weight += p * (x > FAINTEST ? x : FAINTEST);
        }
        total += sum;
        weighted += weight;
        spans[count] = total;
    }
    int64_t chosen = 0;
    if (cold) {
        while (chosen + 1 < vocab && !(scalar(logits, at + chosen, bf16) == top)) chosen++;
    } else {
        const double target = uniform * total;
        int64_t span = 0;
        while (span + 1 < count && spans[span] <= target) span++;
        double sum = span ? spans[span - 1] : 0.0;
        chosen = -1;
        for (int64_t i = span * SPAN; i < vocab && i < (span + 1) * SPAN; i++) {
            const float p = expf((scalar(logits, at + i, bf16) - top) * sharpness);
            if (p > 0) chosen = i; /* rounding at a span's end falls on the last id that has any probability */
            sum += p;
            if (sum > target && p > 0) break;
        }
        if (chosen < 0) /* a span of no probability, entered by rounding */
            for (chosen = 0; chosen + 1 < vocab && !(scalar(logits, at + chosen, bf16) == top);) chosen++;
    }
    *id = chosen;
    *logprob = (float)((double)(scalar(logits, at + chosen, bf16) - top) * sharpness - log(total));
    *entropy = (float)(log(total) - weighted / total);
}

static void ISA(sample_bf16)(const void *logits, int64_t row, int64_t vocab, float temperature, double uniform, double *spans,
                             int64_t *id, float *logprob, float *entropy) {
    ISA(sample_row)(logits, row, vocab, temperature, uniform, spans, id, logprob, entropy, 1);
}

static void ISA(sample_f32)(const void *logits, int64_t row, int64_t vocab, float temperature, double uniform, double *spans,
                            int64_t *id, float *logprob, float *entropy) {
    ISA(sample_row)(logits, row, vocab, temperature, uniform, spans, id, logprob, entropy, 0);
}

static void ISA(sample)(const void *logits, const float *temperatures, const double *uniforms, double *spans, int64_t *ids,
                        float *logprobs, float *entropies, int64_t rows, int64_t vocab, int bf16) {
    const int64_t width = (vocab + SPAN - 1) / SPAN;
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; r++)
        (bf16 ? ISA(sample_bf16) : ISA(sample_f32))(logits, r, vocab, temperatures[r], uniforms[r], spans + r * width,
                                                    ids + r, logprobs + r, entropies + r);
}

#undef FAINTEST
#undef SPAN
