/* ---- drafting a tree with a few decoder layers ----

   EAGLE (Li et al. 2024, 2025) has one that runs on its own states: an entry is the embedding of a token and the state one
   token before, each normed, side by side. Of committed tokens that state is fused of several of the target's. A draft
   model's entry is the embedding alone. Layers attend to the committed entries and to those above in the tree. What the
   output head makes of their states ranks the children, and the tree grows level by level along the most probable paths
   (EAGLE-2, section 4). */

typedef struct {
  const layer *const *layers;
  const linear *fuse;       /* of the target's states side by side; null where entries have none */
  const linear *mix, *head; /* mix: what attention's output is added to, of an entry; null for the state itself */
  const bf16 *embeddings, *embedding_norm, *state_norm, *norm; /* no embedding_norm: entries are embeddings alone */
  const bf16 *cos, *sin;     /* [positions, width] */
  const int64_t *vocabulary; /* [V'] token ids; null where the head is for all tokens */
  const float *rates;        /* [rate_levels, rate_ranks] log-confidence by depth and rank; null for the head's own */
  long count, rate_levels, rate_ranks; /* count: of layers */
  float fuse_eps, embedding_eps, state_eps, eps;
  int scaled;      /* whether the target's states are brought to unit size before they are fused */
  int adds_normed; /* without mix: to the normed state */
} draft_weights;

typedef struct {
  bf16 *const *keys, *const *values; /* each layer's, [B, H_kv, slots, width] */
  const int64_t *lengths;            /* [B] committed entries */
  char *space;                       /* draft_space() bytes, aligned to 64 */
  long batch, slots;
  int threads;
} draft_cache;

typedef struct {
  char *layer;
  bf16 *beside, *fused, *inputs, *residual, *cos, *sin, *states, *gathered, *normed, *logits;
  uint8_t *bytes;
  char *sizes;
  float *best, *total;
  int64_t *index;
} draft_buffers;

static long state_width(const draft_weights *h) { return h->layers[0]->down.out_width; }

static long place_draft(const draft_weights *h, long rows, long drafts, char *space, draft_buffers *b) {
  long at = 0, d = state_width(h), width = h->layers[0]->width, read = h->fuse ? h->fuse->in_width : 0;
  const long widest = read > 2 * d ? read : 2 * d;
  PLACE(layer, char, layer_space(h->layers[0], rows))
  PLACE(beside, bf16, rows * read)
  PLACE(fused, bf16, read ? rows * d : 0)
  PLACE(inputs, bf16, rows * 2 * d)
  PLACE(residual, bf16, rows * d)
  PLACE(cos, bf16, rows * width)
  PLACE(sin, bf16, rows * width)
  PLACE(bytes, uint8_t, rows * widest)
  PLACE(sizes, char, rows * most_input_sizes(widest))
  PLACE(states, bf16, drafts * d)
  PLACE(gathered, bf16, drafts * d)
  PLACE(normed, bf16, drafts * d)
  PLACE(logits, bf16, drafts * h->head->out_width)
  PLACE(best, float, drafts * MOST_TOP)
  PLACE(total, float, drafts)
  PLACE(index, int64_t, drafts * MOST_TOP)
  return at;
}

/* For `rows` entries at a time, of `drafts` of which children are wanted. */
long draft_space(const draft_weights *h, long rows, long drafts) {
  draft_buffers unused;
  return place_draft(h, rows, drafts, 0, &unused);
}

static void multiply_draft(const linear *l, const draft_buffers *b, const bf16 *in, bf16 *out, long rows, int threads) {
  buffers quantized = {.bytes = b->bytes, .sizes = b->sizes};
  multiply(l, &quantized, in, 0, out, rows, threads);
}

typedef struct {
  const draft_weights *h;
  const draft_cache *c;
  const draft_buffers *b;
  const bf16 *states;
  const int64_t *tokens, *depth; /* depth of all `tree` nodes, of which the last `nodes` are entered */
  long nodes, tree;
} entry_arguments;

static void norm_into(const bf16 *in, const bf16 *weight, bf16 *out, long d, float eps) {
  row_arguments a = {in, weight, out, 0, eps, 1, d, norm_row};
  norm_row(&a, 0);
}

