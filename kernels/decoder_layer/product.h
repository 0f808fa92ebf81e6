/* ---- products of a few rows with a large weight ----

   Weights lie in panels of 32 output channels, in the order they are read: one stream per thread, each weight once. Some
   rows stay in registers while a panel passes; further rows find it in the cache, and while all of them compute, the
   thread's next weights come in from memory. Every sum runs over the input channels from the first to the last, however
   many rows there are. */

#define PANEL 32

/* What is multiplied, and how weights lie in a panel. In 8 bit they are exact in bfloat16; those of groups become the
   bfloat16 nearest to scale * code + minimum. */
typedef enum {
  IN_16_BIT,        /* bfloat16: [in / 2][PANEL][2] */
  WEIGHTS_IN_8_BIT, /* a scale per output channel; [in / 2][PANEL][2], or as `widened` has it where signs_lie_apart */
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

/* A panel's factors of the group that an input is in. */
static inline const uint16_t *factors_at(const numbers kind, const product_arguments *a, long panel, long input) {
  if (kind < GROUPS_IN_8_BIT) return 0;
  const long each = in_4_bit(kind) ? 2 * PANEL : PANEL;
  return (const uint16_t *)a->scales + (panel * (a->in_width / a->group) + input / a->group) * each;
}

/* Asks for `lines` lines of the memory from `from` on, up to `end`; returns where it stopped. */
static inline __attribute__((always_inline)) const char *ask(const char *from, const char *end, long lines) {
  for (; lines > 0 && from < end; lines--, from += 64) __builtin_prefetch(from, 0, 2);
  return from;
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "bfloat16_product.h"
#else
#include "widened_product.h"
#endif

/* Whether the processor has the byte order that weights are laid out for; without it nothing below may be called. */
int has_products(void) { return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__; }

void product(const product_arguments *a) {
  const long panels = (a->out_width + PANEL - 1) / PANEL, size = input_bytes((numbers)a->kind);
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
    multiply_block(&queue, &block, panels);
  }
}
