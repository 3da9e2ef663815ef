/* RMSNorm: each row over its root mean square, times a weight. Sums are float32; a NaN stays in its row. */
#include "element.h"

enum { WORTH_THREADS = 1 << 16 }; /* elements */

/* x: `groups` of `rows` rows, a group's `step` elements behind the one before it; out: the same without gaps; weight:
 * [rows, width], or [width] with `same`. */
void normalize(const element *x, int64_t step, const element *weight, int64_t same, element *out, int64_t groups,
               int64_t rows, int64_t width, double epsilon) {
#pragma omp parallel for schedule(static) if (groups * rows * width > WORTH_THREADS)
    for (int64_t at = 0; at < groups * rows; at++) {
        const element *row = x + at / rows * step + at % rows * width;
        const element *scale = same ? weight : weight + at % rows * width;
        float sum = 0;
        for (int64_t i = 0; i < width; i++) sum += widened(row[i]) * widened(row[i]);
        const float inverse = 1.0f / __builtin_sqrtf(sum / (float)width + (float)epsilon);
        for (int64_t i = 0; i < width; i++) out[at * width + i] = narrowed(widened(row[i]) * inverse * widened(scale[i]));
    }
}