static void make_entry(const void *pointer, long index) {
  const entry_arguments *a = pointer;
  const draft_weights *h = a->h;
  const long d = state_width(h), width = h->layers[0]->width, row = index / a->nodes;
  const bf16 *embedding = h->embeddings + a->tokens[index] * d;
  if (h->embedding_norm) {
    const bf16 *state = a->states + index * d;
    bf16 *in = a->b->inputs + index * 2 * d;
    norm_into(embedding, h->embedding_norm, in, d, h->embedding_eps);
    norm_into(state, h->state_norm, in + d, d, h->state_eps);
    if (!h->mix)
      __builtin_memcpy(a->b->residual + index * d, h->adds_normed ? in + d : state, (size_t)d * sizeof(bf16));
  } else
    __builtin_memcpy(a->b->residual + index * d, embedding, (size_t)d * sizeof(bf16));
  long position = (long)(a->c->lengths[row] + a->depth[row * a->tree + a->tree - a->nodes + index % a->nodes]);
  __builtin_memcpy(a->b->cos + index * width, h->cos + position * width, (size_t)width * sizeof(bf16));
  __builtin_memcpy(a->b->sin + index * width, h->sin + position * width, (size_t)width * sizeof(bf16));
}

/* The layers over `nodes` entries of every row: states [B, nodes, d] before them, which a draft model has none of, to
   states after them. They stand behind the committed ones and the tree's earlier ones; `seen` [B, nodes, tree] says which
   of the tree's each sees. */
static void enter(const draft_weights *h, const draft_cache *c, const draft_buffers *b, const bf16 *states,
                  const int64_t *tokens, const int64_t *depth, const uint8_t *seen, long nodes, long tree, bf16 *out) {
  entry_arguments a = {h, c, b, states, tokens, depth, nodes, tree};
  const long rows = c->batch * nodes;
  run(make_entry, &a, rows, rows > 8 ? c->threads : 1);
  if (h->mix) multiply_draft(h->mix, b, b->inputs, b->residual, rows, c->threads);
  pass p = {b->cos, b->sin, c->lengths, depth, seen, 0, b->layer, c->keys, c->values, 0, 0, c->batch, nodes, tree, rows,
            c->slots, 0, c->threads};
  const bf16 *in = h->embedding_norm ? b->inputs : b->residual;
  for (long i = 0; i < h->count; i++)
    decoder_layer(h->layers[i], i, &p, i ? out : in, i ? out : b->residual, out);
}

typedef struct {
  const draft_weights *h;
  const bf16 *const *states;
  const int64_t *columns;
  long nodes, given;
  bf16 *out;
} beside_arguments;

static void put_beside(const void *pointer, long index) {
  const beside_arguments *a = pointer;
  const long d = state_width(a->h), count = a->h->fuse->in_width / d;
  const long from = a->columns ? index / a->nodes * a->given + (long)a->columns[index] : index;
  for (long k = 0; k < count; k++) {
    const bf16 *in = a->states[k] + from * d;
    bf16 *out = a->out + (index * count + k) * d;
    if (a->h->scaled)
      norm_into(in, 0, out, d, a->h->fuse_eps);
    else
      __builtin_memcpy(out, in, (size_t)d * sizeof(bf16));
  }
}

/* Committed entries, a chain of `nodes` in every row. `states`: those of the target that are fused, [B, given, d] each,
   null where there are none; an entry's stands in the column [B, nodes] named, or its own where these are null. Returns 0
   where memory is short. */
int draft_entries(const draft_weights *h, const draft_cache *c, const bf16 *const *states, const int64_t *columns,
                  long given, const int64_t *tokens, long nodes, bf16 *out) {
  const long rows = c->batch * nodes;
  draft_buffers b;
  place_draft(h, rows, 0, c->space, &b);
  int64_t *depth = malloc((size_t)rows * (sizeof *depth + (size_t)nodes));
  if (!depth) return 0;
  uint8_t *seen = (uint8_t *)(depth + rows);
  for (long row = 0; row < rows; row++) {
    depth[row] = row % nodes;
    for (long node = 0; node < nodes; node++) seen[row * nodes + node] = node <= row % nodes;
  }
  if (h->fuse) {
    beside_arguments a = {h, states, columns, nodes, given, b.beside};
    run(put_beside, &a, rows, rows > 8 ? c->threads : 1);
    multiply_draft(h->fuse, &b, b.beside, b.fused, rows, c->threads);
  }
  enter(h, c, &b, b.fused, tokens, depth, seen, nodes, nodes, out);
  free(depth);
  return 1;
}

/* ---- growth ---- */

#define NO_PARENT (-1)
#define PADDED (-2)

typedef struct {
  const int64_t *pending; /* [B] roots */
  const bf16 *start;      /* [B, d] states they are drafted from */
  long depth, width, branching, most_nodes;
  long all_nodes; /* that are chosen of all rows' together */
  int64_t *tokens, *parents; /* [B, count] of the chosen nodes, the best first; count is most_nodes at most */
  float *confidence;         /* [B, count] theirs, of all nodes on the way to each */
} growth;

