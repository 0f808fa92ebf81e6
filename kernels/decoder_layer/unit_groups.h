/* ---- products of inputs in 8 bit with weights in groups, by the matrix unit ----

   A group is half a tile: 16 rows of 32 signed inputs by 8 quads of unsigned codes (TDPBSUD). Its sums are whole numbers,
   the very ones that vectors compute, and vectors make them float32: of some groups at a time, so that a row's sums
   stay in registers meanwhile. */

#ifdef WITH_UNIT

#define LEAST_UNIT_ROWS 10 /* for fewer, vectors are faster */
#define GROUPS_AT_ONCE 6   /* more would not stay in the first cache */

static int unit_takes_groups(const product_arguments *a) { return a->rows >= LEAST_UNIT_ROWS && has_matrix_unit(); }

/* Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 codes. */
static void open_unit_for_groups(long rows) {
  const uint8_t count = (uint8_t)(rows < TILE_ROWS ? rows : TILE_ROWS);
  const tile_shapes shapes = {
      .palette = 1,
      .bytes = {64, 64, 64, 64, TOGETHER, TOGETHER, 64, 64},
      .rows = {count, count, count, count, count, count, QUADS, QUADS},
  };
  load_shapes(&shapes);
}

/* Some groups of a panel. */
typedef struct {
  group_factors factors[GROUPS_AT_ONCE];
  __m512i codes[GROUPS_AT_ONCE][QUADS][2];
  int32_t whole[GROUPS_AT_ONCE][2][TILE_ROWS * LANES]; /* a tile's sums */
  long count;
} group_chunk;

/* Tiles of sums are named by constants, and so are those of inputs. */
#define MULTIPLY(left, right, inputs, in, codes) \
  do { \
    _tile_loadd(inputs, in, TOGETHER); \
    _tile_loadd(6, codes, 4 * PANEL); \
    _tile_loadd(7, codes + 64, 4 * PANEL); \
    _tile_zero(left); \
    _tile_dpbsud(left, inputs, 6); \
    _tile_zero(right); \
    _tile_dpbsud(right, inputs, 7); \
  } while (0)

#define STORE(left, right, whole) \
  do { \
    _tile_stored(left, whole[0], 4 * LANES); \
    _tile_stored(right, whole[1], 4 * LANES); \
  } while (0)

/* A chunk by 16 rows, or all where there are fewer; `in` moves on by `stride` from group to group. A group's sums are
   stored while the next one's are computed. */
INLINE multiply_chunk(const char *codes, long line, const int8_t *in, long stride, group_chunk *c) {
  for (long group = 0; group < c->count; group += 2, in += 2 * stride, codes += 2 * line) {
    MULTIPLY(0, 1, 4, in, codes);
    if (group) STORE(2, 3, c->whole[group - 1]);
    if (group + 1 < c->count) MULTIPLY(2, 3, 5, in + stride, codes + line);
    STORE(0, 1, c->whole[group]);
  }
  if (c->count % 2 == 0) STORE(2, 3, c->whole[c->count - 1]);
}

#undef MULTIPLY
#undef STORE

/* Adds a chunk to the sums of `count` rows; in its tile they begin at `from`. `each` moves on by `stride`. */
INLINE add_chunk(const int count, const group_chunk *c, long from, const input_group *each, long stride, const char *ahead,
                 const char *end, long lines, float *sums) {
  __m512 now[8][2];
#pragma GCC unroll 8
  for (int row = 0; row < count; row++)
    for (int half = 0; half < 2; half++) now[row][half] = _mm512_load_ps(sums + row * PANEL + half * LANES);
  for (long group = 0; group < c->count; group++, each += stride) {
    ahead = ask(ahead, end, lines);
#pragma GCC unroll 8
    for (int row = 0; row < count; row++)
      for (int half = 0; half < 2; half++)
        now[row][half] = with_group(c->factors + group, half, each + row,
                                    _mm512_load_si512(c->whole[group][half] + (from + row) * LANES), now[row][half]);
  }
#pragma GCC unroll 8
  for (int row = 0; row < count; row++)
    for (int half = 0; half < 2; half++) _mm512_store_ps(sums + row * PANEL + half * LANES, now[row][half]);
}

#define ROWS_OF(count) \
  case count: add_chunk(count, c, from, each, stride, ahead, end, lines, sums); break;

/* Up to 8 rows. */
static __attribute__((noinline)) void add_rows(int count, const group_chunk *c, long from, const input_group *each,
                                               long stride, const char *ahead, const char *end, long lines, float *sums) {
  switch (count) {
    ROWS_OF(1) ROWS_OF(2) ROWS_OF(3) ROWS_OF(4) ROWS_OF(5) ROWS_OF(6) ROWS_OF(7) ROWS_OF(8)
  }
}

#undef ROWS_OF

/* As multiply_groups. */
INLINE multiply_groups_by_tiles(const int four, const product_arguments *a, long panel, float *sums) {
  const numbers kind = four ? BYTES_BY_4_BIT_GROUPS : BYTES_BY_8_BIT_GROUPS;
  const long rows = a->rows, groups = a->in_width / TOGETHER, shared = a->group / TOGETHER;
  const long line = PANEL * channel_bytes(kind, TOGETHER), size = groups * line;
  const long parts = (rows + 7) / 8, lines = (line / 64 + parts - 1) / parts;
  const char *weight = (const char *)a->weight + panel * size;
  group_chunk c;
  for (long first = 0; first < groups; first += c.count) {
    const char *codes = weight + first * line, *ahead = codes + size;
    c.count = groups - first < GROUPS_AT_ONCE ? groups - first : GROUPS_AT_ONCE;
    for (long group = 0; group < c.count; group++) {
      const long input = (first + group) * TOGETHER;
      if (group && shared > 1 && (first + group) % shared)
        c.factors[group] = c.factors[group - 1];
      else {
        const uint16_t *next = factors_at(kind, a, panel + 1, input);
        load_factors(four, a, factors_at(kind, a, panel, input), c.factors + group);
        __builtin_prefetch(next, 0, 2);
        if (four) __builtin_prefetch(next + PANEL, 0, 2);
      }
      if (four) load_codes(1, (const uint8_t *)codes + group * line, c.codes[group]);
    }
    if (four) {
      __asm__ volatile("" : : "r"(c.codes) : "memory"); /* the intrinsics do not say that they read it */
      codes = (const char *)c.codes;
    }
    const int8_t *in = (const int8_t *)a->in + first * rows * TOGETHER;
    const input_group *each = (const input_group *)a->sizes + first * rows;
    for (long row = 0, end; row < rows; row = end) {
      const long tile = rows < TILE_ROWS ? 0 : row + TILE_ROWS < rows ? row : rows - TILE_ROWS;
      end = tile + TILE_ROWS < rows ? tile + TILE_ROWS : rows;
      multiply_chunk(codes, four ? (long)sizeof *c.codes : line, in + tile * TOGETHER, rows * TOGETHER, &c);
      for (long now = row; now < end; now += 8, ahead += c.count * lines * 64)
        add_rows(end - now < 8 ? (int)(end - now) : 8, &c, now - tile, each + now, rows, ahead, weight + 2 * size, lines,
                 sums + now * PANEL);
    }
  }
}

#else

static int unit_takes_groups(const product_arguments *a) { (void)a; return 0; }
static void open_unit_for_groups(long rows) { (void)rows; }
INLINE multiply_groups_by_tiles(const int four, const product_arguments *a, long panel, float *sums) {
  (void)four, (void)a, (void)panel, (void)sums;
}

#endif
