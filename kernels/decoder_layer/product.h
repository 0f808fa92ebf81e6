/* ---- products of a few rows with a large weight ----

   Weights lie in panels of 32 output channels, in the order they are read: one stream per thread, each weight once. Up
   to 12 rows stay in registers while a panel passes; further rows find it in the cache, and while all of them compute, the
   thread's next panel comes in from memory. Every sum runs over the input channels from the first to the last, however
   many rows there are. */

#define PANEL 32
#define MOST_ROWS 12

/* What is multiplied, and how weights lie in a panel. In 8 bit they are exact in bfloat16; those of groups become the
   bfloat16 nearest to scale * code + minimum. */
typedef enum {
  IN_16_BIT,        /* bfloat16: [in / 2][PANEL][2] */
  WEIGHTS_IN_8_BIT, /* a sign and seven bits, a scale per output channel; see `widened` */
  BOTH_IN_8_BIT,    /* int8 times bytes: [in / 4][PANEL][4] */
  GROUPS_IN_8_BIT,  /* int8, a scale per group of inputs: [in / 2][PANEL][2] */
  GROUPS_IN_4_BIT,  /* a scale and an offset per group: [in / 32][PANEL / 8][2][8][2] times 32 bits, see `widen_codes` */
  /* The same times int8 inputs in groups of 32, see group_product.h: */
  BYTES_BY_8_BIT_GROUPS, /* bytes around 128: [in / 4][PANEL][4] */
  BYTES_BY_4_BIT_GROUPS, /* [in / 8][PANEL][4] bytes: four inputs in the low halves, the next four in the high ones */
} numbers;

typedef struct {
  const void *in;        /* [rows, in_width] bfloat16, or bytes around 128; by groups: of every BLOCK_ROWS rows
                            [in_width / 32][rows][32] int8 */
  const void *weight;    /* [panels][..] */
  const void *scales;    /* weights in 8 bit: [panels * PANEL] float; groups in 8 bit: [panels][groups][PANEL] float16, in 4
                            bit [panels][groups][2][PANEL], scales and offsets */
  const int32_t *shifts; /* both in 8 bit: [panels * PANEL] 128 times the sum of a channel's weights */
  const void *sizes;     /* both in 8 bit: [rows] float, scales of the inputs; by groups: input_group, as `in` is arranged */
  const bf16 *bias;      /* [out_width], or null */
  const bf16 *residual;  /* [rows, out_width], or null */
  bf16 *out;             /* [rows, out_width], or as `places` has it */
  const int64_t *places; /* [rows] where each row of `out` stands, without a residual only; or null */
  long rows, in_width, out_width, group; /* group: inputs of one, a multiple of 32 */
  int kind;              /* numbers */
  int zero_points;       /* offsets are these, scale * (code - offset); else minima */
  int threads;
} product_arguments;

/* Rows in blocks whose inputs stay in a core's cache while all panels pass. */
#define BLOCK_ROWS 256

static inline long input_bytes(numbers kind) {
  return kind == BOTH_IN_8_BIT || kind >= BYTES_BY_8_BIT_GROUPS ? 1 : 2;
}

/* Codes have four bits; and a scale and an offset per group. */
static inline int in_4_bit(numbers kind) { return kind == GROUPS_IN_4_BIT || kind == BYTES_BY_4_BIT_GROUPS; }

/* Of the weights of one output channel. */
static inline long channel_bytes(numbers kind, long in_width) {
  return kind == IN_16_BIT ? 2 * in_width : in_4_bit(kind) ? in_width / 2 : in_width;
}

/* What 32 inputs of a row share, where they are in groups. */
typedef struct {
  float scale, total; /* total: scale times the sum of the bytes */
} input_group;

#define TOGETHER 32

static inline int takes_groups(numbers kind) { return kind >= BYTES_BY_8_BIT_GROUPS; }

/* Of a row's `sizes`. */
static inline long input_sizes(numbers kind, long in_width) {
  return takes_groups(kind) ? in_width / TOGETHER * (long)sizeof(input_group) : (long)sizeof(float);
}

/* At most. */
static inline long most_input_sizes(long in_width) { return (in_width / TOGETHER + 1) * (long)sizeof(input_group); }

static inline bf16 *out_row(const product_arguments *a, long row) {
  return a->out + (a->places ? (long)a->places[row] : row) * a->out_width;
}

