/* What the target chooses at a node, from one read of its logits: the largest, or the largest with Gumbel noise. And the
   walk from the root down to a choice that no child holds.

   The noise of a token is a function of a key and its index (specdec/sampling.py: keyed_gumbel), -log(-log(u)) in double
   precision. Taking two logarithms of a whole vocabulary costs as much as a tenth of a small model's pass. So scores are
   estimated in single precision first, and computed exactly where the estimate comes near the largest one. */

#include <math.h>
#include <stdint.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16 /* as many as fit a register */
#else
#define LANES 8
#endif
#define NEAR 1e-3f /* estimates are off by less than a tenth of that, see estimate_noise */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

#if LANES == 16
static const ivec FIRST = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
static const ivec FIRST = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

static inline vec either(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

static inline vec splat(float value) { return value - (vec){0}; }

static inline float number(const void *row, long i, int bytes) {
  uint32_t bits = bytes == 2 ? (uint32_t)((const uint16_t *)row)[i] << 16 : ((const uint32_t *)row)[i];
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

/* LANES numbers from i on; -infinity past the end. */
static inline vec numbers(const void *row, long i, long count, int bytes) {
  vec out;
  if (i + LANES > count) {
    for (int lane = 0; lane < LANES; lane++) out[lane] = i + lane < count ? number(row, i + lane, bytes) : -INFINITY;
  } else if (bytes == 2) {
#if LANES == 8 && defined(__AVX2__) /* GCC 12 makes two halves of the conversion below */
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + i))), 16);
#else
    hvec half;
    __builtin_memcpy(&half, (const uint16_t *)row + i, sizeof half);
    out = (vec)(__builtin_convertvector(half, uvec) << 16);
#endif
  } else {
    __builtin_memcpy(&out, (const float *)row + i, sizeof out);
  }
  return out;
}

/* The first of the largest over all lanes, by place. */
static long first_of(vec most, ivec at) {
  long best = at[0];
  float largest = most[0];
  for (int lane = 1; lane < LANES; lane++)
    if (most[lane] > largest || (most[lane] == largest && at[lane] < best)) largest = most[lane], best = at[lane];
  return best;
}

static int any(ivec mask) {
  int found = 0;
  for (int lane = 0; lane < LANES; lane++) found |= mask[lane];
  return found;
}

static inline __attribute__((always_inline)) long find(const void *row, long count, const int bytes) {
  vec most = splat(-INFINITY);
  ivec at = FIRST, broken = {0}, place = FIRST;
  for (long i = 0; i < count; i += LANES, place += LANES) {
    vec x = numbers(row, i, count, bytes);
    ivec larger = x > most; /* of equals the first */
    broken |= x != x;
    most = either(larger, x, most);
    at = (larger & place) | (~larger & at);
  }
  return any(broken) ? -1 : first_of(most, at);
}

/* The first of the largest of `count` numbers of 2 (bfloat16) or 4 bytes (float32); -1 where one is NaN. */
long find_best(const void *row, long count, int bytes) { return bytes == 2 ? find(row, count, 2) : find(row, count, 4); }

/* ---- with noise ---- */

static inline uvec hash(uvec value) {
  value ^= value >> 16;
  value *= 0x7FEB352Du;
  value ^= value >> 15;
  value *= 0x846CA68Bu;
  return value ^ value >> 16;
}

static inline uvec bits_of(uint64_t key, uvec index) { return hash(hash(index ^ (uint32_t)key) ^ (uint32_t)(key >> 32)); }

/* log of positive normal numbers, absolute error below 1e-6 for those above 2^-40. */
static inline vec vlog(vec x) {
  ivec bits = (ivec)x, power = ((bits - 0x3f3504f3) >> 23); /* mantissa in [sqrt(1/2), sqrt(2)) */
  vec m = (vec)(bits - (power << 23)) - 1.0f;
  vec s = m / (m + 2.0f), z = s * s;
  vec series = 2.0f * s * (1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9)))));
  return __builtin_convertvector(power, vec) * 0.693147180559945f + series;
}

