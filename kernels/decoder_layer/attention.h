/* ---- rotary embeddings, cache write and attention ----

   A key's score is a sum over the head's width from the first to the last, an output a sum over positions from the first
   to the last, so neither depends on how keys and queries are put into blocks. Keys are turned once for all queries of a
   task, values are read once for a block of queries. */

#define KEYS (2 * LANES)   /* of a block: two vectors of scores */
#define QUERIES 6          /* of a block: as many vectors of sums as registers hold, with PARTS of values */
#define PARTS (LANES == 16 ? 4 : 2)
#define NODES_PER_TASK 8
#define TASKS_PER_THREAD 3 /* with fewer, threads would wait for the last one: the rest of them is cut */

typedef struct {
  int64_t keys, values; /* addresses: [H_kv, slots, d] */
  int64_t length, slots;
} segment;

typedef struct {
  const bf16 *qkv;         /* [B, n, (H + 2 H_kv) d] */
  const bf16 *cos, *sin;   /* [B, n, d] */
  bf16 *keys, *values;     /* [B, H_kv, S, d]: what stands behind the shared segments */
  const int64_t *lengths;  /* [B] committed tokens */
  const int64_t *depth;    /* [B, M] of the tree's nodes */
  const uint8_t *seen;     /* [B, n, M]: what each computed node sees; the last n of the M nodes are those computed */
  const segment *segments; /* [B, levels]: each row's shared segments, by position; or null */
  bf16 *out;               /* [B, n, H d] */
  const int64_t *starts;   /* [B + 1], or null: row b has n_b nodes and not n, which stand from starts[b] on in qkv, cos,
                              sin and out, [total, ..]; `seen` has room for n of each */
  long batch, nodes, tree, heads, kv_heads, width, slots, window, levels; /* window 0: none */
  float scale;
  int threads;
  long most, whole, pieces; /* set here: nodes of a task; tasks that are not cut; the pieces of every other one */
} attention_arguments;

/* What a task is about: some nodes of a row of the batch, for the heads of one KV head. */
typedef struct {
  long row, kv, first, nodes; /* no nodes: nothing is to be done */
  int alone;                  /* whether no other task has nodes of that row and head */
} share;

/* Keys and values that lie one behind the other. */
typedef struct {
  const bf16 *keys, *values;
  long first, count; /* place of the first among the row's, and how many */
} stretch;

static inline void rotate(const bf16 *head, const bf16 *cos, const bf16 *sin, long d, float *out) {
  for (long i = 0; i < d / 2; i += LANES) {
    vec left = load(head + i), right = load(head + d / 2 + i);
    storef(out + i, left * load(cos + i) - right * load(sin + i));
    storef(out + d / 2 + i, right * load(cos + d / 2 + i) + left * load(sin + d / 2 + i));
  }
}

static inline long start_of(const attention_arguments *a, long row) {
  return a->starts ? (long)a->starts[row] : row * a->nodes;
}

static inline long nodes_of(const attention_arguments *a, long row) {
  return a->starts ? (long)(a->starts[row + 1] - a->starts[row]) : a->nodes;
}

static share share_of(const attention_arguments *a, long task) {
  const long parts = (a->nodes + a->most - 1) / a->most, cut = task - a->whole;
  const long each = cut < 0 ? task : a->whole + cut / a->pieces, row = each / parts / a->kv_heads;
  const long begin = each % parts * a->most, left = nodes_of(a, row) - begin, nodes = left < a->most ? left : a->most;
  if (cut < 0) return (share){row, each / parts % a->kv_heads, begin, nodes, parts == 1};
  const long size = (nodes + a->pieces - 1) / a->pieces, at = cut % a->pieces * size;
  return (share){row, each / parts % a->kv_heads, begin + at, nodes - at < size ? nodes - at : size, 0};
}

static long shared_tokens(const attention_arguments *a, long row) {
  long tokens = 0;
  for (long level = 0; level < a->levels; level++) tokens += (long)a->segments[row * a->levels + level].length;
  return tokens;
}