/* A row's root and all children of the nodes expanded; then, of the nodes expanded without the root, what is computed. */
typedef struct {
  int64_t *token;
  long *above, *column; /* candidates: their parent's place among them, their own among the nodes expanded */
  double *joint;
  long *frontier, *order;
} candidates;

/* The `count` best of the candidates from `first` to `end`, the best first, of equals the earlier one. */
static void pick_best(const double *joint, long first, long end, long count, long *out) {
  for (long i = first, filled = 0; i < end; i++) {
    long k = filled < count ? filled++ : count;
    for (; k > 0 && joint[i] > joint[out[k - 1]]; k--)
      if (k < count) out[k] = out[k - 1];
    if (k < count) out[k] = i;
  }
}

/* Children of the frontier, from the head's best tokens; returns how many candidates there are now. */
static long add_children(const draft_weights *h, const growth *g, const draft_buffers *b, candidates *c, long row,
                         long nodes, long level, long end) {
  const float *rates =
      h->rates ? h->rates + ((level < h->rate_levels ? level : h->rate_levels) - 1) * h->rate_ranks : 0;
  for (long node = 0; node < nodes; node++)
    for (long k = 0; k < g->branching; k++, end++) {
      const long at = (row * nodes + node) * g->branching + k;
      float own = b->best[at] - b->total[row * nodes + node];
      if (rates && own > -INFINITY) own = rates[k < h->rate_ranks ? k : h->rate_ranks - 1];
      c->joint[end] = own > -INFINITY ? c->joint[c->frontier[node]] + (double)own : -INFINITY;
      c->token[end] = h->vocabulary ? h->vocabulary[b->index[at]] : b->index[at];
      c->above[end] = c->frontier[node];
    }
  return end;
}

/* The nodes of a level to expand, as columns of the tree below the root: tokens, depth, what they see, states before. */
typedef struct {
  int64_t *tokens, *depth, *all_depths;
  uint8_t *seen, *all_seen;
} level_nodes;

static void choose(const draft_weights *h, const draft_cache *cache, const candidates *rows, const draft_buffers *b,
                   const bf16 *states, level_nodes *l, long nodes, long before, long columns, long level, long known,
                   long first) {
  const long d = state_width(h), tree = known + nodes;
  for (long row = 0; row < cache->batch; row++) {
    const candidates *c = rows + row;
    for (long node = 0; node < nodes; node++) {
      const long candidate = c->frontier[node], column = known + node, parent = c->column[c->above[candidate]];
      const int possible = c->joint[candidate] > -INFINITY;
      uint8_t *seen = l->all_seen + (row * columns + column) * columns;
      c->column[candidate] = column;
      __builtin_memset(seen, 0, (size_t)columns);
      if (possible && parent >= 0)
        __builtin_memcpy(seen, l->all_seen + (row * columns + parent) * columns, (size_t)columns);
      seen[column] = 1;
      __builtin_memcpy(l->seen + (row * nodes + node) * tree, seen, (size_t)tree);
      l->all_depths[row * columns + column] = possible ? level - 1 : 0;
      l->tokens[row * nodes + node] = c->token[candidate];
      /* Padding may start from any state. */
      const long from = possible && parent >= first ? parent - first : 0;
      __builtin_memcpy(b->gathered + (row * nodes + node) * d, states + (row * before + from) * d,
                       (size_t)d * sizeof(bf16));
    }
    __builtin_memcpy(l->depth + row * tree, l->all_depths + row * columns, (size_t)tree * sizeof(int64_t));
  }
}

/* How many of a row's frontier could have a child among the chosen nodes: as confidence falls along a path, not those
   that enough candidates are better than, of the row or of all rows. */
static long count_promising(const candidates *rows, long batch, long row, long nodes, long end, const growth *g) {
  for (long node = 0; node < nodes; node++) {
    const double chance = rows[row].joint[rows[row].frontier[node]];
    long mine = 0, all = 0;
    for (long other = 0; other < batch; other++) {
      long better = 0;
      for (long i = 0; i < end; i++) better += rows[other].joint[i] > chance;
      if (other == row) mine = better;
      all += better < g->most_nodes ? better : g->most_nodes;
    }
    if (mine >= g->most_nodes || all >= g->all_nodes) return node;
  }
  return nodes;
}

