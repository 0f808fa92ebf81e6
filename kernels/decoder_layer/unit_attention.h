/* ---- attention by the processor's matrix unit (AMX) ----

   Scores and outputs of 16 queries at a time. An output is a sum over blocks of 32 positions, counted from the text's
   beginning. What a query does not see has weight zero, which leaves a sum as it is, so it does not matter to it which
   positions its neighbours see. The blocks of committed positions are the same for all queries; the block where a tree
   begins, and those behind it, are put together for each node of its own ancestors. Nodes of a chain, as a prompt's are,
   stand where they will stand when they are committed, so theirs are blocks like any other. */

#define UNIT_NODES 32 /* of a task */
#define BLOCK 32      /* positions */
#define BLOCKS 16     /* whose values are turned at a time */
#define AHEAD 64      /* positions; tiles are too far between for the processor to see what comes next */

#ifdef TILE_ROWS

static int unit_attends(const attention_arguments *a) {
  return has_matrix_unit() && a->width % 32 == 0 && a->heads / a->kv_heads <= TILE_ROWS;
}

/* Scores of 16 queries [16, d] and the 32 keys of `turned`. */
static void score_tiles(const bf16 *query, long d, const int32_t *turned, float *scores, long stride) {
  _tile_zero(0);
  _tile_zero(1);
  for (long i = 0; i < d; i += 32) {
    _tile_loadd(4, query + i, 2 * d);
    _tile_loadd(2, turned + i / 2 * KEYS, 4 * KEYS);
    _tile_loadd(3, turned + i / 2 * KEYS + LANES, 4 * KEYS);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(1, 4, 3);
  }
  _tile_stored(0, scores, 4 * stride);
  _tile_stored(1, scores + LANES, 4 * stride);
}

/* Asks for `count` rows of keys or values. */
INLINE ask_rows(const bf16 *from, long count, long d) {
  ask((const char *)from, (const char *)(from + count * d), count * d / 32);
}

/* The same for up to 16 queries in all, turned by `turn_keys`: keys lie as a tile's rows should, so it is they that need no
   turning. Products and their order are the same ones. */
static void score_few(const int32_t *query, long queries, long d, const bf16 *keys, const bf16 *values, long count,
                      float *scores, long stride) {
  const __m512i column = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
  float sums[TILE_ROWS * LANES] __attribute__((aligned(64)));
  bf16 rest[TILE_ROWS * MOST_WIDTH] __attribute__((aligned(64)));
  for (long at = 0; at < count; at += TILE_ROWS) {
    const bf16 *from = keys + at * d;
    ask_rows(from + AHEAD * d, TILE_ROWS, d);
    ask_rows(values + at * d, TILE_ROWS, d);
    if (count - at < TILE_ROWS) {
      __builtin_memcpy(rest, from, (size_t)((count - at) * d) * sizeof(bf16));
      __builtin_memset(rest + (count - at) * d, 0, (size_t)((TILE_ROWS - count + at) * d) * sizeof(bf16));
      from = rest;
    }
    _tile_zero(0);
    for (long i = 0; i < d; i += 32) {
      _tile_loadd(4, from + i, 2 * d);
      _tile_loadd(5, query + i / 2 * KEYS, 4 * KEYS);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, sums, 4 * LANES);
    for (long q = 0; q < queries; q++)
      storef(scores + q * stride + at, (vec)_mm512_i32gather_ps(column, sums + q, 4));
  }
}

/* Scores times a scale become weights, as 16-bit numbers at the line's beginning, a position's at its place: those of
   `from` to `to`, and zero before and up to `end`, a multiple of BLOCK. Returns their sum as rounded. */
static float soften_tiles(float *line, long from, long to, long end, float scale) {
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vec most = splat(-INFINITY), total = {0}, broken = {0};
  long i = from, whole = from + (to - from) / LANES * LANES;
  for (; i < whole; i += LANES) {
    vec x = loadf(line + i);
    broken += x * 0.0f; /* NaN where x is not finite */
    most = either(x > most, x, most);
  }
  if (i < to) {
    ivec inside = lane < (int32_t)(to - i);
    vec x = either(inside, loadf(line + i), splat(-INFINITY));
    broken += either(inside, x, (vec){0}) * 0.0f;
    most = either(x > most, x, most);
  }
  float largest = most[0];
  for (int lane_at = 1; lane_at < LANES; lane_at++) largest = most[lane_at] > largest ? most[lane_at] : largest;
  float less = largest * scale + sum(broken);
  bf16 *weights = (bf16 *)line; /* never ahead of the scores that are still to be read */
  __builtin_memset(weights, 0, (size_t)from * sizeof(bf16));
  for (i = from; i < whole; i += LANES) {
    store(weights + i, vexp(loadf(line + i) * scale - less));
    total += load(weights + i);
  }
  if (i < to) {
    store(weights + i, either(lane < (int32_t)(to - i), vexp(loadf(line + i) * scale - less), (vec){0}));
    total += load(weights + i);
    i += LANES;
  }
  if (i < end) __builtin_memset(weights + i, 0, (size_t)(end - i) * sizeof(bf16));
  return sum(total);
}

