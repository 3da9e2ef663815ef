/* The gated delta rule for one token of each sequence (layers/delta_rule.py says what it is), in float32: each state is
 * read once, from one slot, and written once, to another. */
#include <stdint.h>

/* Rows of a state are independent of each other: what a row holds, answers and is corrected by stays in registers. */
static inline __attribute__((always_inline)) void advance_head(const float *query, const float *key, const float *value,
                                                               float kept, float beta, const float *from, float *to,
                                                               float *answer, const int width, int64_t rows) {
    float together = 0;
    for (int d = 0; d < width; d++) together += key[d] * query[d];
    for (int64_t r = 0; r < rows; r++, from += width, to += width) {
        float of_key = 0, of_query = 0;
        for (int d = 0; d < width; d++) of_key += from[d] * key[d], of_query += from[d] * query[d];
        const float correction = (value[r] - of_key * kept) * beta;
        for (int d = 0; d < width; d++) to[d] = from[d] * kept + correction * key[d];
        answer[r] = of_query * kept + correction * together;
    }
}

/* queries and keys: [sequences, key_heads, width], of unit length; values and answers: [sequences, heads, rows]; kept
 * and beta: [sequences, heads]; states: [slots, heads, rows, width]; reads and writes: [sequences], slots. */
void advance(const float *queries, const float *keys, const float *values, const float *kept, const float *beta,
             float *states, const int64_t *reads, const int64_t *writes, float *answers, int64_t sequences,
             int64_t key_heads, int64_t heads, int64_t width, int64_t rows) {
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < sequences * heads; task++) {
        const int64_t sequence = task / heads, head = task % heads;
        const int64_t shared = (sequence * key_heads + head / (heads / key_heads)) * width;
        const float *from = states + (reads[sequence] * heads + head) * rows * width;
        float *to = states + (writes[sequence] * heads + head) * rows * width;
        const float *query = queries + shared, *key = keys + shared, *value = values + task * rows;
        if (width == 128)
            advance_head(query, key, value, kept[task], beta[task], from, to, answers + task * rows, 128, rows);
        else
            advance_head(query, key, value, kept[task], beta[task], from, to, answers + task * rows, (int)width, rows);
    }
}
