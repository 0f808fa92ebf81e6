/* ---- products by the processor's matrix unit (AMX) ----

   The panels are its tiles as they lie: 16 steps of four bytes by 16 channels, two of them beside each other. A step
   multiplies 16 rows by 32 channels, so the rate of products is no limit for some hundred rows, and memory's is. A row's
   sums do not depend on the other rows of a tile; every number of rows goes this way, since sums have another order than
   vectors' (Intel's manual, TDPBF16PS). */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
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
  return has_matrix_unit() && a->in_width * (a->sizes ? 1 : 2) % STEP == 0;
}

/* All tiles are 64 bytes wide; the first `count` have `first` rows, the others `second`. */
static void shape_tiles(int count, long first, long second) {
  tile_shapes shapes = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) {
    shapes.bytes[tile] = 64;
    shapes.rows[tile] = (uint8_t)(tile < count ? first : second);
  }
  _tile_loadconfig(&shapes);
}

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. */
static void open_unit(long rows) { shape_tiles(6, rows < TILE_ROWS ? rows : TILE_ROWS, TILE_ROWS); }

static void close_unit(void) { _tile_release(); }

/* One tile of rows, or two, times a panel: the sums of 32 channels, [rows][PANEL]. Asks for `stride` bytes from `ahead`
   on at every step. */
INLINE multiply_tiles(const int whole, const int pair, const product_arguments *a, long panel, long first, long second,
                      const char *ahead, long stride, void *sums) {
  const long width = a->in_width * (whole ? 1 : 2);
  const char *in = (const char *)a->in + first * width, *below = (const char *)a->in + second * width;
  const char *weight = (const char *)a->weight + panel * PANEL * width;
  _tile_zero(0);
  _tile_zero(1);
  if (pair) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < width; k += STEP, weight += PANEL * STEP, ahead += stride) {
    for (long at = 0; at < stride; at += 64) __builtin_prefetch(ahead + at, 0, 2);
    _tile_loadd(4, in + k, width);
    _tile_loadd(6, weight, 4 * PANEL);
    _tile_loadd(7, weight + 2 * PANEL, 4 * PANEL);
    if (pair) _tile_loadd(5, below + k, width);
    if (whole) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      if (pair) _tile_dpbusd(2, 5, 6);
      if (pair) _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (pair) _tile_dpbf16ps(2, 5, 6);
      if (pair) _tile_dpbf16ps(3, 5, 7);
    }
  }
  char *out = sums;
  _tile_stored(0, out, 4 * PANEL);
  _tile_stored(1, out + 4 * LANES, 4 * PANEL);
  if (pair) {
    _tile_stored(2, out + 4 * PANEL * TILE_ROWS, 4 * PANEL);
    _tile_stored(3, out + 4 * PANEL * TILE_ROWS + 4 * LANES, 4 * PANEL);
  }
}

static void finish_tile(const product_arguments *a, long panel, long first, long from, long to, const float *sums) {
  for (long row = from; row < to; row++)
    for (long at = 0; at < PANEL; at += LANES) {
      const float *line = sums + (row - first) * PANEL + at;
      long channel = panel * PANEL + at;
      if (!a->sizes) {
        finish(a, row, channel, loadf(line));
        continue;
      }
      ivec whole, shifts;
      __builtin_memcpy(&whole, line, sizeof whole);
      __builtin_memcpy(&shifts, a->shifts + channel, sizeof shifts);
      vec exact = __builtin_convertvector(whole - shifts, vec) * loadf(a->scales + channel) * a->sizes[row];
      finish(a, row, channel, exact);
    }
}

/* All rows times a panel. The last tile of rows begins earlier where it would not be full; rows it has in common with
   the one before are computed twice and written once. */
INLINE multiply_panel(const int whole, const product_arguments *a, long panel, long next) {
  const long rows = a->rows, pairs = (rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  const long size = a->in_width * PANEL * (whole ? 1 : 2), stride = (PANEL * STEP / pairs + 63) / 64 * 64;
  float sums[2 * TILE_ROWS * PANEL] __attribute__((aligned(64)));
  for (long part = 0; part < pairs; part++) {
    const char *ahead = (const char *)a->weight + next * size + part * (size / pairs);
    long row = part * 2 * TILE_ROWS, left = rows - row, last = rows > TILE_ROWS ? rows - TILE_ROWS : 0;
    long first = left < TILE_ROWS ? last : row, second = row + TILE_ROWS < last ? row + TILE_ROWS : last;
    if (left > TILE_ROWS) {
      multiply_tiles(whole, 1, a, panel, first, second, ahead, stride, sums);
      finish_tile(a, panel, first, row, row + TILE_ROWS, sums);
      finish_tile(a, panel, second, row + TILE_ROWS, left < 2 * TILE_ROWS ? rows : row + 2 * TILE_ROWS,
                  sums + PANEL * TILE_ROWS);
    } else {
      multiply_tiles(whole, 0, a, panel, first, 0, ahead, stride, sums);
      finish_tile(a, panel, first, row, rows, sums);
    }
  }
}

static void unit_task(const product_arguments *a, long panel, long next) { multiply_panel(0, a, panel, next); }

static void unit_task8(const product_arguments *a, long panel, long next) { multiply_panel(1, a, panel, next); }

#else

int has_matrix_unit(void) { return 0; }

static int unit_takes(const product_arguments *a) { (void)a; return 0; }
static void open_unit(long rows) { (void)rows; }
static void close_unit(void) {}
#define unit_task panel_task
#define unit_task8 panel_task8

#endif
