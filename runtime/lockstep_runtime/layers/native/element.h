/* What tensors hold: bfloat16 with -DBFLOAT16, else float32. Sums are float32 either way. */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef BFLOAT16
typedef uint16_t element;

INLINE float widened(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* To the nearest, of two that are as near to the even one; NaN stays NaN. */
INLINE element narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7FC0 : (element)rounded;
}
#else
typedef float element;

INLINE float widened(element x) { return x; }
INLINE element narrowed(float x) { return x; }
#endif