/* Keys and values of one KV head in one row of the batch. */
static void write_cache(const attention_arguments *a, long row, long head) {
  long stride = (a->heads + 2 * a->kv_heads) * a->width, d = a->width;
  long slot = a->lengths[row] - shared_tokens(a, row) + a->tree - a->nodes;
  bf16 *key = a->keys + ((row * a->kv_heads + head) * a->slots + slot) * d;
  bf16 *value = a->values + ((row * a->kv_heads + head) * a->slots + slot) * d;
  float rotated[MOST_WIDTH];
  const long end = start_of(a, row) + nodes_of(a, row);
  for (long at = start_of(a, row); at < end; at++, key += d, value += d) {
    const bf16 *from = a->qkv + at * stride + (a->heads + head) * d, *cos = a->cos + at * d, *sin = a->sin + at * d;
    rotate(from, cos, sin, d, rotated);
    for (long i = 0; i < d; i += LANES) store(key + i, loadf(rotated + i));
    __builtin_memcpy(value, from + a->kv_heads * d, (size_t)d * sizeof(bf16));
  }
}

/* Up to LANES keys, one behind the other, as [d / 2][LANES] pairs of neighbours at a stride of KEYS; what is missing is
   zero. */
static void turn_keys(const bf16 *keys, long count, long d, int32_t *turned) {
  for (long i = 0; i < d; i += 2 * LANES) {
    ivec a[LANES];
    for (long key = 0; key < LANES; key++) {
      a[key] = (ivec){0};
      if (key < count) __builtin_memcpy(&a[key], keys + key * d + i, sizeof(ivec));
    }
    transpose(a);
    for (long pair = 0; pair < LANES; pair++) __builtin_memcpy(turned + (i / 2 + pair) * KEYS, &a[pair], sizeof(ivec));
  }
}

/* sums + low * low + high * high of bfloat16 pairs; one of them is the same in all lanes. */
static inline vec add_dot(vec sums, ivec pairs, int32_t same) {
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(same));
#else
  ivec all = same - (ivec){0};
  sums += (vec)(pairs << 16) * (vec)(all << 16);
  return sums + (vec)(pairs & (int32_t)0xffff0000) * (vec)(all & (int32_t)0xffff0000);
#endif
}

INLINE score_block(const int count, const int32_t *query, long d, const int32_t *turned, float *scores, long stride) {
  vec left[QUERIES], right[QUERIES];
  for (int q = 0; q < count; q++) left[q] = right[q] = (vec){0};
  for (long i = 0; i < d / 2; i++) {
    ivec first, second;
    __builtin_memcpy(&first, turned + i * KEYS, sizeof first);
    __builtin_memcpy(&second, turned + i * KEYS + LANES, sizeof second);
    for (int q = 0; q < count; q++) {
      left[q] = add_dot(left[q], first, query[q * d / 2 + i]);
      right[q] = add_dot(right[q], second, query[q * d / 2 + i]);
    }
  }
  for (int q = 0; q < count; q++) {
    storef(scores + q * stride, left[q]);
    storef(scores + q * stride + LANES, right[q]);
  }
}

/* sums[q][d] += weights[q] * values over keys that lie one behind the other, for a part of the width. */
INLINE weigh_part(const int count, const int parts, float *sums, long d, const float *weights, long stride,
                  const bf16 *values, long keys) {
  vec total[QUERIES][PARTS];
  for (int q = 0; q < count; q++)
    for (int part = 0; part < parts; part++) total[q][part] = loadf(sums + q * d + part * LANES);
  for (long key = 0; key < keys; key++, values += d) {
    vec value[PARTS];
    for (int part = 0; part < parts; part++) value[part] = load(values + part * LANES);
    for (int q = 0; q < count; q++)
      for (int part = 0; part < parts; part++) total[q][part] += weights[q * stride + key] * value[part];
  }
  for (int q = 0; q < count; q++)
    for (int part = 0; part < parts; part++) storef(sums + q * d + part * LANES, total[q][part]);
}

INLINE add_values(const int count, float *sums, long d, const float *weights, long stride, const bf16 *values,
                  long keys) {
  long i = 0;
  for (; i + PARTS * LANES <= d; i += PARTS * LANES)
    weigh_part(count, PARTS, sums + i, d, weights, stride, values + i, keys);
  for (; i < d; i += 2 * LANES) weigh_part(count, 2, sums + i, d, weights, stride, values + i, keys);
}

