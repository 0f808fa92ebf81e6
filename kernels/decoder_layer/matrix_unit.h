/* ---- products by the processor's matrix unit (AMX) ----

   The panels are its tiles as they lie: 16 steps of four bytes by 16 channels, two of them beside each other. A step
   multiplies 16 rows by 32 channels, so the rate of products is no limit for some hundred rows, and memory's is. A row's
   sums do not depend on the other rows of a tile; every number of rows goes this way, since sums have another order than
   vectors' (Intel's manual, TDPBF16PS). */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define WITH_UNIT
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS 16
#define STEP 64 /* bytes of a row of inputs: 32 bfloat16, or 64 in 8 bit */

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tile_shapes;

/* Linux keeps the unit's registers for those that ask for them. */
static int ask_for_unit(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

static int unit_allowed; /* 1 yes, -1 no, 0 not asked yet */

int has_matrix_unit(void) {
  int known = __atomic_load_n(&unit_allowed, __ATOMIC_RELAXED);
  if (!known) {
    known = ask_for_unit() ? 1 : -1;
    __atomic_store_n(&unit_allowed, known, __ATOMIC_RELAXED);
  }
  return known > 0;
}

static int unit_takes(const product_arguments *a) {
  return has_matrix_unit() && !takes_groups((numbers)a->kind) && a->in_width * input_bytes((numbers)a->kind) % STEP == 0;
}

static inline void load_shapes(const tile_shapes *shapes) {
  __asm__ volatile("" : : "r"(shapes) : "memory"); /* GCC's intrinsic says that it reads the first bytes alone */
  _tile_loadconfig(shapes);
}

/* All tiles are 64 bytes wide; the first `count` have `first` rows, the others `second`. */
static void shape_tiles(int count, long first, long second) {
  tile_shapes shapes = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = (uint8_t)(tile < count ? first : second);
  }
  load_shapes(&shapes);
}

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. */
static void open_unit(long rows) { shape_tiles(6, rows < TILE_ROWS ? rows : TILE_ROWS, TILE_ROWS); }

static void close_unit(void) { _tile_release(); }

/* Sums of some rows of a panel, [rows][PANEL] in two tiles, that are still to be written. */
typedef struct {
  const product_arguments *a;
  long panel;
  long row, end;      /* rows that are left */
  long first, second; /* rows where the tiles begin */
  long split;         /* rows from here on are in the second one */
  const float *sums;
} unfinished;

/* Writes `count` of them, where so many are left. */
INLINE finish_rows(unfinished *u, long count) {
  const product_arguments *a = u->a;
  const numbers kind = (numbers)a->kind;
  const long channel = u->panel * PANEL, end = u->end - u->row < count ? u->end : u->row + count;
  for (; u->row < end; u->row++) {
    const float *line = u->sums + (u->row < u->split ? u->row - u->first : u->row - u->second + TILE_ROWS) * PANEL;
    vec half[2] = {loadf(line), loadf(line + LANES)};
    for (int i = 0; i < 2; i++) half[i] = scaled(kind, a, u->row, channel + i * LANES, half[i]);
    finish_row(a, u->row, channel, half[0], half[1]);
  }
}

/* Adds to a tile of sums, by `kind`; tiles are named by constants. */
#define MULTIPLY(sums, inputs, weights) \
  do { \
    if (kind == BOTH_IN_8_BIT) \
      _tile_dpbusd(sums, inputs, weights); \
    else \
      _tile_dpbf16ps(sums, inputs, weights); \
  } while (0)

/* One tile of rows, or two, times a panel: the sums of 32 channels, [rows][PANEL]. While the unit multiplies, the vectors
   write what it multiplied before. Every step asks for `stride` bytes from `ahead` on, a quarter at a time: a core keeps
   track of a few lines on their way, and more at once would have the tiles wait. `widens`: weights become
   bfloat16 step by step. */
