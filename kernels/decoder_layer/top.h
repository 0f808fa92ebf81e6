/* ---- the most probable tokens of a row of logits ---- */

#define MOST_TOP 64

typedef struct {
  const void *logits;  /* [rows, width] bfloat16 or float32 */
  float *best, *total; /* [rows, count] descending, [rows] log of the sum of exponentials */
  int64_t *index;      /* [rows, count] */
  long rows, width, count;
  int bytes; /* of a logit */
} top_arguments;

static inline vec logits_at(const char *row, long i, long width, int bytes) {
  if (i + LANES <= width) return bytes == 2 ? load((const bf16 *)row + i) : loadf((const float *)row + i);
  vec out = splat(-INFINITY);
  for (; i < width; i++) {
    float value;
    uint32_t bits = bytes == 2 ? (uint32_t)((const bf16 *)row)[i] << 16 : ((const uint32_t *)row)[i];
    __builtin_memcpy(&value, &bits, sizeof value);
    out[i % LANES] = value;
  }
  return out;
}

/* Of equals the first. NaN is never among the best, and makes `total` NaN. */
static inline __attribute__((always_inline)) void top_of(const top_arguments *a, long row, const int bytes) {
  const char *logits = (const char *)a->logits + row * a->width * bytes;
  float *best = a->best + row * a->count;
  int64_t *index = a->index + row * a->count;
  for (long k = 0; k < a->count; k++) best[k] = -INFINITY, index[k] = k;
  for (long i = 0; i < a->width; i += LANES) {
    vec x = logits_at(logits, i, a->width, bytes);
    ivec larger = x > best[a->count - 1];
    int any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= larger[lane];
    if (!any) continue;
    for (int lane = 0; lane < LANES; lane++) {
      if (!(x[lane] > best[a->count - 1])) continue;
      long k = a->count - 1;
      for (; k > 0 && x[lane] > best[k - 1]; k--) best[k] = best[k - 1], index[k] = index[k - 1];
      best[k] = x[lane], index[k] = i + lane;
    }
  }
  vec total = {0};
  for (long i = 0; i < a->width; i += LANES) {
    vec x = logits_at(logits, i, a->width, bytes);
    total += either(x == -INFINITY, splat(0), vexp(x - best[0]));
  }
  a->total[row] = best[0] + logf(sum(total));
}

static void top_row(const void *pointer, long row) {
  const top_arguments *a = pointer;
  if (a->bytes == 2)
    top_of(a, row, 2);
  else
    top_of(a, row, 4);
}

/* The `count` largest of every row, at most MOST_TOP, and the log of the sum of its exponentials. */
void top(const top_arguments *a, int threads) { run(top_row, a, a->rows, threads); }