#define BY_COUNT(call) \
  switch (count) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    default: call(6); \
  }

static void score(int count, const int32_t *query, long d, const int32_t *turned, float *scores, long stride) {
#define CALL(n) score_block(n, query, d, turned, scores, stride)
  BY_COUNT(CALL)
#undef CALL
}

static void weigh(int count, float *sums, long d, const float *weights, long stride, const bf16 *values, long keys) {
#define CALL(n) add_values(n, sums, d, weights, stride, values, keys)
  BY_COUNT(CALL)
#undef CALL
}

/* Scores times a scale to weights, in place; returns their sum. Lanes are told apart by position alone. */
static float soften(float *line, long count, float scale) {
  const ivec lane = lane_numbers();
  vec most = splat(-INFINITY), total = {0};
  ivec broken = {0};
  for (long i = 0; i < count; i += LANES) {
    ivec inside = lane < (int32_t)(count - i);
    vec x = either(inside, loadf(line + i) * scale, splat(-INFINITY));
    broken |= x != x;
    most = either(x > most, x, most);
  }
  float largest = most[0];
  for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
  for (int i = 0; i < LANES; i++)
    if (broken[i]) largest = NAN;
  for (long i = 0; i < count; i += LANES) {
    ivec inside = lane < (int32_t)(count - i);
    vec weight = either(inside, vexp(loadf(line + i) * scale - largest), (vec){0});
    total += weight;
    storef(line + i, weight);
  }
  return sum(total);
}

/* Where a row's keys and values for one KV head lie; its own last, the tree's behind the committed ones. */
static long find_stretches(const attention_arguments *a, long row, long kv, stretch *found) {
  long count = 0, at = 0, d = a->width;
  for (long level = 0; level < a->levels; level++) {
    const segment *s = a->segments + row * a->levels + level;
    if (!s->length) continue;
    long offset = kv * (long)s->slots * d;
    found[count++] = (stretch){(const bf16 *)s->keys + offset, (const bf16 *)s->values + offset, at, (long)s->length};
    at += (long)s->length;
  }
  long offset = (row * a->kv_heads + kv) * a->slots * d;
  found[count++] = (stretch){a->keys + offset, a->values + offset, at, a->lengths[row] + a->tree - at};
  return count;
}

