/* What stands between the matrix products of a decoder layer, for small passes in bfloat16 on a CPU.

   Every row is computed by itself, in an order that depends on positions alone: sums over a head's width and over keys
   run from the first to the last, keys by position in the text. So a row's result does not depend on how many rows ride
   in the pass, on where in the tree it stands, or on what else the tree holds.

   Plain C with vector types, which GCC and Clang compile for whatever vector width the processor has. No OpenMP is
   linked: the runtime that PyTorch has loaded is handed in, so that there is one pool of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define LANES 16
#define BLOCK 16 /* keys per block */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

static inline vec load(const bf16 *from) {
  hvec half;
  __builtin_memcpy(&half, from, sizeof half);
  return (vec)(__builtin_convertvector(half, uvec) << 16);
}

static inline vec loadf(const float *from) {
  vec out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

static inline void storef(float *to, vec value) { __builtin_memcpy(to, &value, sizeof value); }

/* To nearest, ties to even; NaN stays NaN. */
static inline void store(bf16 *to, vec value) {
  uvec bits = (uvec)value;
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  ivec nan = value != value;
  hvec half = __builtin_convertvector((uvec)((nan & 0x7fc0) | (~nan & (ivec)rounded)), hvec);
  __builtin_memcpy(to, &half, sizeof half);
}

static inline vec splat(float value) { return value - (vec){0}; }

static inline float sum(vec value) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += value[lane];
  return total;
}

/* exp by powers of two and a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. */
static inline vec vexp(vec x) {
  ivec low = x < splat(-87.0f), high = x > splat(88.0f), nan = x != x;
  vec safe = (vec)((low & (ivec)splat(-87.0f)) | (high & (ivec)splat(88.0f)) | (~(low | high | nan) & (ivec)x));
  vec shifted = safe * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
  ivec power = (ivec)shifted - (ivec)splat(12582912.0f);
  vec whole = shifted - 12582912.0f;
  vec r = safe - whole * 0.693145751953125f - whole * 1.42860677e-6f;
  vec p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vec out = (vec)((ivec)p + (power << 23));
  return (vec)((nan & (ivec)x) | (~nan & (ivec)out));
}

/* ---- threads ---- */

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

static parallel_fn run_parallel;

void use_threads(void *gomp_parallel) { run_parallel = (parallel_fn)gomp_parallel; }

typedef struct {
  void (*task)(const void *, long);
  const void *arguments;
  long tasks;
  long next;
} work;

static void take_tasks(void *pointer) {
  work *shared = pointer;
  for (;;) {
    long index = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
    if (index >= shared->tasks) return;
    shared->task(shared->arguments, index);
  }
}

static void run(void (*task)(const void *, long), const void *arguments, long tasks, int threads) {
  work shared = {task, arguments, tasks, 0};
  if (threads > tasks) threads = (int)tasks;
  if (threads > 1 && run_parallel)
    run_parallel(take_tasks, &shared, (unsigned)threads, 0);
  else
    take_tasks(&shared);
}

/* ---- RMSNorm (Zhang and Sennrich 2019): rows of d numbers, d a multiple of 16 ---- */

void rms_norm(const bf16 *in, const bf16 *weight, bf16 *out, long rows, long d, float eps) {
  for (long row = 0; row < rows; row++, in += d, out += d) {
    vec squares = {0};
    for (long i = 0; i < d; i += LANES) {
      vec x = load(in + i);
      squares += x * x;
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)d + eps);
    for (long i = 0; i < d; i += LANES) store(out + i, load(in + i) * scale * load(weight + i));
  }
}

/* ---- SiLU(gate) * up (Shazeer 2020): in [rows, 2 d], gates first; out [rows, d] ---- */

void gated(const bf16 *in, bf16 *out, long rows, long d) {
  for (long row = 0; row < rows; row++, in += 2 * d, out += d)
    for (long i = 0; i < d; i += LANES) {
      vec gate = load(in + i);
      store(out + i, gate / (1.0f + vexp(-gate)) * load(in + d + i));
    }
}