/* Not inlined: hundreds of copies would take minutes to compile. */
static __attribute__((noinline)) void finish(const product_arguments *a, long row, long first, vec value) {
  long left = a->out_width - first;
  bf16 *out = out_row(a, row) + first;
  if (left >= LANES) {
    if (a->bias) value += load(a->bias + first);
    if (a->residual) value += load(a->residual + row * a->out_width + first);
    store(out, value);
  } else if (left > 0) {
    bf16 whole[LANES] = {0}, part[LANES] = {0};
    if (a->bias) __builtin_memcpy(whole, a->bias + first, (size_t)left * sizeof(bf16));
    if (a->bias) value += load(whole);
    if (a->residual) __builtin_memcpy(part, a->residual + row * a->out_width + first, (size_t)left * sizeof(bf16));
    if (a->residual) value += load(part);
    store(whole, value);
    __builtin_memcpy(out, whole, (size_t)left * sizeof(bf16));
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

#define MOST_LANES 64

/* A stretch of the panels for each thread: so what a thread writes of an output lies where it wrote before, in its own
   core's cache. Whoever is done takes from the others'. */
typedef struct {
  const product_arguments *a;
  struct {
    long next, end;
    char apart[48]; /* a line of the cache for each */
  } lanes[MOST_LANES] __attribute__((aligned(64)));
  int count; /* of lanes */
} panel_queue;

/* The next panel for a thread, -1 where none is left. `lane` begins as the thread's own. */
static inline long next_panel(panel_queue *queue, int *lane) {
  for (int tried = 0; tried < queue->count; tried++, *lane = (*lane + 1) % queue->count) {
    long panel = __atomic_fetch_add(&queue->lanes[*lane].next, 1, __ATOMIC_RELAXED);
    if (panel < queue->lanes[*lane].end) return panel;
  }
  return -1;
}

/* Weights in 8 bit beside bfloat16 lie in an order in which the vectors below come out in theirs: of 64 in a line,
   [2][4][8], eights of the first half alternate with those of the second. */
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

/* A panel's factors of the group that an input is in. */
static inline const uint16_t *factors_at(const numbers kind, const product_arguments *a, long panel, long input) {
  if (kind < GROUPS_IN_8_BIT) return 0;
  const long each = in_4_bit(kind) ? 2 * PANEL : PANEL;
  return (const uint16_t *)a->scales + (panel * (a->in_width / a->group) + input / a->group) * each;
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

/* Asks for `lines` lines of the memory from `from` on, up to `end`; returns where it stopped. */
static inline __attribute__((always_inline)) const char *ask(const char *from, const char *end, long lines) {
  for (; lines > 0 && from < end; lines--, from += 64) __builtin_prefetch(from, 0, 2);
  return from;
}

#include "matrix_unit.h"

/* Whether this processor has the instructions; without them nothing below may be called. */
int has_products(void) { return 1; }

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

void product(const product_arguments *a) {
  const long panels = (a->out_width + PANEL - 1) / PANEL, size = input_bytes((numbers)a->kind);
  const int by_groups = takes_groups((numbers)a->kind);
  for (long row = 0; row < a->rows; row += BLOCK_ROWS) {
    product_arguments block = *a;
    block.rows = a->rows - row < BLOCK_ROWS ? a->rows - row : BLOCK_ROWS;
    block.in = (const char *)a->in + row * a->in_width * size;
    if (a->places)
      block.places = a->places + row;
    else
      block.out = a->out + row * a->out_width;
    if (a->residual) block.residual = a->residual + row * a->out_width;
    if (a->sizes) block.sizes = (const char *)a->sizes + row * input_sizes((numbers)a->kind, a->in_width);
    panel_queue queue = {.a = &block, .count = a->threads < MOST_LANES ? a->threads : MOST_LANES};
    if (queue.count < 1) queue.count = 1;
    for (int lane = 0; lane < queue.count; lane++) {
      queue.lanes[lane].next = panels * lane / queue.count;
      queue.lanes[lane].end = panels * (lane + 1) / queue.count;
    }
    run_all(by_groups ? take_group_panels : unit_takes(a) ? take_unit_panels : take_panels, &queue, panels, a->threads);
  }
}

#else

int has_matrix_unit(void) { return 0; }

int has_products(void) { return 0; }

void product(const product_arguments *a) { (void)a; }

#endif
