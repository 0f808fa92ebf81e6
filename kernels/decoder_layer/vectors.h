/* Vectors as GCC and Clang have them for whatever width the processor has, of as many numbers as fit its registers. */

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define MOST_WIDTH 512 /* of a head */
#define MOST_LEVELS 8  /* of shared segments */
#define INLINE static inline __attribute__((always_inline)) void

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

/* Numbers of 16 bits; GCC 12 makes two halves of the general conversion. */
static inline uvec load_halves(const uint16_t *from) {
#if defined(__AVX512F__)
  return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
  return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
  hvec half;
  __builtin_memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, uvec);
#endif
}

static inline vec load(const bf16 *from) { return (vec)(load_halves(from) << 16); }

static inline vec loadf(const float *from) {
  vec out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

static inline void storef(float *to, vec value) { __builtin_memcpy(to, &value, sizeof value); }

/* To nearest, ties to even; NaN stays NaN. */
static inline void store(bf16 *to, vec value) {
#ifdef __AVX512BF16__
  __m256bh half = _mm512_cvtneps_pbh((__m512)value); /* what float32 has no normal number for becomes zero */
  __builtin_memcpy(to, &half, sizeof half);
#else
  uvec bits = (uvec)value;
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  ivec nan = value != value;
  rounded = (uvec)((nan & 0x7fc0) | (~nan & (ivec)rounded));
#if defined(__AVX512F__)
  __m256i half = _mm512_cvtepi32_epi16((__m512i)rounded);
#elif defined(__AVX2__)
  __m256i whole = (__m256i)rounded;
  __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
#else
  hvec half = __builtin_convertvector(rounded, hvec);
#endif
  __builtin_memcpy(to, &half, sizeof half);
#endif
}

/* The lowest byte of each lane. */
static inline void store_bytes(uint8_t *to, ivec value) {
  typedef uint8_t bytes __attribute__((vector_size(LANES)));
  bytes small = __builtin_convertvector(value, bytes);
  __builtin_memcpy(to, &small, sizeof small);
}

static inline vec splat(float value) { return value - (vec){0}; }

static inline ivec lane_numbers(void) {
#if LANES == 16
  return (ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  return (ivec){0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

static inline float sum(vec value) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += value[lane];
  return total;
}

static inline int32_t highest(ivec value) {
#ifdef __AVX512F__
  return _mm512_reduce_max_epi32((__m512i)value);
#else
  int32_t most = value[0];
  for (int lane = 1; lane < LANES; lane++) most = value[lane] > most ? value[lane] : most;
  return most;
#endif
}

static inline int32_t whole_sum(ivec value) {
#ifdef __AVX512F__
  return _mm512_reduce_add_epi32((__m512i)value);
#else
  uint32_t total = 0;
  for (int lane = 0; lane < LANES; lane++) total += (uint32_t)value[lane];
  return (int32_t)total;
#endif
}

/* exp by powers of two and a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. */
static inline vec vexp(vec x) {
#ifdef __AVX512F__
  /* Of two operands, one of them NaN, these give the second. */
  vec safe = (vec)_mm512_min_ps((__m512)splat(88.0f), _mm512_max_ps((__m512)splat(-87.0f), (__m512)x));
  vec whole = (vec)_mm512_roundscale_ps((__m512)(safe * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
#else
  ivec low = x < splat(-87.0f), high = x > splat(88.0f), nan = x != x;
  vec safe = (vec)((low & (ivec)splat(-87.0f)) | (high & (ivec)splat(88.0f)) | (~(low | high | nan) & (ivec)x));
  vec shifted = safe * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
  ivec power = (ivec)shifted - (ivec)splat(12582912.0f);
  vec whole = shifted - 12582912.0f;
#endif
  vec r = safe - whole * 0.693145751953125f - whole * 1.42860677e-6f;
  vec p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  vec out = (vec)((ivec)p + (power << 23));
  return (vec)((nan & (ivec)x) | (~nan & (ivec)out));
#endif
}


static inline vec either(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Numbers of both by turns, and back. */
static inline __attribute__((always_inline)) void take_turns(ivec low, ivec high, ivec out[2]) {
#if LANES == 16
  out[0] = PICK(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  out[1] = PICK(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  out[0] = PICK(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
  out[1] = PICK(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

static inline __attribute__((always_inline)) void take_turns_back(ivec low, ivec high, ivec out[2]) {
#if LANES == 16
  out[0] = PICK(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  out[1] = PICK(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  out[0] = PICK(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
  out[1] = PICK(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

#undef PICK

/* Rows become columns. */
static inline void transpose(ivec rows[LANES]) {
  ivec turned[LANES];
  for (int size = 1; size < LANES; size *= 2) {
    for (int i = 0; i < LANES / 2; i++) take_turns(rows[i], rows[i + LANES / 2], turned + 2 * i);
    for (int i = 0; i < LANES; i++) rows[i] = turned[i];
  }
}
