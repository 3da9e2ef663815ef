/* Attention of single tokens over paged keys and values, in one pass over them (https://arxiv.org/abs/2205.14135).
 *
 * Each kv head of each sequence is computed by one thread in one order, so the bits depend on nothing else. A NaN or an
 * infinity in what a token sees shows in what it gets. */
#include "element.h"

enum { BLOCK = 32 }; /* layers/cache.py's BLOCK_SIZE */

/* exp of numbers up to 0, within 2 units in the last place (Cephes' expf); 0 below -87. */
INLINE float exponential(float x) {
    float n = __builtin_rintf(x * 1.44269504f); /* x = n ln 2 + r, with ln 2 in two parts */
    float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)(x < -87.0f ? 0.0f : n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

/* Scores of a block's tokens become weights; returns by how much what was summed before them shrinks. */
INLINE float weigh(float *scores, int count, float *best, float *total) {
    float most = *best, sum = 0;
    for (int t = 0; t < count; t++) most = scores[t] > most ? scores[t] : most;
    for (int t = count; t < BLOCK; t++) scores[t] = -__builtin_inff();
    for (int t = 0; t < BLOCK; t++) scores[t] = exponential(scores[t] - most);
    for (int t = 0; t < BLOCK; t++) sum += scores[t];
    const float shrink = exponential(*best - most);
    *total = *total * shrink + sum;
    *best = most;
    return shrink;
}

/* `rows` of the queries that share a kv head, [rows, width]; `step`: from one slot's keys to the next one's. */
INLINE void attend_rows(const element *queries, const element *keys, const element *values, element *out,
                        const int64_t *blocks, int64_t length, int64_t step, const int width, const int rows) {
    const float scale = 1.0f / __builtin_sqrtf((float)width);
    float query[rows][width], sums[rows][width], scores[rows][BLOCK], best[rows], total[rows];
    for (int g = 0; g < rows; g++) {
        for (int d = 0; d < width; d++) query[g][d] = widened(queries[g * width + d]) * scale, sums[g][d] = 0;
        best[g] = -__builtin_inff(), total[g] = 0;
    }
    for (int64_t start = 0; start < length; start += BLOCK) {
        const element *key = keys + blocks[start / BLOCK] * BLOCK * step;
        const element *value = values + blocks[start / BLOCK] * BLOCK * step;
        const int count = length - start < BLOCK ? (int)(length - start) : BLOCK;
        for (int t = 0; t < count; t++, key += step)
            for (int g = 0; g < rows; g++) {
                float dot = 0;
                for (int d = 0; d < width; d++) dot += query[g][d] * widened(key[d]);
                scores[g][t] = dot;
            }
        for (int g = 0; g < rows; g++) {
            const float shrink = weigh(scores[g], count, &best[g], &total[g]);
            for (int d = 0; d < width; d++) sums[g][d] *= shrink;
        }
        for (int t = 0; t < count; t++, value += step)
            for (int g = 0; g < rows; g++)
                for (int d = 0; d < width; d++) sums[g][d] += scores[g][t] * widened(value[d]);
    }
    for (int g = 0; g < rows; g++)
        for (int d = 0; d < width; d++) out[g * width + d] = narrowed(sums[g][d] / total[g]);
}

/* As many rows at once as registers hold; a width that is known here is computed several times as fast. */
INLINE void attend_head(const element *queries, const element *keys, const element *values, element *out,
                        const int64_t *blocks, int64_t length, int64_t step, const int width, int64_t sharing) {
    for (; sharing >= 4; sharing -= 4, queries += 4 * width, out += 4 * width)
        attend_rows(queries, keys, values, out, blocks, length, step, width, 4);
    for (; sharing >= 2; sharing -= 2, queries += 2 * width, out += 2 * width)
        attend_rows(queries, keys, values, out, blocks, length, step, width, 2);
    if (sharing) attend_rows(queries, keys, values, out, blocks, length, step, width, 1);
}

/* queries: rows of `query_step` elements, [kv_heads * sharing, width] first; keys and values: [slots, kv_heads, width];
 * out: [rows, kv_heads * sharing, width]; plan: of each sequence the row, the tokens it sees, and where in the plan its
 * blocks are. */
void attend(const element *queries, int64_t query_step, const element *keys, const element *values, element *out,
            const int64_t *plan, int64_t sequences, int64_t kv_heads, int64_t sharing, int64_t width) {
    const int64_t step = kv_heads * width;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < sequences * kv_heads; task++) {
        const int64_t *sequence = plan + task / kv_heads * 3, head = task % kv_heads;
        const int64_t row = sequence[0], length = sequence[1], *blocks = plan + sequence[2];
        const element *q = queries + row * query_step + head * sharing * width;
        const element *k = keys + head * width, *v = values + head * width;
        element *o = out + (row * kv_heads + head) * sharing * width;
        switch (width) {
        case 64: attend_head(q, k, v, o, blocks, length, step, 64, sharing); break;
        case 128: attend_head(q, k, v, o, blocks, length, step, 128, sharing); break;
        case 256: attend_head(q, k, v, o, blocks, length, step, 256, sharing); break;
        default: attend_head(q, k, v, o, blocks, length, step, (int)width, sharing);
        }
    }
}