INLINE multiply_tiles(const numbers kind, const int widens, const int pair, const product_arguments *a, const char *weight,
                      long panel, long first, long second, const char *ahead, long stride, float *sums,
                      unfinished *before) {
  const long width = a->in_width * input_bytes(kind), steps = width / STEP;
  const long step = widens ? channel_bytes(kind, WIDENED) * PANEL : PANEL * STEP;
  const long each = (before->end - before->row + steps - 1) / steps, lines = (stride + 255) / 256;
  const char *in = (const char *)a->in + first * width, *below = (const char *)a->in + second * width;
  bf16 wide[2][WIDENED * PANEL] __attribute__((aligned(64))); /* this step's, and the last one's */
  _tile_zero(0);
  _tile_zero(1);
  if (pair) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < width; k += STEP, weight += step, ahead += stride) {
    const char *now = weight, *asked = ahead, *end = ahead + stride;
    if (widens) {
      bf16 *tiles = wide[k / STEP & 1];
      widen_weights(kind, a, weight, panel, k / 2, tiles);
      __asm__ volatile("" : : "r"(tiles) : "memory"); /* the intrinsics do not say that they read it */
      now = (const char *)tiles;
    }
    _tile_loadd(4, in + k, width);
    _tile_loadd(6, now, 4 * PANEL);
    if (pair) _tile_loadd(5, below + k, width);
    asked = ask(asked, end, lines);
    MULTIPLY(0, 4, 6);
    if (pair) MULTIPLY(2, 5, 6);
    asked = ask(asked, end, lines);
    _tile_loadd(7, now + 2 * PANEL, 4 * PANEL);
    asked = ask(asked, end, lines);
    MULTIPLY(1, 4, 7);
    if (pair) MULTIPLY(3, 5, 7);
    ask(asked, end, lines);
    finish_rows(before, each);
  }
  _tile_stored(0, sums, 4 * PANEL);
  _tile_stored(1, sums + LANES, 4 * PANEL);
  if (pair) {
    _tile_stored(2, sums + PANEL * TILE_ROWS, 4 * PANEL);
    _tile_stored(3, sums + PANEL * TILE_ROWS + LANES, 4 * PANEL);
  }
}

#undef MULTIPLY

/* All rows times one panel after the other. The last tile of rows begins earlier where it would not be full; rows it has
   in common with the one before are computed twice and written once. */
INLINE multiply_panels(const numbers kind, const int widens, panel_queue *queue, int lane) {
  const product_arguments *a = queue->a;
  const long rows = a->rows, pairs = (rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  const long size = PANEL * channel_bytes((numbers)a->kind, a->in_width), steps = a->in_width * input_bytes(kind) / STEP;
  const long stride = (size / steps / pairs + 63) / 64 * 64;
  const long last = rows > TILE_ROWS ? rows - TILE_ROWS : 0;
  float sums[2][2 * TILE_ROWS * PANEL] __attribute__((aligned(64)));
  bf16 *kept = !widens && is_narrow((numbers)a->kind) ? widened_panel(a->in_width) : 0;
  unfinished before = {.a = a};
  int turn = 0;
  open_unit(rows);
  for (long panel; (panel = next_panel(queue, &lane)) >= 0;) {
    const char *weight = (const char *)a->weight + panel * size, *next = weight + size;
    if (kept) {
      widen_panel(a, weight, panel, kept);
      __asm__ volatile("" : : "r"(kept) : "memory"); /* as above */
      weight = (const char *)kept;
    }
    for (long part = 0; part < pairs; part++, turn = !turn) {
      const char *ahead = next + part * (size / pairs);
      const long row = part * 2 * TILE_ROWS, left = rows - row;
      const long first = left < TILE_ROWS ? last : row, second = row + TILE_ROWS < last ? row + TILE_ROWS : last;
      if (left > TILE_ROWS)
        multiply_tiles(kind, widens, 1, a, weight, panel, first, second, ahead, stride, sums[turn], &before);
      else
        multiply_tiles(kind, widens, 0, a, weight, panel, first, 0, ahead, stride, sums[turn], &before);
      before = (unfinished){a, panel, row, left < 2 * TILE_ROWS ? rows : row + 2 * TILE_ROWS, first, second,
                            row + TILE_ROWS, sums[turn]};
    }
  }
  finish_rows(&before, before.end);
  close_unit();
  free(kept);
}

/* Weights that are narrow become bfloat16 step by step, for one pair of tiles; a panel at a time for several. */
static void take_unit_panels(void *pointer, int thread) {
  panel_queue *queue = pointer;
  const int lane = thread % queue->count, several = queue->a->rows > 2 * TILE_ROWS;
  const numbers kind = (numbers)queue->a->kind;
  if (kind == BOTH_IN_8_BIT)
    multiply_panels(BOTH_IN_8_BIT, 0, queue, lane);
  else if (kind == IN_16_BIT || several)
    multiply_panels(IN_16_BIT, 0, queue, lane);
  else if (kind == WEIGHTS_IN_8_BIT)
    multiply_panels(WEIGHTS_IN_8_BIT, 1, queue, lane);
  else if (kind == GROUPS_IN_8_BIT)
    multiply_panels(GROUPS_IN_8_BIT, 1, queue, lane);
  else
    multiply_panels(GROUPS_IN_4_BIT, 1, queue, lane);
}

#else

int has_matrix_unit(void) { return 0; }

static void close_unit(void) {}
static int unit_takes(const product_arguments *a) { (void)a; return 0; }
static void take_unit_panels(void *queue, int thread) { (void)queue, (void)thread; }

#endif