/* Puts a row's `count` best in order; returns how many of them are possible, which are the first. */
static long order_best(const candidates *c, long end, long count) {
  pick_best(c->joint, 0, end, count, c->order);
  while (count > 1 && !(c->joint[c->order[count - 1]] > -INFINITY)) count--;
  return count;
}

static void write_best(const growth *g, const candidates *c, long row, long count) {
  for (long i = 0; i < count; i++) c->column[c->order[i]] = i;
  for (long i = 0; i < count; i++) {
    const long at = row * count + i, candidate = c->order[i];
    g->tokens[at] = c->token[candidate];
    g->confidence[at] = (float)exp(c->joint[candidate]);
    g->parents[at] = !(c->joint[candidate] > -INFINITY) ? PADDED : candidate ? c->column[c->above[candidate]] : NO_PARENT;
  }
}

/* The best nodes of every row's tree, written densely as [B, count], which is as many as some row has; what others lack
   is padding. Returns count, or 0 where memory is short. Slots for the nodes expanded, width * (depth - 1), must be free
   behind the committed entries. */
long grow_draft(const draft_weights *h, const draft_cache *cache, const growth *g) {
  const long batch = cache->batch, columns = g->width * (g->depth - 1) + 1, d = state_width(h);
  const long most = 1 + g->branching * (1 + g->width * (g->depth - 1));
  draft_buffers b;
  place_draft(h, batch * g->width, batch * g->width, cache->space, &b);
  const size_t per_row = (size_t)most * (sizeof(int64_t) + sizeof(double) + 3 * sizeof(long)) +
                         (size_t)g->width * sizeof(long);
  const size_t nodes_size = (size_t)columns * (2 * (size_t)columns + 3 * sizeof(int64_t));
  char *memory = calloc((size_t)batch, sizeof(candidates) + per_row + nodes_size);
  if (!memory) return 0;
  char *at = memory + (size_t)batch * sizeof(candidates);
#define TAKE(field, type, count) \
  field = (type *)at; \
  at += (size_t)(count) * sizeof(type);
  candidates *rows = (candidates *)memory;
  for (long row = 0; row < batch; row++) {
    TAKE(rows[row].token, int64_t, most)
    TAKE(rows[row].above, long, most)
    TAKE(rows[row].column, long, most)
    TAKE(rows[row].joint, double, most)
    TAKE(rows[row].order, long, most)
    TAKE(rows[row].frontier, long, g->width)
    rows[row].token[0] = g->pending[row];
    rows[row].column[0] = -1; /* the root's entry is a committed one */
  }
  level_nodes l;
  TAKE(l.tokens, int64_t, batch * columns)
  TAKE(l.depth, int64_t, batch * columns)
  TAKE(l.all_depths, int64_t, batch * columns)
  TAKE(l.seen, uint8_t, batch * columns * columns)
  TAKE(l.all_seen, uint8_t, batch * columns * columns)
  const bf16 *states = g->start;
  long nodes = 1, known = 0, first = -1, end = 1;
  for (long level = 1;; level++) {
    const long count = batch * nodes, new = end;
    rms_norm(states, h->norm, b.normed, count, d, h->eps, 1);
    multiply_draft(h->head, &b, b.normed, b.logits, count, cache->threads);
    top_arguments t = {b.logits, b.best, b.total, b.index, count, h->head->out_width, g->branching, sizeof(bf16)};
    top(&t, cache->threads);
    for (long row = 0; row < batch; row++) end = add_children(h, g, &b, rows + row, row, nodes, level, new);
    if (level == g->depth) break;
    const long before = nodes;
    const long widest = end - new < g->width ? end - new : g->width;
    for (long row = 0; row < batch; row++) pick_best(rows[row].joint, new, end, widest, rows[row].frontier);
    nodes = 0;
    for (long row = 0; row < batch && nodes < widest; row++) {
      const long promising = count_promising(rows, batch, row, widest, end, g);
      if (promising > nodes) nodes = promising;
    }
    if (!nodes) break;
    choose(h, cache, rows, &b, states, &l, nodes, before, columns, level, known, first);
    first = known;
    known += nodes;
    enter(h, cache, &b, b.gathered, l.tokens, l.depth, l.seen, nodes, known, b.states);
    states = b.states;
  }
#undef TAKE
  const long fit = end < g->most_nodes ? end : g->most_nodes;
  long count = 0;
  for (long row = 0; row < batch; row++) {
    const long possible = order_best(rows + row, end, fit);
    if (possible > count) count = possible;
  }
  for (long row = 0; row < batch; row++) write_best(g, rows + row, row, count);
  free(memory);
  return count;
}
