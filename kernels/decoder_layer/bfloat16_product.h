/* ---- products by AVX-512's instructions for bfloat16 ---- */

#define MOST_ROWS 12 /* in registers while a panel passes */

/* Weights in 8 bit beside bfloat16 lie in an order in which the vectors below come out in theirs: of 64 in a line,
   [2][4][8], eights of the first half alternate with those of the second. */
int signs_lie_apart(void) { return 1; }

typedef struct {
  __m512i left, right; /* 32 bfloat16 each */
} two_vectors;

#ifdef __AVX512VBMI__

/* The upper and the lower bytes of 0 to 127 in bfloat16. */
static const uint8_t upper_bytes[128] __attribute__((aligned(64))) = {
#define UPPER(n) ((n) == 0 ? 0 : (n) < 2 ? 0x3f : (n) < 8 ? 0x40 : (n) < 32 ? 0x41 : 0x42)
#define LOWER(n) \
  ((n) == 0 ? 0 : (n) < 2 ? 0x80 : (n) < 4 ? ((n) - 2) << 6 : (n) < 8 ? 0x80 | ((n) - 4) << 5 : (n) < 16 ? ((n) - 8) << 4 \
   : (n) < 32 ? 0x80 | ((n) - 16) << 3 : (n) < 64 ? ((n) - 32) << 2 : 0x80 | ((n) - 64) << 1)
#define EIGHT(of, n) of(n), of((n) + 1), of((n) + 2), of((n) + 3), of((n) + 4), of((n) + 5), of((n) + 6), of((n) + 7)
#define ALL(of) \
  EIGHT(of, 0), EIGHT(of, 8), EIGHT(of, 16), EIGHT(of, 24), EIGHT(of, 32), EIGHT(of, 40), EIGHT(of, 48), EIGHT(of, 56), \
      EIGHT(of, 64), EIGHT(of, 72), EIGHT(of, 80), EIGHT(of, 88), EIGHT(of, 96), EIGHT(of, 104), EIGHT(of, 112), \
      EIGHT(of, 120)
    ALL(UPPER)};
static const uint8_t lower_bytes[128] __attribute__((aligned(64))) = {ALL(LOWER)};
#undef UPPER
#undef LOWER
#undef EIGHT
#undef ALL

/* A line of weights in 8 bit to bfloat16. */
static inline __attribute__((always_inline)) two_vectors widened(const char *from) {
  const __m512i line = _mm512_loadu_si512(from), sign = _mm512_set1_epi8((char)0x80);
  __m512i upper = _mm512_permutex2var_epi8(_mm512_load_si512(upper_bytes), line, _mm512_load_si512(upper_bytes + 64));
  __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(lower_bytes), line, _mm512_load_si512(lower_bytes + 64));
  upper = _mm512_ternarylogic_epi32(upper, line, sign, 0xf8); /* upper | (line & sign) */
  return (two_vectors){_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
}

#else

static inline __attribute__((always_inline)) __m512 widened_part(__m128i bytes) {
  const __m512i whole = _mm512_cvtepi8_epi32(bytes);
  const __m512i size = (__m512i)_mm512_cvtepi32_ps(_mm512_and_si512(whole, _mm512_set1_epi32(0x7f)));
  return (__m512)_mm512_or_si512(size, _mm512_and_si512(whole, _mm512_set1_epi32((int)0x80000000)));
}

static inline __attribute__((always_inline)) two_vectors widened(const char *from) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i line = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from));
  __m512 part[4] = {
      widened_part(_mm512_extracti32x4_epi32(line, 0)), widened_part(_mm512_extracti32x4_epi32(line, 1)),
      widened_part(_mm512_extracti32x4_epi32(line, 2)), widened_part(_mm512_extracti32x4_epi32(line, 3))};
  return (two_vectors){(__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]), (__m512i)_mm512_cvtne2ps_pbh(part[3], part[2])};
}

#endif

#define WIDENED 32 /* inputs whose weights are widened at a time */

/* The factors of 16 channels, each for the two inputs of a pair: of the first eight channels, and of the others. */
typedef struct {
  __m512 first, second;
} pair_factors;

static inline __attribute__((always_inline)) pair_factors for_pairs(__m512 factors) {
  const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (pair_factors){_mm512_permutexvar_ps(first, factors),
                        _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), factors)};
}