/* The heads of one KV head, for some nodes of one row of the batch. */
static void attend(const void *pointer, long task) {
  const attention_arguments *a = pointer;
  const share part = share_of(a, task);
  long row = part.row, kv = part.kv, first = part.first, nodes = part.nodes, d = a->width, group = a->heads / a->kv_heads;
  if (nodes <= 0) return;
  long length = a->lengths[row], tree = a->tree, queries = nodes * group, stride = length + tree + 2 * KEYS;
  stride = (stride + LANES - 1) / LANES * LANES;
  long end = length + tree - a->nodes + first + nodes; /* nobody sees what stands behind itself */
  stretch stretches[MOST_LEVELS + 1];
  const size_t words = (size_t)(queries * (d + d / 2 + stride) + KEYS * d / 2 + d + tree);
  float *sums = (float *)scratch(FOR_ATTENTION, words * sizeof(float));
  float *scores = sums + queries * d, *rotated = scores + queries * stride;
  int32_t *query = (int32_t *)(rotated + d), *turned = query + queries * d / 2, *seen = turned + KEYS * d / 2;

  if (part.alone) write_cache(a, row, kv);
  long count = find_stretches(a, row, kv, stretches);
  for (long q = 0; q < queries; q++) {
    long at = start_of(a, row) + first + q / group, head = kv * group + q % group;
    rotate(a->qkv + (at * (a->heads + 2 * a->kv_heads) + head) * d, a->cos + at * d, a->sin + at * d, d, rotated);
    for (long i = 0; i < d; i += LANES) store((bf16 *)query + q * d + i, loadf(rotated + i));
  }
  for (const stretch *s = stretches; s < stretches + count; s++)
    for (long at = 0; at < s->count && s->first + at < end; at += KEYS) {
      long left = s->count - at;
      turn_keys(s->keys + at * d, left, d, turned);
      if (left > LANES) turn_keys(s->keys + (at + LANES) * d, left - LANES, d, turned + LANES);
      for (long q = 0; q < queries; q += QUERIES)
        score(queries - q < QUERIES ? (int)(queries - q) : QUERIES, query + q * d / 2, d, turned,
              scores + q * stride + s->first + at, stride);
    }

  /* What each node sees of the tree moves to where it would stand, were it committed; then scores become weights. The
     last place of a line, which no block of scores reaches, keeps one over their sum. */
  const stretch *own = stretches + count - 1;
  const bf16 *behind = own->values + (length - own->first) * d;
  const int64_t *depth = a->depth + row * tree;
  long begin[NODES_PER_TASK];
  for (long i = 0; i < queries * d; i += LANES) storef(sums + i, (vec){0});
  for (long node = 0; node < nodes; node++) {
    const uint8_t *sees = a->seen + (row * a->nodes + first + node) * tree;
    int64_t position = length + depth[tree - a->nodes + first + node];
    long from = a->window && position - a->window + 1 > 0 ? (long)(position - a->window + 1) : 0, rank = 0;
    begin[node] = from = from < length ? from : length;
    for (long other = 0; other < tree; other++)
      if (sees[other] && (!a->window || position - length - depth[other] < a->window)) seen[rank++] = (int32_t)other;
    for (long q = node * group; q < (node + 1) * group; q++) {
      float *line = scores + q * stride;
      for (long i = 0; i < rank; i++) line[length + i] = line[length + seen[i]];
      line[stride - 1] = 1.0f / soften(line + from, length - from + rank, a->scale);
    }
  }
  for (long q = 0; q < queries;) {
    long from = begin[q / group], next = q + 1;
    while (next < queries && next - q < QUERIES && begin[next / group] == from) next++;
    for (const stretch *s = stretches; s < stretches + count; s++) {
      long low = from > s->first ? from : s->first, high = s->first + s->count < length ? s->first + s->count : length;
      if (low < high)
        weigh((int)(next - q), sums + q * d, d, scores + q * stride + low, stride, s->values + (low - s->first) * d,
              high - low);
    }
    q = next;
  }
  for (long node = 0; node < nodes; node++) {
    const uint8_t *sees = a->seen + (row * a->nodes + first + node) * tree;
    int64_t own_depth = depth[tree - a->nodes + first + node];
    for (long other = 0, rank = length, run; other < tree; other += run + 1, rank += run) {
      for (run = 0; other + run < tree && sees[other + run]; run++)
        if (a->window && own_depth - depth[other + run] >= a->window) break;
      float *line = scores + node * group * stride + rank;
      for (long q = 0; run && q < group; q += QUERIES)
        weigh(group - q < QUERIES ? (int)(group - q) : QUERIES, sums + (node * group + q) * d, d, line + q * stride,
              stride, behind + other * d, run);
    }
    for (long q = node * group; q < (node + 1) * group; q++) {
      bf16 *out = a->out + ((start_of(a, row) + first + node) * a->heads + kv * group + q % group) * d;
      for (long i = 0; i < d; i += LANES) store(out + i, loadf(sums + q * d + i) * scores[q * stride + stride - 1]);
    }
  }
}

#include "unit_attention.h"

void tree_attention(attention_arguments *a) {
  const int unit = unit_attends(a);
  const long heads = a->batch * a->kv_heads, limit = unit ? UNIT_NODES : NODES_PER_TASK;
  a->most = a->nodes < limit ? a->nodes : limit;
  const long parts = (a->nodes + a->most - 1) / a->most, tasks = heads * parts;
  const long rest = a->nodes > 1 && tasks < TASKS_PER_THREAD * a->threads ? tasks % a->threads : 0;
  a->whole = tasks - rest;
  a->pieces = rest ? (a->threads + rest - 1) / rest : 1;
  for (long head = parts > 1 ? 0 : a->whole; head < heads; head++) write_cache(a, head / a->kv_heads, head % a->kv_heads);
  run(unit ? unit_attend : attend, a, a->whole + rest * a->pieces, a->threads);
}