/* -log(-log(u)) for u = (bits + 1/2) / 2^32, absolute error below 1e-4. -log(u) is taken as 2 atanh((1 - u) / (1 + u)):
   near u = 1, where the largest noise comes from, 1 - u is known exactly, log(u) would not be. */
static inline vec estimate_noise(uvec bits) {
  vec u = (__builtin_convertvector(bits, vec) + 0.5f) * 0x1p-32f;
  vec v = (__builtin_convertvector(~bits, vec) + 0.5f) * 0x1p-32f;
  vec s = v / (1.0f + u), z = s * s;
  vec close = 2.0f * s * (1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9)))));
  return -vlog(either(u > splat(0.7f), close, -vlog(u)));
}

static float exact_noise(uint64_t key, uint32_t index) {
  uvec bits = bits_of(key, (uvec){index});
  return (float)-log(-log(((double)bits[0] + 0.5) * 0x1p-32));
}

static inline __attribute__((always_inline)) long draw(const void *row, long count, const int bytes, uint64_t key,
                                                       float temperature) {
  vec most = splat(-INFINITY);
  ivec broken = {0};
  uvec place = (uvec)FIRST;
  for (long i = 0; i < count; i += LANES, place += LANES) {
    vec x = numbers(row, i, count, bytes) / temperature, score = x + estimate_noise(bits_of(key, place));
    broken |= x != x;
    most = either(score > most, score, most);
  }
  if (any(broken)) return -1;
  float largest = most[0];
  for (int lane = 1; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
  float bar = largest - NEAR - 4e-7f * fabsf(largest), exact = -INFINITY;
  long best = 0;
  place = (uvec)FIRST;
  for (long i = 0; i < count; i += LANES, place += LANES) {
    vec x = numbers(row, i, count, bytes) / temperature;
    ivec open = x + 23.0f >= bar; /* no noise is above 22.9 */
    if (!any(open)) continue;
    open &= x + estimate_noise(bits_of(key, place)) >= bar;
    if (!any(open)) continue;
    for (long lane = 0; lane < LANES && i + lane < count; lane++) {
      if (!open[lane]) continue;
      float score = x[lane] + exact_noise(key, (uint32_t)(i + lane));
      if (score > exact) exact = score, best = i + lane;
    }
  }
  return best;
}

/* The first of the largest of numbers / temperature + noise; -1 where one is NaN. */
long draw_best(const void *row, long count, int bytes, uint64_t key, float temperature) {
  return bytes == 2 ? draw(row, count, 2, key, temperature) : draw(row, count, 4, key, temperature);
}

/* ---- the walk ---- */

typedef struct {
  const char *logits;             /* [rows, nodes, width] of 2 or 4 bytes */
  const int64_t *tokens, *parents; /* [rows, nodes] */
  const uint64_t *keys;           /* [rows, levels], or null where nothing is drawn */
  int64_t *packed;                /* [rows, 3 + nodes]: accepted nodes, the bonus token, whether it failed, the path */
  long rows, nodes, width, levels;
  int bytes;
  float temperature;
} walk_arguments;

static long child_of(const int64_t *tokens, const int64_t *parents, long nodes, long node, long token) {
  for (long i = node + 1; i < nodes; i++)
    if (parents[i] == node && tokens[i] == token) return i;
  return -1;
}

/* Past its end a path stays where it is. */
void walk(const walk_arguments *a) {
  for (long row = 0; row < a->rows; row++) {
    const char *logits = a->logits + row * a->nodes * a->width * a->bytes;
    int64_t *out = a->packed + row * (3 + a->nodes), *path = out + 3;
    long count = 0, bonus;
    path[0] = 0;
    for (;;) {
      const char *at = logits + path[count] * a->width * a->bytes;
      bonus = a->keys ? draw_best(at, a->width, a->bytes, a->keys[row * a->levels + count], a->temperature)
                      : find_best(at, a->width, a->bytes);
      const long child = child_of(a->tokens + row * a->nodes, a->parents + row * a->nodes, a->nodes, path[count], bonus);
      if (bonus < 0 || child < 0) break;
      path[++count] = child;
    }
    out[0] = count, out[1] = bonus, out[2] = bonus < 0;
    for (long i = count + 1; i < a->nodes; i++) path[i] = path[count];
  }
}
