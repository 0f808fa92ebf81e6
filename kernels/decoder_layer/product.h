/* ---- products of a few rows with a large weight ----

   Weights lie in panels of 32 output channels, in the order they are read: one stream per thread, each weight once. Up
   to 12 rows stay in registers while a panel passes; further rows find it in the cache, and while all of them compute, the
   thread's next panel comes in from memory. Every sum runs over the input channels from the first to the last, however
   many rows there are. */

#define PANEL 32
#define MOST_ROWS 12

typedef struct {
  const void *in;        /* [rows, in_width] bfloat16, or bytes around 128 */
  const void *weight;    /* [panels][in_width / 2 or 4][PANEL][2 or 4] bfloat16 or int8 */
  const float *scales;   /* int8: [panels * PANEL] of the output channels */
  const int32_t *shifts; /* int8: [panels * PANEL] 128 times the sum of a channel's weights */
  const float *sizes;    /* int8: [rows] scales of the inputs */
  const bf16 *bias;      /* [out_width], or null */
  const bf16 *residual;  /* [rows, out_width], or null */
  bf16 *out;             /* [rows, out_width] */
  long rows, in_width, out_width;
  int threads;
} product_arguments;

static inline void finish(const product_arguments *a, long row, long first, vec value) {
  long left = a->out_width - first;
  bf16 *out = a->out + row * a->out_width + first;
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

#include "matrix_unit.h"

/* Whether this processor has the instructions; without them nothing below may be called. */
int has_products(void) { return 1; }

/* `count` rows from `row` on times one panel. A step reads 128 bytes of weights, and asks for as many from `ahead` on,
   `stride` further every step. */
INLINE tile(const int count, const product_arguments *a, long panel, long row, const char *ahead, long stride) {
  const long width = a->in_width;
  const bf16 *in = (const bf16 *)a->in + row * width, *weight = (const bf16 *)a->weight + panel * PANEL * width;
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
  for (int r = 0; r < count; r++) {
    finish(a, row + r, panel * PANEL, (vec)sums[r][0]);
    finish(a, row + r, panel * PANEL + LANES, (vec)sums[r][1]);
  }
}

/* The intrinsic makes GCC copy every sum to and fro. */
static inline __attribute__((always_inline)) __m512i dot8(__m512i sums, __m512i bytes, __m512i weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(weights));
  return sums;
}

INLINE tile8(const int count, const product_arguments *a, long panel, long row, const char *ahead, long stride) {
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
      long first = panel * PANEL + half * LANES;
      __m512i whole = _mm512_sub_epi32(sums[r][half], _mm512_loadu_si512(a->shifts + first));
      vec exact = (vec)_mm512_cvtepi32_ps(whole) * loadf(a->scales + first) * a->sizes[row + r];
      finish(a, row + r, first, exact);
    }
}

#define ROWS(count, name) \
  case count: \
    name(count, a, panel, row, ahead, stride); \
    break;
#define PANELS(task, name) \
  static void task(const product_arguments *a, long panel, long next) { \
    const long size = a->in_width * PANEL * (a->sizes ? 1 : 2); \
    const long parts = (a->rows + MOST_ROWS - 1) / MOST_ROWS, stride = 128 / parts; \
    long row = 0; \
    for (long part = 0; part < parts; part++) { \
      const long count = (a->rows - row + parts - part - 1) / (parts - part); \
      const char *ahead = (const char *)a->weight + next * size + part * (size / parts); \
      switch (count) { \
        ROWS(1, name) ROWS(2, name) ROWS(3, name) ROWS(4, name) ROWS(5, name) ROWS(6, name) \
        ROWS(7, name) ROWS(8, name) ROWS(9, name) ROWS(10, name) ROWS(11, name) ROWS(12, name) \
      } \
      row += count; \
    } \
  }

PANELS(panel_task, tile)
PANELS(panel_task8, tile8)

static void take_panels(void *pointer, int thread) {
  panel_queue *queue = pointer;
  int lane = thread % queue->count;
  for (long panel; (panel = next_panel(queue, &lane)) >= 0;)
    (queue->a->sizes ? panel_task8 : panel_task)(queue->a, panel, panel + 1);
}

/* Rows in blocks whose inputs stay in a core's cache while all panels pass. */
#define BLOCK_ROWS 256

void product(const product_arguments *a) {
  const long panels = (a->out_width + PANEL - 1) / PANEL, size = a->sizes ? 1 : (long)sizeof(bf16);
  for (long row = 0; row < a->rows; row += BLOCK_ROWS) {
    product_arguments block = *a;
    block.rows = a->rows - row < BLOCK_ROWS ? a->rows - row : BLOCK_ROWS;
    block.in = (const char *)a->in + row * a->in_width * size;
    block.out = a->out + row * a->out_width;
    if (a->residual) block.residual = a->residual + row * a->out_width;
    if (a->sizes) block.sizes = a->sizes + row;
    panel_queue queue = {.a = &block, .count = a->threads < MOST_LANES ? a->threads : MOST_LANES};
    if (queue.count < 1) queue.count = 1;
    for (int lane = 0; lane < queue.count; lane++) {
      queue.lanes[lane].next = panels * lane / queue.count;
      queue.lanes[lane].end = panels * (lane + 1) / queue.count;
    }
    void (*take)(void *, int) = unit_takes(a) ? (a->sizes ? take_unit_panels8 : take_unit_panels) : take_panels;
    run_all(take, &queue, panels, a->threads);
  }
}

#else

int has_matrix_unit(void) { return 0; }

int has_products(void) { return 0; }

void product(const product_arguments *a) { (void)a; }

#endif