static inline __attribute__((always_inline)) __m512 load_half(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

/* Codes of 4 bits of 32 inputs to bfloat16, [16 pairs][PANEL][2]. Of every eight channels there are two lines, for eight
   pairs each; a channel's two inputs are neighbours, and the pairs lie in their 32 bits from the lowest on. */
INLINE widen_codes(const product_arguments *a, const char *weight, const uint16_t *factors, bf16 *out) {
  const __m512 digits = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int half = 0; half < 2; half++, weight += 256, out += PANEL) {
    const __m512 each = load_half(factors + half * LANES);
    __m512 least = load_half(factors + PANEL + half * LANES);
    if (a->zero_points) least = -(each * least);
    const pair_factors scale = for_pairs(each), offset = for_pairs(least);
    for (int eight = 0; eight < 2; eight++) {
      const __m512i first = _mm512_loadu_si512(weight + eight * 64), second = _mm512_loadu_si512(weight + 128 + eight * 64);
#pragma GCC unroll 8
      for (int pair = 0; pair < 8; pair++) {
        __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4 * (unsigned)pair), digits);
        __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(second, 4 * (unsigned)pair), digits);
        low = _mm512_fmadd_ps(low, scale.first, offset.first);
        high = _mm512_fmadd_ps(high, scale.second, offset.second);
        _mm512_store_si512(out + (8 * eight + pair) * 2 * PANEL, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    }
  }
}

/* int8 of 32 inputs, likewise. */
INLINE widen_bytes(const char *weight, const uint16_t *factors, bf16 *out) {
  for (int half = 0; half < 2; half++, weight += PANEL, out += PANEL) {
    const pair_factors scale = for_pairs(load_half(factors + half * LANES));
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; pair++) {
      const __m128i *line = (const __m128i *)(weight + pair * 2 * PANEL);
      __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(line)));
      __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(line + 1)));
      _mm512_store_si512(out + pair * 2 * PANEL, (__m512i)_mm512_cvtne2ps_pbh(high * scale.second, low * scale.first));
    }
  }
}

/* Weights that are not bfloat16 and become so. */
static inline int is_narrow(numbers kind) { return kind != IN_16_BIT && input_bytes(kind) == 2; }

/* Weights of 32 inputs, or the last ones, to bfloat16, [16 pairs][PANEL][2]. */
INLINE widen_weights(const numbers kind, const product_arguments *a, const char *weight, long panel, long input,
                     bf16 *out) {
  if (kind == GROUPS_IN_4_BIT)
    widen_codes(a, weight, factors_at(kind, a, panel, input), out);
  else if (kind == GROUPS_IN_8_BIT)
    widen_bytes(weight, factors_at(kind, a, panel, input), out);
  else
    for (long k = input; k < input + WIDENED && k < a->in_width; k += 2, weight += 2 * PANEL, out += 2 * PANEL) {
      two_vectors wide = widened(weight);
      _mm512_store_si512(out, wide.left);
      _mm512_store_si512(out + PANEL, wide.right);
    }
}

/* A whole panel, [in / 2][PANEL][2]. */
static __attribute__((noinline)) void widen_panel(const product_arguments *a, const char *weight, long panel, bf16 *out) {
  const long size = channel_bytes((numbers)a->kind, WIDENED) * PANEL;
  for (long k = 0; k < a->in_width; k += WIDENED, weight += size, out += WIDENED * PANEL) switch (a->kind) {
      case WEIGHTS_IN_8_BIT: widen_weights(WEIGHTS_IN_8_BIT, a, weight, panel, k, out); break;
      case GROUPS_IN_8_BIT: widen_weights(GROUPS_IN_8_BIT, a, weight, panel, k, out); break;
      case GROUPS_IN_4_BIT: widen_weights(GROUPS_IN_4_BIT, a, weight, panel, k, out); break;
    }
}

/* Memory for one; freed by the caller. */
static bf16 *widened_panel(long in_width) {
  bf16 *wide = aligned_alloc(64, (size_t)in_width * PANEL * sizeof(bf16));
  if (!wide) abort();
  return wide;
}

/* A row's sums of 16 channels, those of integers in their bits, as they are without scales of a whole channel. */
static inline __attribute__((always_inline)) vec scaled(numbers kind, const product_arguments *a, long row,
                                                        long channel, vec sums) {
  if (kind == WEIGHTS_IN_8_BIT) return sums * loadf((const float *)a->scales + channel);
  if (kind != BOTH_IN_8_BIT) return sums;
  __m512i exact = _mm512_sub_epi32((__m512i)sums, _mm512_loadu_si512(a->shifts + channel));
  return (vec)_mm512_cvtepi32_ps(exact) * loadf((const float *)a->scales + channel) * ((const float *)a->sizes)[row];
}

static __attribute__((noinline)) void finish_sums(const product_arguments *a, long row, long channel, vec sums) {
  finish(a, row, channel, scaled((numbers)a->kind, a, row, channel, sums));
}