static inline ivec widen(const bf16 *from) {
  hvec half;
  __builtin_memcpy(&half, from, sizeof half);
  return (ivec)__builtin_convertvector(half, uvec);
}

/* A block's values as [d / 16] tiles of pairs of positions by 16 channels. */
static void turn_values(const bf16 *const *rows, long d, int32_t *tiles) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (long pair = 0; pair < BLOCK / 2; pair++)
    for (long i = 0; i < d; i += 2 * LANES) {
      __m512i even = _mm512_loadu_si512(rows[2 * pair] + i), odd = _mm512_loadu_si512(rows[2 * pair + 1] + i);
      int32_t *to = tiles + (i + pair) * LANES;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + LANES * LANES, _mm512_permutex2var_epi16(even, high, odd));
    }
}

/* One more position of a block that has zeros there. */
static void add_value(const bf16 *value, long place, long d, int32_t *tiles) {
  for (long part = 0; part < d / LANES; part++) {
    int32_t *line = tiles + (part * LANES + place / 2) * LANES;
    ivec both;
    __builtin_memcpy(&both, line, sizeof both);
    both |= place % 2 ? widen(value + part * LANES) << 16 : widen(value + part * LANES);
    __builtin_memcpy(line, &both, sizeof both);
  }
}

/* Where the values of a block lie, of positions before `end`; zeros behind. */
static void find_values(const stretch *s, long block, long end, long d, const bf16 **rows) {
  static const bf16 zeros[MOST_WIDTH];
  for (long i = 0; i < BLOCK; i++) {
    long position = block * BLOCK + i;
    while (position < end && position >= s->first + s->count) s++;
    rows[i] = position < end ? s->values + (position - s->first) * d : zeros;
  }
}

