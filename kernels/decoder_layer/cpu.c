/* A decoder layer for small passes in bfloat16 on a CPU.

   Every row is computed by itself, in an order that depends on positions alone: sums over a head's width and over keys
   run from the first to the last, keys by position in the text. So a row's result does not depend on how many rows ride
   in the pass, on where in the tree it stands, or on what else the tree holds.

   Plain C with vector types, which GCC and Clang compile for whatever vector width the processor has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"
#include "threads.h"
#include "product.h"
#include "attention.h"
#include "top.h"

/* ---- row by row ---- */

#define ROWS_PER_TASK 4

typedef struct {
  const bf16 *in, *weight;
  void *out, *scales;
  float eps;
  long rows, d;
  void (*row)(const void *, long);
} row_arguments;

static void some_rows(const void *pointer, long task) {
  const row_arguments *a = pointer;
  for (long row = task * ROWS_PER_TASK; row < a->rows && row < (task + 1) * ROWS_PER_TASK; row++) a->row(a, row);
}

static void run_rows(const row_arguments *a, int threads) {
  run(some_rows, a, (a->rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, threads);
}

/* RMSNorm (Zhang and Sennrich 2019) of d numbers, d a multiple of 16; without `weight` to unit size alone. */
static void norm_row(const void *pointer, long row) {
  const row_arguments *a = pointer;
  const bf16 *in = a->in + row * a->d;
  bf16 *out = (bf16 *)a->out + row * a->d;
  vec squares = {0};
  for (long i = 0; i < a->d; i += LANES) {
    vec x = load(in + i);
    squares += x * x;
  }
  float scale = 1.0f / sqrtf(sum(squares) / (float)a->d + a->eps);
  for (long i = 0; i < a->d; i += LANES)
    store(out + i, a->weight ? load(in + i) * scale * load(a->weight + i) : load(in + i) * scale);
}

/* SiLU(gate) * up (Shazeer 2020): in [2 d], gates first; out [d]. */
static void gated_row(const void *pointer, long row) {
  const row_arguments *a = pointer;
  const bf16 *in = a->in + 2 * row * a->d;
  bf16 *out = (bf16 *)a->out + row * a->d;
  for (long i = 0; i < a->d; i += LANES) {
    vec gate = load(in + i);
    store(out + i, gate / (1.0f + vexp(-gate)) * load(in + a->d + i));
  }
}

#define ROUNDS 12582912.0f /* 1.5 * 2^23: added, it rounds to an integer, ties to even */
#define SIZE 0x7fffffff    /* of a float's bits, those that are not its sign */

/* The scale of bytes for numbers of which the largest has these bits; NaN where one is not finite. */
static float byte_scale(int32_t largest, float *inverse) {
  float size;
  __builtin_memcpy(&size, &largest, sizeof size);
  if (largest >= 0x7f800000) return *inverse = NAN;
  if (size < 1e-12f * 127) size = 1e-12f * 127;
  *inverse = 127.0f / size;
  return size / 127.0f;
}

static inline ivec larger(ivec a, ivec b) { return (ivec)either(a > b, (vec)a, (vec)b); }

static inline ivec to_whole(vec numbers) { return (ivec)(numbers + ROUNDS) - (ivec)splat(ROUNDS); }

/* To unsigned bytes around 128 with a scale of the row's own (LLM.int8, Dettmers et al. 2022, section 2.1): in / scale +
   128, scale = largest / 127. A row with NaN or infinity gets scale NaN. */
static void quantize_row(const void *pointer, long row) {
  const row_arguments *a = pointer;
  const bf16 *in = a->in + row * a->d;
  uint8_t *out = (uint8_t *)a->out + row * a->d;
  ivec most = {0};
  for (long i = 0; i < a->d; i += LANES) most = larger(most, (ivec)load(in + i) & SIZE);
  float inverse;
  ((float *)a->scales)[row] = byte_scale(highest(most), &inverse);
  for (long i = 0; i < a->d; i += LANES) store_bytes(out + i, to_whole(load(in + i) * inverse) + 128);
}

/* To int8 with a scale for every 32 numbers, arranged as product_arguments has them. */
static void quantize_by_groups(const void *pointer, long task) {
  const row_arguments *a = pointer;
  const long row = task * ROWS_PER_TASK, first = row / BLOCK_ROWS * BLOCK_ROWS;
  const long rows = a->rows - first < BLOCK_ROWS ? a->rows - first : BLOCK_ROWS;
  const long count = a->rows - row < ROWS_PER_TASK ? a->rows - row : ROWS_PER_TASK;
  uint8_t *out = (uint8_t *)a->out + first * a->d + (row - first) * TOGETHER;
  input_group *group = (input_group *)a->scales + first * (a->d / TOGETHER) + (row - first);
  for (long i = 0; i < a->d; i += TOGETHER, out += rows * TOGETHER, group += rows)
    for (long r = 0; r < count; r++) {
      const bf16 *in = a->in + (row + r) * a->d + i;
      ivec most = {0}, total = {0};
      for (int at = 0; at < TOGETHER; at += LANES) most = larger(most, (ivec)load(in + at) & SIZE);
      float inverse;
      const float scale = byte_scale(highest(most), &inverse);
      for (int at = 0; at < TOGETHER; at += LANES) {
        const ivec whole = to_whole(load(in + at) * inverse);
        store_bytes(out + r * TOGETHER + at, whole);
        total = (ivec)((uvec)total + (uvec)whole);
      }
      group[r] = (input_group){scale, scale * (float)whole_sum(total)};
    }
}

void rms_norm(const bf16 *in, const bf16 *weight, bf16 *out, long rows, long d, float eps, int threads) {
  row_arguments a = {in, weight, out, 0, eps, rows, d, norm_row};
  run_rows(&a, threads);
}

void gated(const bf16 *in, bf16 *out, long rows, long d, int threads) {
  row_arguments a = {in, 0, out, 0, 0, rows, d, gated_row};
  run_rows(&a, threads);
}

void quantize_rows(const bf16 *in, uint8_t *out, float *scales, long rows, long d, int threads) {
  row_arguments a = {in, 0, out, scales, 0, rows, d, quantize_row};
  run_rows(&a, threads);
}

/* `scales`: input_group of every 32. */
void quantize_groups(const bf16 *in, int8_t *out, void *scales, long rows, long d, int threads) {
  row_arguments a = {in, 0, out, scales, 0, rows, d, 0};
  run(quantize_by_groups, &a, (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, threads);
}

/* ---- a whole layer of Llama's kind ---- */

/* A weight; as product_arguments has it. */
typedef struct {
  const void *weight, *scales;
  const int32_t *shifts;
  const bf16 *bias;
  long in_width, out_width, group;
  int kind, zero_points;
} linear;

typedef struct {
  linear qkv, out, gate_up, down;
  const bf16 *input_norm, *mlp_norm;
  float input_eps, mlp_eps, scale;
  long heads, kv_heads, width, window;
} layer;

typedef struct pass pass;

/* Rows of one cache. What is computed node by node is computed for those of all passes in a chain at once. */
struct pass {
  const bf16 *cos, *sin;
  const int64_t *lengths, *depth;
  const uint8_t *seen;
  const int64_t *starts;            /* as attention_arguments has it */
  char *space;                      /* layer_space() bytes for all nodes, aligned to 64; the first pass's counts */
  bf16 *const *keys, *const *values; /* each layer's */
  const segment *const *segments;   /* each layer's, as attention_arguments has them; or null */
  const pass *next;                 /* whose nodes follow, or null */
  long batch, nodes, tree, rows, slots, levels; /* rows: nodes of all rows of the batch together */
  int threads;
};

static long all_rows(const pass *p) {
  long rows = 0;
  for (; p; p = p->next) rows += p->rows;
  return rows;
}

typedef struct {
  bf16 *normed, *qkv, *attended, *gate_up, *gated;
  uint8_t *bytes;
  char *sizes;
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
  PLACE(sizes, char, rows * most_input_sizes(widest))
  return at;
}

long layer_space(const layer *l, long rows) {
  buffers unused;
  return place(l, rows, 0, &unused);
}

static void multiply_to(const linear *l, const buffers *b, const bf16 *in, const bf16 *residual, bf16 *out,
                        const int64_t *places, long rows, int threads) {
  product_arguments a = {in, l->weight, l->scales, l->shifts, 0, l->bias, residual, out, places, rows, l->in_width,
                         l->out_width, l->group, l->kind, l->zero_points, threads};
  if (input_bytes((numbers)l->kind) == 1) {
    if (takes_groups((numbers)l->kind))
      quantize_groups(in, (int8_t *)b->bytes, b->sizes, rows, l->in_width, threads);
    else
      quantize_rows(in, b->bytes, (float *)b->sizes, rows, l->in_width, threads);
    a.in = b->bytes;
    a.sizes = b->sizes;
  }
  product(&a);
}

static void multiply(const linear *l, const buffers *b, const bf16 *in, const bf16 *residual, bf16 *out, long rows,
                     int threads) {
  multiply_to(l, b, in, residual, out, 0, rows, threads);
}

/* The `index`-th layer. Attention reads `in`, normed where the layer has an input norm, and adds to `residual`; that and
   `out` may be the same. */
static void decoder_layer(const layer *l, long index, const pass *p, const bf16 *in, const bf16 *residual, bf16 *out) {
  const long rows = all_rows(p), d = l->gate_up.in_width;
  const int threads = p->threads;
  buffers b;
  place(l, rows, p->space, &b);
  if (l->input_norm) {
    rms_norm(in, l->input_norm, b.normed, rows, l->qkv.in_width, l->input_eps, threads);
    in = b.normed;
  }
  multiply(&l->qkv, &b, in, 0, b.qkv, rows, threads);
  long first = 0;
  for (const pass *part = p; part; first += part->rows, part = part->next) {
    attention_arguments a = {b.qkv + first * l->qkv.out_width, part->cos, part->sin, part->keys[index],
                             part->values[index], part->lengths, part->depth, part->seen,
                             part->segments ? part->segments[index] : 0, b.attended + first * l->out.in_width,
                             part->starts, part->batch, part->nodes, part->tree, l->heads, l->kv_heads, l->width,
                             part->slots, l->window, part->levels, l->scale, threads, 0, 0, 0};
    tree_attention(&a);
  }
  multiply(&l->out, &b, b.attended, residual, out, rows, threads);
  rms_norm(out, l->mlp_norm, b.normed, rows, d, l->mlp_eps, threads);
  multiply(&l->gate_up, &b, b.normed, 0, b.gate_up, rows, threads);
  gated(b.gate_up, b.gated, rows, l->down.in_width, threads);
  multiply(&l->down, &b, b.gated, out, out, rows, threads);
}

/* What follows the layers: a norm, and an output head that reads no more than layers do; or no head. */
typedef struct {
  const bf16 *norm;
  bf16 *normed;
  const linear *head;
  bf16 *logits;
  const int64_t *places; /* as product_arguments has them, of logits */
  float eps;
} stack_end;

/* Layers in sequence. The first reads `in` and adds to `residual`, `in` itself where that is null; `copies` is null, or
   for each layer where its output is wanted too; `end` is null, or what follows. */
void decoder_layers(const layer *const *layers, long count, const pass *p, const bf16 *in, const bf16 *residual,
                    bf16 *out, bf16 *const *copies, const stack_end *end) {
  for (long i = 0; i < count; i++) {
    decoder_layer(layers[i], i, p, i ? out : in, i ? out : residual ? residual : in, out);
    if (copies && copies[i])
      __builtin_memcpy(copies[i], out, (size_t)(all_rows(p) * layers[i]->down.out_width) * sizeof(bf16));
  }
  if (!end) return;
  const layer *last = layers[count - 1];
  const long rows = all_rows(p);
  buffers b;
  place(last, rows, p->space, &b);
  rms_norm(out, end->norm, end->normed, rows, last->down.out_width, end->eps, p->threads);
  if (end->head) multiply_to(end->head, &b, end->normed, 0, end->logits, end->places, rows, p->threads);
}

#include "drafting.h"

/* Rows of a table of `known`, each of `size` bytes, one after the other; returns how many of the indices it found.
   PyTorch starts its own threads for a few dozen rows, which then wait for more in the way of ours. */
long take_rows(const char *table, const int64_t *indices, char *out, long count, long known, long size) {
  for (long i = 0; i < count; i++) {
    if (indices[i] < 0 || indices[i] >= known) return i;
    __builtin_memcpy(out + i * size, table + indices[i] * size, (size_t)size);
  }
  return count;
}

typedef struct {
  const char *rows;
  const int64_t *places;
  char *out;
  long size;
} put_arguments;

static void put_row(const void *pointer, long index) {
  const put_arguments *a = pointer;
  __builtin_memcpy(a->out + a->places[index] * a->size, a->rows + index * a->size, (size_t)a->size);
}

/* Rows of `size` bytes to places in a table. */
void put_rows(const char *rows, const int64_t *places, char *out, long count, long size, int threads) {
  put_arguments a = {rows, places, out, size};
  run(put_row, &a, count, count * size < 65536 ? 1 : threads);
}

/* ---- the cache ---- */

typedef struct {
  char *const *buffers;   /* each [B, H_kv, slots, size] */
  const int64_t *lengths; /* [B] */
  const int64_t *path;    /* [B, P] columns, ascending */
  const int64_t *counts;  /* [B] of them that are kept */
  long buffer_count, batch, heads, slots, columns, size; /* size: bytes of a slot */
} move_arguments;

/* Kept columns move up to their row's length; a column is never left of its new place. */
static void move_buffer(const void *pointer, long index) {
  const move_arguments *a = pointer;
  for (long row = 0; row < a->batch; row++)
    for (long head = 0; head < a->heads; head++) {
      char *base = a->buffers[index] + ((row * a->heads + head) * a->slots + a->lengths[row]) * a->size;
      for (long i = 0; i < a->counts[row]; i++) {
        long from = (long)a->path[row * a->columns + i];
        if (from != i) __builtin_memcpy(base + i * a->size, base + from * a->size, (size_t)a->size);
      }
    }
}

void move_slots(const move_arguments *a, int threads) { run(move_buffer, a, a->buffer_count, threads); }