/* What is left for a row's sums of a panel, all its channels at once where there are so many. */
INLINE finish_row(const product_arguments *a, long row, long channel, vec left, vec right) {
  if (a->out_width - channel < PANEL) {
    finish(a, row, channel, left);
    finish(a, row, channel + LANES, right);
    return;
  }
  if (a->bias) left += load(a->bias + channel), right += load(a->bias + channel + LANES);
  if (a->residual) {
    const bf16 *residual = a->residual + row * a->out_width + channel;
    left += load(residual), right += load(residual + LANES);
  }
  _mm512_storeu_si512(out_row(a, row) + channel, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
}

#include "matrix_unit.h"

/* `count` rows from `row` on times one panel of bfloat16. Every pair of inputs asks for 128 bytes from `ahead` on, `stride`
   further each time. */
INLINE tile(const int count, const product_arguments *a, const bf16 *weight, long panel, long row, const char *ahead,
            long stride) {
  const long width = a->in_width;
  const bf16 *in = (const bf16 *)a->in + row * width;
  __m512 sums[MOST_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (long k = 0; k < width; k += 2, weight += 2 * PANEL, ahead += stride) {
    __m512bh left = (__m512bh)_mm512_loadu_si512(weight), right = (__m512bh)_mm512_loadu_si512(weight + PANEL);
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + 64, 0, 2);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) {
      int32_t pair;
      __builtin_memcpy(&pair, in + r * width + k, sizeof pair);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, x);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, x);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < count; r++)
    for (int half = 0; half < 2; half++) {
      const long first = panel * PANEL + half * LANES;
      finish_sums(a, row + r, first, (vec)sums[r][half]);
    }
}

/* The intrinsic makes GCC copy every sum to and fro. */
static inline __attribute__((always_inline)) __m512i dot8(__m512i sums, __m512i bytes, __m512i weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(weights));
  return sums;
}

INLINE byte_tile(const int count, const product_arguments *a, long panel, long row, const char *ahead, long stride) {
  const long width = a->in_width;
  const uint8_t *in = (const uint8_t *)a->in + row * width;
  const int8_t *weight = (const int8_t *)a->weight + panel * PANEL * width;
  __m512i sums[MOST_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  for (long k = 0; k < width; k += 4, weight += 4 * PANEL, ahead += stride) {
    __m512i left = _mm512_loadu_si512(weight), right = _mm512_loadu_si512(weight + 2 * PANEL);
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + 64, 0, 2);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) {
      int32_t four;
      __builtin_memcpy(&four, in + r * width + k, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      sums[r][0] = dot8(sums[r][0], x, left);
      sums[r][1] = dot8(sums[r][1], x, right);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < count; r++)
    for (int half = 0; half < 2; half++) {
      const long first = panel * PANEL + half * LANES;
      finish_sums(a, row + r, first, (vec)sums[r][half]);
    }
}

#define ROWS(count) \
  case count: \
    if (bytes) byte_tile(count, a, panel, row, ahead, stride); \
    else tile(count, a, weight, panel, row, ahead, stride); \
    break;

/* All rows times one panel; `wide` is for weights that have to be widened. */
INLINE multiply_panel(const int bytes, const product_arguments *a, long panel, bf16 *wide) {
  const numbers kind = (numbers)a->kind;
  const long size = PANEL * channel_bytes(kind, a->in_width), pairs = a->in_width / (bytes ? 4 : 2);
  const long parts = (a->rows + MOST_ROWS - 1) / MOST_ROWS, stride = size / pairs / parts;
  const bf16 *weight = (const bf16 *)((const char *)a->weight + panel * size);
  if (wide) {
    widen_panel(a, (const char *)weight, panel, wide);
    weight = wide;
  }
  long row = 0;
  for (long part = 0; part < parts; part++) {
    const long count = (a->rows - row + parts - part - 1) / (parts - part);
    const char *ahead = (const char *)a->weight + (panel + 1) * size + part * (size / parts);
    switch (count) {
      ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
    }
    row += count;
  }
}

static void take_panels(void *pointer, int thread) {
  panel_queue *queue = pointer;
  const product_arguments *a = queue->a;
  int lane = thread % queue->count;
  bf16 *wide = is_narrow((numbers)a->kind) ? widened_panel(a->in_width) : 0;
  for (long panel; (panel = next_panel(queue, &lane)) >= 0;)
    if (a->kind == BOTH_IN_8_BIT)
      multiply_panel(1, a, panel, 0);
    else
      multiply_panel(0, a, panel, wide);
  free(wide);
}

#include "group_product.h"

static void multiply_block(panel_queue *queue, product_arguments *a, long panels) {
  const int by_groups = takes_groups((numbers)a->kind);
  run_all(by_groups ? take_group_panels : unit_takes(a) ? take_unit_panels : take_panels, queue, panels, a->threads);
}