/* sums[16][d] += weights[16] * values over some blocks, for `parts` times 16 channels. */
INLINE add_blocks(const int parts, float *sums, long d, const bf16 *weights, long stride, const int32_t *tiles,
                  long blocks) {
  _tile_loadd(0, sums, 4 * d);
  _tile_loadd(1, sums + LANES, 4 * d);
  if (parts == 4) {
    _tile_loadd(2, sums + 2 * LANES, 4 * d);
    _tile_loadd(3, sums + 3 * LANES, 4 * d);
  }
  for (long block = 0; block < blocks; block++, weights += BLOCK, tiles += d * LANES) {
    _tile_loadd(4, weights, 2 * stride);
    _tile_loadd(5, tiles, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, tiles + LANES * LANES, 64);
    _tile_dpbf16ps(1, 4, 5);
    if (parts == 4) {
      _tile_loadd(5, tiles + 2 * LANES * LANES, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, tiles + 3 * LANES * LANES, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, 4 * d);
  _tile_stored(1, sums + LANES, 4 * d);
  if (parts == 4) {
    _tile_stored(2, sums + 2 * LANES, 4 * d);
    _tile_stored(3, sums + 3 * LANES, 4 * d);
  }
}

static void weigh_blocks(float *sums, long d, const bf16 *weights, long stride, const int32_t *tiles, long blocks) {
  long i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) add_blocks(4, sums + i, d, weights, stride, tiles + i * LANES, blocks);
  for (; i < d; i += 2 * LANES) add_blocks(2, sums + i, d, weights, stride, tiles + i * LANES, blocks);
}

/* The same for the queries of one node, as many as heads share a KV head. */
static void weigh_few(float *sums, long d, const bf16 *weights, long stride, const int32_t *tiles, long blocks) {
  for (long part = 0; part < d / LANES; part++) {
    _tile_loadd(6, sums + part * LANES, 4 * d);
    for (long block = 0; block < blocks; block++) {
      _tile_loadd(7, weights + block * BLOCK, 2 * stride);
      _tile_loadd(5, tiles + (block * d + part * LANES) * LANES, 64);
      _tile_dpbf16ps(6, 7, 5);
    }
    _tile_stored(6, sums + part * LANES, 4 * d);
  }
}

/* What a node sees of the tree, in its order: into `seen`; returns how many. */
static long list_seen(const uint8_t *sees, long tree, int32_t *seen) {
  long rank = 0;
  for (long other = 0; other < tree; other++)
    if (sees[other]) seen[rank++] = (int32_t)other;
  return rank;
}

static int all_finite(const bf16 *values, long count) {
  ivec broken = {0};
  for (long i = 0; i < count; i += LANES) broken |= (widen(values + i) & 0x7f80) == 0x7f80;
  for (int i = 0; i < LANES; i++)
    if (broken[i]) return 0;
  return 1;
}

/* Whether nodes see all that stands before them in the tree; numbers that are not finite would not be left out of sums
   by weights of zero. */
static int is_chain(const uint8_t *seen, long tree, long earlier, long nodes, const bf16 *values, long d) {
  for (long node = 0; node < nodes; node++)
    if (memchr(seen + node * tree, 0, (size_t)(earlier + node + 1))) return 0;
  return all_finite(values, (earlier + nodes) * d);
}

/* A task: the heads of one KV head, for some nodes of one row of the batch. */
typedef struct {
  const attention_arguments *a;
  long row, kv, first, nodes, group, queries, d;
  long rows;            /* queries in whole tiles; results of further ones are nobody's */
  long length, earlier; /* committed tokens, and nodes of the tree before the first */
  long end;             /* nobody sees what stands behind itself */
  stretch stretches[MOST_LEVELS + 1];
  long count; /* of them */
  const bf16 *behind;   /* values of the tree */
  const uint8_t *sees;
  const int64_t *depth;
  long stride, block_size, most_own;
  float *sums, *scores, *rotated;
  int32_t *query, *turned, *tiles, *begun, *own, *seen;
} unit_work;

/* Returns whether there is anything to do. */
static int prepare(unit_work *w, const attention_arguments *a, long task) {
  const share part = share_of(a, task);
  const long d = a->width;
  if (part.nodes <= 0) return 0;
  w->a = a, w->d = d, w->group = a->heads / a->kv_heads;
  w->kv = part.kv, w->row = part.row, w->first = part.first, w->nodes = part.nodes;
  w->queries = w->nodes * w->group, w->rows = (w->queries + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  w->length = a->lengths[w->row], w->earlier = a->tree - a->nodes + w->first;
  w->end = w->length + w->earlier + w->nodes;
  w->sees = a->seen + (w->row * a->nodes + w->first) * a->tree;
  w->depth = a->depth + w->row * a->tree + w->earlier;
  w->stride = (w->length + a->tree + 3 * KEYS) / LANES * LANES;
  w->block_size = LANES * d, w->most_own = (a->tree + BLOCK) / BLOCK + 1;
  long words = w->rows * (d + d / 2 + w->stride) + KEYS * d / 2 + (BLOCKS + 2 * w->most_own) * w->block_size + d + a->tree;
  w->sums = (float *)scratch(FOR_ATTENTION, (size_t)words * sizeof(float));
  w->scores = w->sums + w->rows * d;
  w->query = (int32_t *)(w->scores + w->rows * w->stride);
  w->turned = w->query + w->rows * d / 2;
  w->tiles = w->turned + KEYS * d / 2;
  w->begun = w->tiles + BLOCKS * w->block_size;
  w->own = w->begun + w->most_own * w->block_size;
  w->seen = w->own + w->most_own * w->block_size;
  w->rotated = (float *)(w->seen + a->tree);
  if (part.alone) write_cache(a, w->row, w->kv);
  w->count = find_stretches(a, w->row, w->kv, w->stretches);
  const stretch *last = w->stretches + w->count - 1;
  w->behind = last->values + (w->length - last->first) * d;
  return 1;
}

static void score_all(const unit_work *w) {
  const attention_arguments *a = w->a;
  long d = w->d;
  bf16 *query = (bf16 *)w->query;
  for (long q = 0; q < w->queries; q++) {
    long at = start_of(a, w->row) + w->first + q / w->group, head = w->kv * w->group + q % w->group;
    rotate(a->qkv + (at * (a->heads + 2 * a->kv_heads) + head) * d, a->cos + at * d, a->sin + at * d, d, w->rotated);
    for (long i = 0; i < d; i += LANES) store(query + q * d + i, loadf(w->rotated + i));
  }
  int few = w->queries <= TILE_ROWS;
  if (few) turn_keys(query, w->queries, d, w->turned);
  for (const stretch *s = w->stretches; s < w->stretches + w->count; s++) {
    long keys = s->count < w->end - s->first ? s->count : w->end - s->first;
    if (few) score_few(w->turned, w->queries, d, s->keys, s->values, keys, w->scores + s->first, w->stride);
    for (long at = 0; !few && at < keys; at += KEYS) {
      ask_rows(s->keys + (at + AHEAD) * d, KEYS, d);
      ask_rows(s->values + at * d, KEYS, d);
      turn_keys(s->keys + at * d, s->count - at, d, w->turned);
      turn_keys(s->keys + (at + LANES) * d, s->count - at - LANES, d, w->turned + LANES);
      for (long q = 0; q < w->rows; q += TILE_ROWS)
        score_tiles(query + q * d, d, w->turned, w->scores + q * w->stride + s->first + at, w->stride);
    }
  }
}

/* What a node sees of the tree moves to where it would stand, were it committed; then scores become weights. A line's
   last place keeps one over their sum. */
static void weights_of_all(const unit_work *w, int chain) {
  long window = w->a->window, length = w->length;
  for (long node = 0; node < w->nodes; node++) {
    long own = length + w->depth[node] + 1, from = window && own > window ? own - window : 0;
    long rank = chain ? w->earlier + node + 1 : list_seen(w->sees + node * w->a->tree, w->a->tree, w->seen);
    long to = length + rank, whole = ((to > w->end ? to : w->end) + BLOCK - 1) / BLOCK * BLOCK;
    for (long q = node * w->group; q < (node + 1) * w->group; q++) {
      float *line = w->scores + q * w->stride;
      for (long i = 0; !chain && i < rank; i++) line[length + i] = line[length + w->seen[i]];
      line[w->stride - 1] = 1.0f / soften_tiles(line, from, to, whole, w->a->scale);
    }
  }
}

/* The first `shared` blocks, the same for all queries: of what stands before `end`. */
static void add_shared(const unit_work *w, long shared, long end) {
  const bf16 *values[BLOCK];
  for (long block = 0; block < shared; block += BLOCKS) {
    long blocks = shared - block < BLOCKS ? shared - block : BLOCKS;
    for (long i = 0; i < blocks; i++) {
      find_values(w->stretches, block + i, end, w->d, values);
      turn_values(values, w->d, w->tiles + i * w->block_size);
    }
    for (long q = 0; q < w->rows; q += TILE_ROWS) {
      const bf16 *weights = (const bf16 *)(w->scores + q * w->stride) + block * BLOCK;
      weigh_blocks(w->sums + q * w->d, w->d, weights, 2 * w->stride, w->tiles, blocks);
    }
  }
}

/* The blocks behind them, put together for each node: the last committed tokens, and its ancestors. */
static void add_own(const unit_work *w, long shared) {
  const bf16 *values[BLOCK];
  long at = w->length - shared * BLOCK, size = w->block_size;
  find_values(w->stretches, shared, w->length, w->d, values);
  turn_values(values, w->d, w->begun);
  __builtin_memset(w->begun + size, 0, (size_t)((w->most_own - 1) * size) * sizeof(int32_t));
  for (long node = 0; node < w->nodes; node++) {
    long rank = list_seen(w->sees + node * w->a->tree, w->a->tree, w->seen), blocks = (at + rank + BLOCK - 1) / BLOCK;
    __builtin_memcpy(w->own, w->begun, (size_t)(blocks * size) * sizeof(int32_t));
    for (long i = 0; i < rank; i++)
      add_value(w->behind + w->seen[i] * w->d, (at + i) % BLOCK, w->d, w->own + (at + i) / BLOCK * size);
    const bf16 *weights = (const bf16 *)(w->scores + node * w->group * w->stride) + shared * BLOCK;
    weigh_few(w->sums + node * w->group * w->d, w->d, weights, 2 * w->stride, w->own, blocks);
  }
}

/* As `attend`. */
static void unit_attend(const void *pointer, long task) {
  const attention_arguments *a = pointer;
  unit_work w;
  if (!prepare(&w, a, task)) return;
  shape_tiles(6, TILE_ROWS, w.group);
  score_all(&w);
  int chain = is_chain(w.sees, a->tree, w.earlier, w.nodes, w.behind, w.d);
  long shared = chain ? (w.end + BLOCK - 1) / BLOCK : w.length / BLOCK;
  weights_of_all(&w, chain);
  __builtin_memset(w.sums, 0, (size_t)(w.rows * w.d) * sizeof(float));
  add_shared(&w, shared, chain ? w.end : w.length);
  if (!chain) add_own(&w, shared);
  close_unit();
  for (long q = 0; q < w.queries; q++) {
    long at = start_of(a, w.row) + w.first + q / w.group, head = w.kv * w.group + q % w.group;
    bf16 *out = a->out + (at * a->heads + head) * w.d;
    for (long i = 0; i < w.d; i += LANES)
      store(out + i, loadf(w.sums + q * w.d + i) * w.scores[q * w.stride + w.stride - 1]);
  }
}

#else

static int unit_attends(const attention_arguments *a) { (void)a; return 0; }
#define unit_attend attend

#endif