/* ---- products of a few rows with a large weight ----

   Weights lie in panels of 32 output channels, in the order they are read: one stream per thread, each weight once. Up
   to 12 rows stay in registers while a panel passes; further rows find it in the cache. Every sum runs over the input
   channels from the first to the last, however many rows there are. */

#define PANEL 32
#define MOST_ROWS 12
#define AHEAD 2048 /* bytes that are asked for before they are needed */

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
#include <immintrin.h>

/* Whether this processor has the instructions; without them nothing below may be called. */
int has_products(void) { return 1; }

#define TILE static inline __attribute__((always_inline)) void

TILE tile(const int count, const product_arguments *a, long panel, long row) {
  const long width = a->in_width;
  const bf16 *in = (const bf16 *)a->in + row * width, *weight = (const bf16 *)a->weight + panel * PANEL * width;
  __m512 sums[MOST_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (long k = 0; k < width; k += 2, weight += 2 * PANEL) {
    __m512bh left = (__m512bh)_mm512_loadu_si512(weight), right = (__m512bh)_mm512_loadu_si512(weight + PANEL);
    __builtin_prefetch((const char *)weight + AHEAD);
    __builtin_prefetch((const char *)weight + AHEAD + 64);
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

TILE tile8(const int count, const product_arguments *a, long panel, long row) {
  const long width = a->in_width;
  const uint8_t *in = (const uint8_t *)a->in + row * width;
  const int8_t *weight = (const int8_t *)a->weight + panel * PANEL * width;
  __m512i sums[MOST_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  for (long k = 0; k < width; k += 4, weight += 4 * PANEL) {
    __m512i left = _mm512_loadu_si512(weight), right = _mm512_loadu_si512(weight + 2 * PANEL);
    __builtin_prefetch((const char *)weight + AHEAD);
    __builtin_prefetch((const char *)weight + AHEAD + 64);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++) {
      int32_t four;
      __builtin_memcpy(&four, in + r * width + k, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, left);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, right);
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
    name(count, a, panel, row); \
    break;
#define PANELS(task, name) \
  static void task(const void *pointer, long panel) { \
    const product_arguments *a = pointer; \
    long parts = (a->rows + MOST_ROWS - 1) / MOST_ROWS, row = 0; \
    for (long part = 0; part < parts; part++) { \
      long count = (a->rows - row + parts - part - 1) / (parts - part); \
      switch (count) { \
        ROWS(1, name) ROWS(2, name) ROWS(3, name) ROWS(4, name) ROWS(5, name) ROWS(6, name) \
        ROWS(7, name) ROWS(8, name) ROWS(9, name) ROWS(10, name) ROWS(11, name) ROWS(12, name) \
      } \
      row += count; \
    } \
  }

PANELS(panel_task, tile)
PANELS(panel_task8, tile8)

void product(const product_arguments *a) {
  run(a->sizes ? panel_task8 : panel_task, a, (a->out_width + PANEL - 1) / PANEL, a->threads);
}

#else

int has_products(void) { return 0; }

void product(const product_arguments *a) { (void)a; }

#endif

/* ---- activations in 8 bit, each row with a scale of its own (LLM.int8, Dettmers et al. 2022, section 2.1) ---- */

/* To unsigned bytes around 128: in / scale + 128, scale = largest / 127. A row with NaN or infinity gets scale NaN. */
void quantize_rows(const bf16 *in, uint8_t *out, float *scales, long rows, long d) {
  for (long row = 0; row < rows; row++, in += d, out += d) {
    vec most = {0}, broken = {0};
    for (long i = 0; i < d; i += LANES) {
      vec x = load(in + i), size = (vec)((ivec)x & 0x7fffffff);
      ivec larger = size > most;
      most = (vec)((larger & (ivec)size) | (~larger & (ivec)most));
      broken += x * 0.0f; /* NaN where x is not finite */
    }
    float largest = 1e-12f * 127;
    for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
    scales[row] = largest / 127.0f + sum(broken);
    float inverse = 127.0f / largest;
    for (long i = 0; i < d; i += LANES) {
      vec shifted = load(in + i) * inverse + 12582912.0f; /* 1.5 * 2^23: rounds to an integer, ties to even */
      ivec whole = (ivec)shifted - (ivec)splat(12582912.0f) + 128;
      typedef uint8_t bytes __attribute__((vector_size(LANES)));
      bytes small = __builtin_convertvector(whole, bytes);
      __builtin_memcpy(out + i, &small, sizeof small);
    }
  }
}

/* ---- rotary embeddings, cache write and attention ---- */

typedef struct {
  const bf16 *qkv;        /* [B, n, (H + 2 H_kv) d] */
  const bf16 *cos, *sin;  /* [B, n, d] */
  bf16 *keys, *values;    /* [B, H_kv, S, d] */
  const int64_t *lengths; /* [B] committed tokens */
  const int64_t *depth;   /* [B, M] of the tree's nodes */
  const uint8_t *seen;    /* [B, n, M]: what each computed node sees; the last n of the M nodes are those computed */
  bf16 *out;              /* [B, n, H d] */
  long batch, nodes, tree, heads, kv_heads, width, slots, window; /* window 0: none */
  float scale;
  int threads;
} attention_arguments;

static inline void rotate(const bf16 *head, const bf16 *cos, const bf16 *sin, long d, float *out) {
  for (long i = 0; i < d / 2; i += LANES) {
    vec left = load(head + i), right = load(head + d / 2 + i);
    storef(out + i, left * load(cos + i) - right * load(sin + i));
    storef(out + d / 2 + i, right * load(cos + d / 2 + i) + left * load(sin + d / 2 + i));
  }
}

/* Keys and values of one row of the batch. */
static void write_cache(const attention_arguments *a, long row) {
  long stride = (a->heads + 2 * a->kv_heads) * a->width, d = a->width;
  float rotated[512];
  for (long node = 0; node < a->nodes; node++) {
    const bf16 *from = a->qkv + (row * a->nodes + node) * stride + a->heads * d;
    const bf16 *cos = a->cos + (row * a->nodes + node) * d, *sin = a->sin + (row * a->nodes + node) * d;
    long slot = a->lengths[row] + a->tree - a->nodes + node;
    for (long head = 0; head < a->kv_heads; head++) {
      bf16 *key = a->keys + ((row * a->kv_heads + head) * a->slots + slot) * d;
      bf16 *value = a->values + ((row * a->kv_heads + head) * a->slots + slot) * d;
      rotate(from + head * d, cos, sin, d, rotated);
      for (long i = 0; i < d; i += LANES) store(key + i, loadf(rotated + i));
      __builtin_memcpy(value, from + (a->kv_heads + head) * d, (size_t)d * sizeof(bf16));
    }
  }
}

/* Up to BLOCK keys that lie one behind the other, as [d][BLOCK]; what is missing is zero. */
static inline void turn_keys(const bf16 *keys, long count, long d, float *turned) {
  float rows[BLOCK][LANES];
  for (long i = 0; i < d; i += LANES) {
    for (long key = 0; key < BLOCK; key++) storef(rows[key], key < count ? load(keys + key * d + i) : (vec){0});
    for (long lane = 0; lane < LANES; lane++) {
      vec column;
      for (long key = 0; key < BLOCK; key++) column[key] = rows[key][lane];
      storef(turned + (i + lane) * BLOCK, column);
    }
  }
}

static inline void score_block(const float *query, long d, const float *turned, float *scores) {
  vec total = {0};
  for (long i = 0; i < d; i++) total += query[i] * loadf(turned + i * BLOCK);
  storef(scores, total);
}

static inline void score_block4(const float *query, long d, const float *turned, float *scores, long stride) {
  vec t0 = {0}, t1 = {0}, t2 = {0}, t3 = {0};
  const float *q1 = query + d, *q2 = query + 2 * d, *q3 = query + 3 * d;
  for (long i = 0; i < d; i++) {
    vec column = loadf(turned + i * BLOCK);
    t0 += query[i] * column;
    t1 += q1[i] * column;
    t2 += q2[i] * column;
    t3 += q3[i] * column;
  }
  storef(scores, t0);
  storef(scores + stride, t1);
  storef(scores + 2 * stride, t2);
  storef(scores + 3 * stride, t3);
}

/* out[d] += weight * value, key after key. */
static inline void add_values(float *out, const float *weights, const bf16 *values, long count, long d) {
  for (long i = 0; i < d; i += LANES) {
    vec total = loadf(out + i);
    for (long key = 0; key < count; key++) total += weights[key] * load(values + key * d + i);
    storef(out + i, total);
  }
}

#define NODES_PER_TASK 8

/* The heads of one KV head, for some nodes of one row of the batch. */
static void attend(const void *pointer, long task) {
  const attention_arguments *a = pointer;
  long parts = (a->nodes + NODES_PER_TASK - 1) / NODES_PER_TASK, d = a->width, group = a->heads / a->kv_heads;
  long part = task % parts, kv = task / parts % a->kv_heads, row = task / parts / a->kv_heads;
  long first = part * NODES_PER_TASK, nodes = a->nodes - first < NODES_PER_TASK ? a->nodes - first : NODES_PER_TASK;
  long length = a->lengths[row], tree = a->tree, queries = nodes * group;
  long prefix = (length + BLOCK - 1) / BLOCK * BLOCK, behind = (tree + BLOCK - 1) / BLOCK * BLOCK;
  long stride = prefix + behind + BLOCK;
  const bf16 *keys = a->keys + (row * a->kv_heads + kv) * a->slots * d;
  const bf16 *values = a->values + (row * a->kv_heads + kv) * a->slots * d;
  float *space = aligned_alloc(64, (size_t)(queries * (d + stride) + BLOCK * d + stride + d + 64) * 4 / 64 * 64 + 64);
  float *query = space, *scores = query + queries * d, *turned = scores + queries * stride;
  float *line = turned + BLOCK * d, *sums = line + stride;

  for (long q = 0; q < queries; q++) {
    long at = row * a->nodes + first + q / group, head = kv * group + q % group;
    rotate(a->qkv + (at * (a->heads + 2 * a->kv_heads) + head) * d, a->cos + at * d, a->sin + at * d, d, query + q * d);
    for (long i = 0; i < d; i += LANES) storef(query + q * d + i, loadf(query + q * d + i) * a->scale);
  }
  for (long block = 0; block < prefix + behind; block += BLOCK) {
    int in_tree = block >= prefix;
    long start = in_tree ? length + block - prefix : block;
    long count = in_tree ? tree - (block - prefix) : length - block, q = 0;
    turn_keys(keys + start * d, count < BLOCK ? count : BLOCK, d, turned);
    for (; q + 4 <= queries; q += 4) score_block4(query + q * d, d, turned, scores + q * stride + block, stride);
    for (; q < queries; q++) score_block(query + q * d, d, turned, scores + q * stride + block);
  }
  for (long q = 0; q < queries; q++) {
    long node = first + q / group, head = kv * group + q % group;
    const uint8_t *seen = a->seen + (row * a->nodes + node) * tree;
    const int64_t *depth = a->depth + row * tree;
    int64_t position = length + depth[tree - a->nodes + node];
    long from = a->window && position - a->window + 1 > 0 ? (long)(position - a->window + 1) : 0;
    if (from > length) from = length;
    const float *own = scores + q * stride;
    long count = length - from;
    __builtin_memcpy(line, own + from, (size_t)count * sizeof(float));
    for (long other = 0; other < tree; other++)
      if (seen[other] && (!a->window || position - length - depth[other] < a->window))
        line[count++] = own[prefix + other];
    float most = -INFINITY;
    int broken = 0;
    for (long i = 0; i < count; i++) {
      broken |= line[i] != line[i];
      most = line[i] > most ? line[i] : most;
    }
    if (broken) most = NAN;
    long padded = (count + LANES - 1) / LANES * LANES;
    for (long i = count; i < padded; i++) line[i] = -INFINITY;
    vec total = {0};
    for (long i = 0; i < padded; i += LANES) {
      vec weight = vexp(loadf(line + i) - most);
      for (long lane = count - i; lane < LANES; lane++) weight[lane] = 0;
      total += weight;
      storef(line + i, weight);
    }
    for (long i = 0; i < d; i += LANES) storef(sums + i, (vec){0});
    add_values(sums, line, values + from * d, length - from, d);
    long next = length - from;
    for (long other = 0; other < tree; other++)
      if (seen[other] && (!a->window || position - length - depth[other] < a->window))
        add_values(sums, line + next++, values + (length + other) * d, 1, d);
    float scale = 1.0f / sum(total);
    bf16 *out = a->out + ((row * a->nodes + node) * a->heads + head) * d;
    for (long i = 0; i < d; i += LANES) store(out + i, loadf(sums + i) * scale);
  }
  free(space);
}

void tree_attention(const attention_arguments *a) {
  for (long row = 0; row < a->batch; row++) write_cache(a, row);
  long parts = (a->nodes + NODES_PER_TASK - 1) / NODES_PER_TASK;
  run(attend, a, a->batch * a->kv_heads * parts, a->threads);
}

/* ---- a whole layer of Llama's kind ---- */

typedef struct {
  const void *weight;
  const float *scales;   /* null: weights are bfloat16 */
  const int32_t *shifts;
  const bf16 *bias;
  long in_width, out_width;
} linear;

typedef struct {
  linear qkv, out, gate_up, down;
  const bf16 *input_norm, *mlp_norm;
  float input_eps, mlp_eps, scale;
  long heads, kv_heads, width, window;
} layer;

typedef struct {
  const bf16 *cos, *sin;
  const int64_t *lengths, *depth;
  const uint8_t *seen;
  char *space; /* layer_space() bytes, aligned to 64 */
  long batch, nodes, tree;
  int threads;
} pass;

typedef struct {
  bf16 *normed, *qkv, *attended, *gate_up, *gated;
  uint8_t *bytes;
  float *sizes;
} buffers;

static long place(const layer *l, long rows, char *space, buffers *b) {
  long at = 0, widest = l->qkv.in_width;
  if (l->out.in_width > widest) widest = l->out.in_width;
  if (l->down.in_width > widest) widest = l->down.in_width;
#define PLACE(field, type, count) \
  b->field = (type *)(space + at); \
  at += ((count) * (long)sizeof(type) + 63) / 64 * 64;
  PLACE(normed, bf16, rows * l->qkv.in_width)
  PLACE(qkv, bf16, rows * l->qkv.out_width)
  PLACE(attended, bf16, rows * l->out.in_width)
  PLACE(gate_up, bf16, rows * l->gate_up.out_width)
  PLACE(gated, bf16, rows * l->down.in_width)
  PLACE(bytes, uint8_t, rows * widest)
  PLACE(sizes, float, rows)
  return at;
}

long layer_space(const layer *l, long rows) {
  buffers unused;
  return place(l, rows, 0, &unused);
}

static void multiply(const linear *l, const buffers *b, const bf16 *in, const bf16 *residual, bf16 *out, long rows,
                     int threads) {
  product_arguments a = {in, l->weight, l->scales, l->shifts, 0, l->bias, residual, out, rows, l->in_width,
                         l->out_width, threads};
  if (l->scales) {
    quantize_rows(in, b->bytes, b->sizes, rows, l->in_width);
    a.in = b->bytes;
    a.sizes = b->sizes;
  }
  product(&a);
}

void decoder_layer(const layer *l, const pass *p, const bf16 *in, bf16 *out, bf16 *keys, bf16 *values, long slots) {
  long rows = p->batch * p->nodes, d = l->qkv.in_width;
  int threads = p->threads;
  buffers b;
  place(l, rows, p->space, &b);
  rms_norm(in, l->input_norm, b.normed, rows, d, l->input_eps);
  multiply(&l->qkv, &b, b.normed, 0, b.qkv, rows, threads);
  attention_arguments a = {b.qkv, p->cos, p->sin, keys, values, p->lengths, p->depth, p->seen, b.attended,
                           p->batch, p->nodes, p->tree, l->heads, l->kv_heads, l->width, slots, l->window,
                           l->scale, threads};
  tree_attention(&a);
  multiply(&l->out, &b, b.attended, in, out, rows, threads);
  rms_norm(out, l->mlp_norm, b.normed, rows, d, l->mlp_eps);
  multiply(&l->gate_up, &b, b.normed, 0, b.gate_up, rows, threads);
  gated(b.gate_up, b.gated, rows, l->down.in_width);
  multiply(&l->down, &b, b.gated, out, out, rows, threads);
}
