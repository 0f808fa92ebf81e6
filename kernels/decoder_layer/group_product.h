/* ---- products of inputs in 8 bit with weights in groups ----

   Weights are codes of 4 or 8 bits with a scale and a minimum per group of inputs, and 32 inputs of a row share a scale
   too. The sums of 32 products are whole numbers and so exact, by vectors (VPDPBUSD: unsigned codes by signed inputs) as
   by tiles; they become float32 one after the other, from the first input to the last, whatever other rows there are. It
   is llama.cpp's scheme for such files, and needs a fraction of the instructions that make bfloat16 numbers of weights. */

#define QUADS (TOGETHER / 4)

/* A group's factors by channels: the weight is scale * code + least. */
typedef struct {
  vec scale[2], least[2];
} group_factors;

INLINE load_factors(const int four, const product_arguments *a, const uint16_t *from, group_factors *f) {
  for (int half = 0; half < 2; half++) {
    f->scale[half] = (vec)load_half(from + half * LANES);
    if (!four)
      f->least[half] = f->scale[half] * -128.0f; /* codes are bytes around 128 */
    else if (a->zero_points)
      f->least[half] = -((vec)load_half(from + PANEL + half * LANES) * f->scale[half]);
    else
      f->least[half] = (vec)load_half(from + PANEL + half * LANES);
  }
}

/* Codes of 32 inputs by 32 channels, [quad][half of the channels], each 16 channels by 4 inputs. */
INLINE load_codes(const int four, const uint8_t *from, __m512i codes[QUADS][2]) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int quad = 0; quad < QUADS; quad += four ? 2 : 1)
    for (int half = 0; half < 2; half++, from += 64) {
      const __m512i line = _mm512_loadu_si512(from);
      codes[quad][half] = four ? _mm512_and_si512(line, low) : line;
      if (four) codes[quad + 1][half] = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
    }
}

/* A row's sums of 16 channels, with 32 more products each. */
static inline __attribute__((always_inline)) __m512 with_group(const group_factors *f, int half, const input_group *each,
                                                               __m512i whole, __m512 sums) {
  const __m512 factor = (__m512)(f->scale[half] * each->scale);
  const __m512 now = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, sums);
  return _mm512_fmadd_ps((__m512)f->least[half], _mm512_set1_ps(each->total), now);
}

#define ROWS_PER_ASK 4

/* All rows times one panel: `sums`, zeros before, are [rows][PANEL]. Some rows each ask for `lines` lines of the next
   panel. */
INLINE multiply_groups(const int four, const product_arguments *a, long panel, float *sums) {
  const numbers kind = four ? BYTES_BY_4_BIT_GROUPS : BYTES_BY_8_BIT_GROUPS;
  const long rows = a->rows, groups = a->in_width / TOGETHER;
  const long line = PANEL * channel_bytes(kind, TOGETHER), size = groups * line;
  const long asks = (rows + ROWS_PER_ASK - 1) / ROWS_PER_ASK, lines = (line / 64 + asks - 1) / asks;
  const char *weight = (const char *)a->weight + panel * size;
  const int8_t *in = a->in;
  const input_group *each = a->sizes;
  for (long group = 0; group < groups; group++, weight += line) {
    const char *ahead = weight + size, *end = ahead + line;
    const uint16_t *next = factors_at(kind, a, panel + 1, group * TOGETHER);
    __m512i codes[QUADS][2];
    group_factors factors;
    load_factors(four, a, factors_at(kind, a, panel, group * TOGETHER), &factors);
    load_codes(four, (const uint8_t *)weight, codes);
    __builtin_prefetch(next, 0, 2);
    if (four) __builtin_prefetch(next + PANEL, 0, 2);
    for (long row = 0; row < rows;) {
      ahead = ask(ahead, end, lines);
      for (const long until = row + ROWS_PER_ASK < rows ? row + ROWS_PER_ASK : rows; row < until; row++) {
        __m512i whole[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 8
        for (int quad = 0; quad < QUADS; quad++) {
          int32_t bytes;
          __builtin_memcpy(&bytes, in + 4 * quad, sizeof bytes);
          const __m512i inputs = _mm512_set1_epi32(bytes);
          whole[0] = dot8(whole[0], codes[quad][0], inputs);
          whole[1] = dot8(whole[1], codes[quad][1], inputs);
        }
        for (int half = 0; half < 2; half++) {
          float *sum = sums + row * PANEL + half * LANES;
          _mm512_store_ps(sum, with_group(&factors, half, each, whole[half], _mm512_load_ps(sum)));
        }
        in += TOGETHER;
        each++;
      }
    }
  }
}

#include "unit_groups.h"

static void take_group_panels(void *pointer, int thread) {
  panel_queue *queue = pointer;
  const product_arguments *a = queue->a;
  const int four = a->kind == BYTES_BY_4_BIT_GROUPS, unit = unit_takes_groups(a);
  int lane = thread % queue->count;
  float sums[BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
  if (unit) open_unit_for_groups(a->rows);
  for (long panel; (panel = next_panel(queue, &lane)) >= 0;) {
    __builtin_memset(sums, 0, (size_t)(a->rows * PANEL) * sizeof *sums);
    if (unit && four)
      multiply_groups_by_tiles(1, a, panel, sums);
    else if (unit)
      multiply_groups_by_tiles(0, a, panel, sums);
    else if (four)
      multiply_groups(1, a, panel, sums);
    else
      multiply_groups(0, a, panel, sums);
    for (long row = 0; row < a->rows; row++)
      finish_row(a, row, panel * PANEL, loadf(sums + row * PANEL), loadf(sums + row * PANEL + LANES));
  }
  if (unit) close_unit();
}
