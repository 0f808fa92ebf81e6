/* ---- products on processors without instructions for bfloat16 ----

   The weights of 32 inputs at a time become numbers of 32 bits in the first cache, where all rows find them: float32, or
   pairs of 16-bit integers where both factors are whole. A sum takes one input after the other, so it is what it is
   alone, whatever other rows there are; those of integers are exact, and the same as on any other processor. */

#define AT_ONCE 4 /* rows whose sums stay in registers */
#define BYTES_AHEAD 8192 /* from what is read to what is asked for */
#define VECTORS (PANEL / LANES)
#define LEAST_SHARED 32768 /* inputs of all rows from which on threads share in widening them */
#define KEPT 2 /* vectors of weights beside their sums */

int has_matrix_unit(void) { return 0; }

int signs_lie_apart(void) { return 0; }

static inline int is_whole(numbers kind) { return input_bytes(kind) == 1; }

/* Numbers of 32 bits that so many inputs become. */
static inline long steps_of(numbers kind, long inputs) { return is_whole(kind) ? inputs / 2 : inputs; }

typedef int16_t svec __attribute__((vector_size(4 * LANES)));

static inline uvec load_bits(const void *from) {
  uvec out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

static inline void store_bits(uint32_t *to, uvec value) { __builtin_memcpy(to, &value, sizeof value); }

/* ---- inputs ---- */

typedef struct {
  const product_arguments *a;
  uint32_t *out; /* [in / 32][rows][steps] */
} widening;

/* A row's inputs as they are multiplied. */
static void widen_inputs(const void *pointer, long row) {
  const widening *w = pointer;
  const product_arguments *a = w->a;
  const numbers kind = (numbers)a->kind;
  const long steps = steps_of(kind, TOGETHER), width = a->in_width;
  uint32_t *out = w->out + row * steps;
  for (long k = 0; k < width; k += TOGETHER, out += a->rows * steps) {
    const long count = width - k < TOGETHER ? width - k : TOGETHER;
    if (is_whole(kind)) {
      int16_t wide[TOGETHER];
      const char *in = (const char *)a->in + (takes_groups(kind) ? k * a->rows + row * TOGETHER : row * width + k);
      for (long i = 0; i < count; i++)
        wide[i] = (int16_t)(takes_groups(kind) ? ((const int8_t *)in)[i] : ((const uint8_t *)in)[i] - 128);
      __builtin_memcpy(out, wide, (size_t)count * sizeof *wide);
    } else {
      const bf16 *in = (const bf16 *)a->in + row * width + k;
      for (long i = 0; i < count; i++) out[i] = (uint32_t)in[i] << 16;
    }
  }
}

/* ---- weights ---- */

/* Float16 to float32. */
static inline vec load_half(const uint16_t *from) {
#if LANES == 16
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__) && defined(__AVX2__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
  const uvec bits = load_halves(from), size = bits & 0x7fff;
  const vec finite = (vec)(size << 13) * 0x1p112f, wide = either(size >= 0x7c00, (vec)(size << 13 | 0x7f800000), finite);
  return (vec)((uvec)wide | (bits & 0x8000) << 16);
#endif
}

/* The nearest bfloat16 numbers, of finite ones, in the upper halves. */
static inline uvec nearest(vec value) {
  const uvec bits = (uvec)value;
  return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

/* Four bytes of each channel of a panel, or parts of them, to two pairs of 16-bit integers. */
INLINE split_quad(const int is_signed, const char *from, const int shift, const uint32_t mask, uint32_t *out) {
  for (int v = 0; v < PANEL; v += LANES) {
    const uvec bytes = load_bits(from + 4 * v) >> shift & mask;
    uvec first, second;
    if (is_signed) {
      first = (uvec)((svec)((bytes & 0xff) << 8 | (bytes & 0xff00) << 16) >> 8);
      second = (uvec)((svec)((bytes >> 8 & 0xff00) | (bytes & 0xff000000)) >> 8);
    } else {
      first = (bytes & 0xff) | (bytes & 0xff00) << 8;
      second = (bytes >> 16 & 0xff) | (bytes >> 8 & 0xff0000);
    }
    store_bits(out + v, first);
    store_bits(out + PANEL + v, second);
  }
}

/* Two signed bytes in each lane. */
static inline ivec load_pairs(const char *from) {
#if LANES == 8 && defined(__AVX2__)
  return (ivec)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
  return (ivec)(load_halves((const uint16_t *)from) << 16) >> 16;
#endif
}

/* Pairs of bfloat16. */
INLINE widen_halves(const char *weight, long inputs, uint32_t *out) {
  for (long k = 0; k < inputs; k += 2, weight += 4 * PANEL, out += 2 * PANEL)
    for (int v = 0; v < PANEL; v += LANES) {
      const uvec pairs = load_bits(weight + 4 * v);
      store_bits(out + v, pairs << 16);
      store_bits(out + PANEL + v, pairs & 0xffff0000);
    }
}

/* int8 in pairs. */
INLINE widen_bytes(const char *weight, long inputs, uint32_t *out) {
  for (long k = 0; k < inputs; k += 2, weight += 2 * PANEL, out += 2 * PANEL)
    for (int v = 0; v < PANEL; v += LANES) {
      const ivec pairs = load_pairs(weight + 2 * v);
      storef((float *)out + v, __builtin_convertvector(pairs << 24 >> 24, vec));
      storef((float *)out + PANEL + v, __builtin_convertvector(pairs >> 8, vec));
    }
}

/* The same of a group. */
INLINE widen_grouped_bytes(const char *weight, const uint16_t *factors, uint32_t *out) {
  for (int v = 0; v < PANEL; v += LANES) {
    const vec scale = load_half(factors + v);
    for (int pair = 0; pair < TOGETHER / 2; pair++) {
      const char *line = weight + 2 * pair * PANEL;
      const ivec pairs = load_pairs(line + 2 * v);
      uint32_t *to = out + 2 * pair * PANEL + v;
      store_bits(to, nearest(__builtin_convertvector(pairs << 24 >> 24, vec) * scale));
      store_bits(to + PANEL, nearest(__builtin_convertvector(pairs >> 8, vec) * scale));
    }
  }
}

/* Codes of 4 bits, of a group: of every eight channels two lines, for eight pairs of inputs each. A channel's two inputs
   are neighbours, and the pairs lie in their 32 bits from the lowest on. */
INLINE widen_codes(const product_arguments *a, const char *weight, const uint16_t *factors, uint32_t *out) {
  for (int v = 0; v < PANEL; v += LANES) {
    const vec scale = load_half(factors + v);
    vec least = load_half(factors + PANEL + v);
    if (a->zero_points) least = -(scale * least);
    for (int eight = 0; eight < 2; eight++) {
      const char *line = weight + v / 8 * 128 + eight * 64;
      uint32_t *to = out + eight * 16 * PANEL + v;
      ivec codes[2];
      take_turns_back((ivec)load_bits(line), (ivec)load_bits(line + (LANES == 8 ? 32 : 128)), codes);
#pragma GCC unroll 8
      for (int pair = 0; pair < 8; pair++, to += 2 * PANEL)
        for (int input = 0; input < 2; input++) {
          const vec code = __builtin_convertvector(codes[input] >> 4 * pair & 15, vec);
          store_bits(to + input * PANEL, nearest(code * scale + least));
        }
    }
  }
}

/* The weights of a panel from an input on, 32 of them or the last ones: [steps][PANEL]. */
INLINE widen_weights(const numbers kind, const product_arguments *a, const char *weight, long panel, long input,
                     long inputs, uint32_t *out) {
  const uint16_t *factors = factors_at(kind, a, panel, input);
  if (kind == IN_16_BIT) widen_halves(weight, inputs, out);
  if (kind == WEIGHTS_IN_8_BIT) widen_bytes(weight, inputs, out);
  if (kind == GROUPS_IN_8_BIT) widen_grouped_bytes(weight, factors, out);
  if (kind == GROUPS_IN_4_BIT) widen_codes(a, weight, factors, out);
  if (kind == BOTH_IN_8_BIT || kind == BYTES_BY_8_BIT_GROUPS)
    for (long k = 0; k < inputs; k += 4, weight += 4 * PANEL, out += 2 * PANEL) {
      split_quad(kind == BOTH_IN_8_BIT, weight, 0, ~0u, out);
    }
  if (kind == BYTES_BY_4_BIT_GROUPS)
    for (long k = 0; k < inputs; k += 8, weight += 4 * PANEL, out += 4 * PANEL) {
      split_quad(0, weight, 0, 0x0f0f0f0f, out);
      split_quad(0, weight, 4, 0x0f0f0f0f, out + 2 * PANEL);
    }
}

/* ---- sums ---- */

/* sums + low * low + high * high of 16-bit integers. */
static inline __attribute__((always_inline)) ivec add_pairs(ivec sums, ivec a, ivec b) {
#if LANES == 8 && defined(__AVXVNNI__)
  return (ivec)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif LANES == 8 && defined(__AVX2__)
  return sums + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif LANES == 16 && defined(__AVX512VNNI__)
  return (ivec)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif LANES == 16 && defined(__AVX512BW__)
  return sums + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Has a vector stay in a register, which GCC would read from memory again for each of its uses. */
static inline __attribute__((always_inline)) ivec kept(ivec value) {
#if LANES == 8 && defined(__AVX2__)
  __asm__("" : "+x"(value));
#endif
  return value;
}

/* Weights that are asked for while others are multiplied, every step `each` bytes further: a core keeps track of a few lines
   on their way, and arithmetic would wait for more asked at once. */
typedef struct {
  const char *from;
  long each;
} asked;

/* sums [count][PANEL] += weights [steps][PANEL] * inputs [count][stride], for some vectors of the panel. */
INLINE add_part(const int whole, const int count, const int vectors, const uint32_t *weight, const uint32_t *in,
                long stride, long steps, asked ahead, float *sums) {
  vec total[AT_ONCE][VECTORS];
  ivec exact[AT_ONCE][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < count; r++)
    for (int v = 0; v < vectors; v++)
      if (whole)
        exact[r][v] = (ivec)load_bits(sums + r * PANEL + v * LANES);
      else
        total[r][v] = loadf(sums + r * PANEL + v * LANES);
  for (long step = 0; step < steps; step++, weight += PANEL) {
    ivec each[VECTORS];
    __builtin_prefetch(ahead.from + step * ahead.each, 0, 3);
    for (int v = 0; v < vectors; v++) each[v] = (ivec)load_bits(weight + v * LANES);
    for (int v = 0; v < vectors && v < KEPT; v++) each[v] = kept(each[v]);
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
      const ivec same = kept((ivec)(in[r * stride + step] - (uvec){0}));
      for (int v = 0; v < vectors; v++)
        if (whole)
          exact[r][v] = kept(add_pairs(exact[r][v], each[v], same));
        else
          total[r][v] += (vec)each[v] * (vec)same;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; r++)
    for (int v = 0; v < vectors; v++)
      if (whole)
        store_bits((uint32_t *)sums + r * PANEL + v * LANES, (uvec)exact[r][v]);
      else
        storef(sums + r * PANEL + v * LANES, total[r][v]);
}

/* More rows than three take half of the channels at a time, where there are few registers. */
INLINE add_steps(const int whole, const int count, const uint32_t *weight, const uint32_t *in, long stride, long steps,
                 asked ahead, float *sums) {
  const int vectors = count > 3 && VECTORS > 2 ? 2 : VECTORS;
  if (vectors < VECTORS) ahead.each /= 2;
  for (int v = 0; v < VECTORS; v += vectors, ahead.from += steps * ahead.each)
    add_part(whole, count, vectors, weight + v * LANES, in, stride, steps, ahead, sums + v * LANES);
}

#define ADD_ROWS(name, whole) \
  static __attribute__((noinline)) void name(int count, const uint32_t *weight, const uint32_t *in, long stride, \
                                             long steps, asked ahead, float *sums) { \
    switch (count) { \
      case 1: add_steps(whole, 1, weight, in, stride, steps, ahead, sums); break; \
      case 2: add_steps(whole, 2, weight, in, stride, steps, ahead, sums); break; \
      case 3: add_steps(whole, 3, weight, in, stride, steps, ahead, sums); break; \
      default: add_steps(whole, AT_ONCE, weight, in, stride, steps, ahead, sums); \
    } \
  }

ADD_ROWS(add_floats, 0)
ADD_ROWS(add_wholes, 1)

/* The whole sums of 32 inputs of some rows to their sums in float32, as group_product.h has it. */
INLINE add_group(const int four, const product_arguments *a, const uint16_t *factors, const input_group *each, int count,
                 const float *whole, float *sums) {
  for (int v = 0; v < PANEL; v += LANES) {
    const vec scale = load_half(factors + v);
    vec least = scale * -128.0f;
    if (four) {
      least = load_half(factors + PANEL + v);
      if (a->zero_points) least = -(least * scale);
    }
    for (int r = 0; r < count; r++) {
      const vec product = __builtin_convertvector((ivec)loadf(whole + r * PANEL + v), vec);
      const vec now = loadf(sums + r * PANEL + v) + product * (scale * each[r].scale);
      storef(sums + r * PANEL + v, now + least * each[r].total);
    }
  }
}

/* All rows times one panel: `sums`, zeros before, are [rows][PANEL], those of integers in their bits. */
INLINE multiply_panel(const numbers kind, const product_arguments *a, long panel, float *sums) {
  const int whole = is_whole(kind), few = a->rows < AT_ONCE;
  const long size = channel_bytes(kind, a->in_width) * PANEL, chunk = channel_bytes(kind, TOGETHER) * PANEL;
  const long parts = (a->rows + AT_ONCE - 1) / AT_ONCE, stride = steps_of(kind, TOGETHER);
  const char *weight = (const char *)a->weight + panel * size;
  const uint32_t *in = a->in;
  const input_group *each = a->sizes;
  uint32_t wide[TOGETHER * PANEL] __attribute__((aligned(64)));
  for (long k = 0; k < a->in_width; k += TOGETHER, weight += chunk) {
    const long inputs = a->in_width - k < TOGETHER ? a->in_width - k : TOGETHER, steps = steps_of(kind, inputs);
    const char *ahead = weight + BYTES_AHEAD;
    if (few) ask(ahead, ahead + chunk, chunk / 64);
    widen_weights(kind, a, weight, panel, k, inputs, wide);
    for (long row = 0, part = 0; part < parts; part++) {
      const int count = (int)((a->rows - row + parts - part - 1) / (parts - part));
      const asked next = {ahead + part * chunk / parts, few ? 0 : chunk / (parts * steps)};
      float *to = sums + row * PANEL;
      if (takes_groups(kind)) {
        float group[AT_ONCE * PANEL] __attribute__((aligned(64))) = {0};
        add_wholes(count, wide, in, stride, steps, next, group);
        add_group(in_4_bit(kind), a, factors_at(kind, a, panel, k), each, count, group, to);
        each += count;
      } else if (whole)
        add_wholes(count, wide, in, stride, steps, next, to);
      else
        add_floats(count, wide, in, stride, steps, next, to);
      row += count;
      in += count * stride;
    }
  }
}

/* A row's sums of a vector of channels, as they are without scales of a whole channel. */
static inline vec scaled(const product_arguments *a, long row, long channel, vec sums) {
  if (a->kind == WEIGHTS_IN_8_BIT) return sums * loadf((const float *)a->scales + channel);
  if (a->kind != BOTH_IN_8_BIT) return sums;
  const vec exact = __builtin_convertvector((ivec)sums, vec);
  return exact * loadf((const float *)a->scales + channel) * ((const float *)a->sizes)[row];
}

static void finish_row(const product_arguments *a, long row, long first, const float *sums) {
  const int full = a->out_width - first >= PANEL;
  for (int v = 0; v < PANEL; v += LANES) {
    const long channel = first + v;
    vec value = scaled(a, row, channel, loadf(sums + v));
    if (!full) {
      finish(a, row, channel, value);
      continue;
    }
    if (a->bias) value += load(a->bias + channel);
    if (a->residual) value += load(a->residual + row * a->out_width + channel);
    store(out_row(a, row) + channel, value);
  }
}

static void take_panels(void *pointer, int thread) {
  panel_queue *queue = pointer;
  const product_arguments *a = queue->a;
  int lane = thread % queue->count;
  float sums[BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
#define CASE(kind) \
  case kind: multiply_panel(kind, a, panel, sums); break;
  for (long panel; (panel = next_panel(queue, &lane)) >= 0;) {
    __builtin_memset(sums, 0, (size_t)(a->rows * PANEL) * sizeof *sums);
    switch ((numbers)a->kind) {
      CASE(IN_16_BIT) CASE(WEIGHTS_IN_8_BIT) CASE(BOTH_IN_8_BIT) CASE(GROUPS_IN_8_BIT) CASE(GROUPS_IN_4_BIT)
      CASE(BYTES_BY_8_BIT_GROUPS) CASE(BYTES_BY_4_BIT_GROUPS)
    }
    for (long row = 0; row < a->rows; row++) finish_row(a, row, panel * PANEL, sums + row * PANEL);
  }
#undef CASE
}

static void multiply_block(panel_queue *queue, product_arguments *a, long panels) {
  const long chunks = (a->in_width + TOGETHER - 1) / TOGETHER;
  const size_t size = (size_t)(chunks * a->rows * steps_of((numbers)a->kind, TOGETHER)) * sizeof(uint32_t);
  const widening w = {a, (uint32_t *)scratch(FOR_INPUTS, size)};
  run(widen_inputs, &w, a->rows, a->rows * a->in_width < LEAST_SHARED ? 1 : a->threads);
  a->in = w.out;
  run_all(take_panels, queue, panels, a->threads);
}
