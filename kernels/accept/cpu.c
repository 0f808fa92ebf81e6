/* The largest of a row of logits, its place, and whether any is NaN: one read of the row. */

#include <math.h>
#include <stdint.h>

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

/* Bits of 16 numbers as float32. */
static inline ivec load(const void *row, long i, int bytes) {
  if (bytes == 2) {
    hvec half;
    __builtin_memcpy(&half, (const uint16_t *)row + i, sizeof half);
    return (ivec)(__builtin_convertvector(half, uvec) << 16);
  }
  ivec whole;
  __builtin_memcpy(&whole, (const uint32_t *)row + i, sizeof whole);
  return whole;
}

static inline float number(const void *row, long i, int bytes) {
  uint32_t bits = bytes == 2 ? (uint32_t)((const uint16_t *)row)[i] << 16 : ((const uint32_t *)row)[i];
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline __attribute__((always_inline)) long find(const void *row, long count, const int bytes) {
  vec most = (vec){0} - INFINITY;
  ivec at = {0}, broken = {0};
  ivec place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  long i = 0;
  for (; i + LANES <= count; i += LANES, place += LANES) {
    vec x = (vec)load(row, i, bytes);
    ivec larger = x > most; /* of equals the first */
    broken |= x != x;
    most = (vec)((larger & (ivec)x) | (~larger & (ivec)most));
    at = (larger & place) | (~larger & at);
  }
  float largest = -INFINITY;
  long best = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (broken[lane]) return -1;
    if (most[lane] > largest || (most[lane] == largest && at[lane] < best)) largest = most[lane], best = at[lane];
  }
  for (; i < count; i++) {
    float x = number(row, i, bytes);
    if (x != x) return -1;
    if (x > largest) largest = x, best = i;
  }
  return best;
}

/* The first of the largest of `count` numbers of 2 (bfloat16) or 4 bytes (float32); -1 where one is NaN. */
long find_best(const void *row, long count, int bytes) { return bytes == 2 ? find(row, count, 2) : find(row, count, 4); }
