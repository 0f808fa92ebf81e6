/* Suffix automata of texts in flight and of finished ones, and trees that continue a text by what followed its longest
   suffixes. Trees are those of reference.py to the bit: transitions of a state keep the order in which they came, which
   decides among equals, and of numbers no product is added to anything, so there is nothing to fuse.

   Where there is no memory, functions say so and leave everything in a state that can be read and freed. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

enum { ROOT = -1, PADDING = -2, NONE = -1, MOST_COUNTED_SUFFIXES = 64, OWN_MATCHES = 2, MATCHES = OWN_MATCHES + 1 };

/* Items that grow in number, which is kept below 2^31. */
typedef struct {
  void *items;
  int64_t count, room;
} list;

/* The new last item; NULL where there is no memory. */
static void *append(list *all, size_t size) {
  if (all->count == all->room) {
    const int64_t room = all->room ? 2 * all->room : 16;
    void *moved = room > INT32_MAX ? NULL : realloc(all->items, (size_t)room * size);
    if (!moved) return NULL;
    all->items = moved, all->room = room;
  }
  return (char *)all->items + (size_t)all->count++ * size;
}

typedef struct {
  int64_t token;
  int32_t source, target;
  int32_t next; /* of the same source, the one that came after it */
} edge;

/* Edges, found by source and token. */
typedef struct {
  list all;
  int32_t *slots; /* a hash table of 1 + an edge's place, 0 where there is none; at most half of it is in use */
  uint64_t num_slots; /* a power of two */
} edges;

static uint64_t slot_of(const edges *e, int32_t source, int64_t token) {
  const uint64_t mixed = ((uint64_t)source * 0x9e3779b97f4a7c15u ^ (uint64_t)token) * 0xd6e8feb86659fd93u;
  return (mixed ^ mixed >> 32) & (e->num_slots - 1);
}

/* Valid until the next edge is added; NULL where there is none. */
static edge *find(const edges *e, int32_t source, int64_t token) {
  if (!e->num_slots) return NULL;
  for (uint64_t slot = slot_of(e, source, token); e->slots[slot]; slot = (slot + 1) & (e->num_slots - 1)) {
    edge *found = (edge *)e->all.items + e->slots[slot] - 1;
    if (found->token == token && found->source == source) return found;
  }
  return NULL;
}

static void enter(edges *e, int32_t at) {
  const edge *entered = (edge *)e->all.items + at;
  uint64_t slot = slot_of(e, entered->source, entered->token);
  while (e->slots[slot]) slot = (slot + 1) & (e->num_slots - 1);
  e->slots[slot] = at + 1;
}

/* An edge that was not there yet: its place, NONE where there is no memory. */
static int32_t add_edge(edges *e, int32_t source, int64_t token, int32_t target) {
  if (2 * (uint64_t)(e->all.count + 1) > e->num_slots) {
    const uint64_t more = e->num_slots ? 2 * e->num_slots : 32;
    int32_t *slots = calloc(more, sizeof *slots);
    if (!slots) return NONE;
    free(e->slots);
    e->slots = slots, e->num_slots = more;
    for (int32_t i = 0; i < e->all.count; i++) enter(e, i);
  }
  edge *added = append(&e->all, sizeof *added);
  if (!added) return NONE;
  *added = (edge){token, source, target, NONE};
  enter(e, (int32_t)(e->all.count - 1));
  return (int32_t)(e->all.count - 1);
}

/* Without giving back the memory. */
static void empty(edges *e) {
  e->all.count = 0;
  if (e->num_slots) __builtin_memset(e->slots, 0, e->num_slots * sizeof *e->slots);
}

static void free_edges(edges *e) {
  free(e->all.items);
  free(e->slots);
  *e = (edges){0};
}

/* See SuffixAutomaton. State 0 is there from the first token on. */
typedef struct {
  int64_t length, count;
  int32_t link, first, last; /* the suffix link, and the first and last edge from here */
} state;

typedef struct {
  list states;
  edges next;
} automaton;

static state *state_at(const automaton *a, int32_t at) { return (state *)a->states.items + at; }

static edge *edge_at(const automaton *a, int32_t at) { return (edge *)a->next.all.items + at; }

static int32_t new_state(automaton *a, int64_t length, int32_t link, int64_t count) {
  state *made = append(&a->states, sizeof *made);
  if (!made) return NONE;
  *made = (state){length, count, link, NONE, NONE};
  return (int32_t)(a->states.count - 1);
}

static int connect(automaton *a, int32_t source, int64_t token, int32_t target) {
  const int32_t made = add_edge(&a->next, source, token, target);
  if (made == NONE) return 0;
  state *from = state_at(a, source);
  if (from->first == NONE)
    from->first = made;
  else
    edge_at(a, from->last)->next = made;
  from->last = made;
  return 1;
}

/* A copy of `target` for the shorter strings that reach it through `source`. */
static int32_t split(automaton *a, int32_t source, int64_t token, int32_t target) {
  const state whole = *state_at(a, target);
  const int32_t clone = new_state(a, state_at(a, source)->length + 1, whole.link, whole.count);
  if (clone == NONE) return NONE;
  for (int32_t i = whole.first; i != NONE; i = edge_at(a, i)->next)
    if (!connect(a, clone, edge_at(a, i)->token, edge_at(a, i)->target)) return NONE;
  state_at(a, target)->link = clone;
  for (edge *e; source >= 0 && (e = find(&a->next, source, token)) && e->target == target;
       source = state_at(a, source)->link)
    e->target = clone;
  return clone;
}

/* Appends a token to the sequence that ends in state `last`, 0 to begin one: the state it ends in then. */
static int32_t extend(automaton *a, int32_t last, int64_t token) {
  if (!a->states.count && new_state(a, 0, ROOT, 0) == NONE) return NONE;
  const int64_t length = state_at(a, last)->length + 1;
  const edge *existing = find(&a->next, last, token);
  int32_t end;
  if (existing) { /* another sequence took this path before */
    end = existing->target;
    if (state_at(a, end)->length != length) end = split(a, last, token, end);
    if (end == NONE) return NONE;
  } else {
    end = new_state(a, length, 0, 0);
    if (end == NONE) return NONE;
    int32_t source = last;
    for (; source >= 0 && !(existing = find(&a->next, source, token)); source = state_at(a, source)->link)
      if (!connect(a, source, token, end)) return NONE;
    if (source >= 0) {
      int32_t target = existing->target;
      if (state_at(a, target)->length != state_at(a, source)->length + 1) target = split(a, source, token, target);
      if (target == NONE) return NONE;
      state_at(a, end)->link = target;
    }
  }
  int32_t suffix = end;
  for (int i = 0; i < MOST_COUNTED_SUFFIXES && suffix > 0; i++, suffix = state_at(a, suffix)->link)
    state_at(a, suffix)->count++; /* every suffix of the sequence occurs once more */
  return end;
}

/* Follows a text that is not part of the automaton, to the state of its longest known suffix. */
static void step(const automaton *a, int32_t *at, int64_t *matched, int64_t token) {
  const edge *found;
  while (!(found = find(&a->next, *at, token)) && *at > 0) {
    *at = state_at(a, *at)->link;
    if (state_at(a, *at)->length < *matched) *matched = state_at(a, *at)->length; /* it may have been split since */
  }
  *at = found ? found->target : 0;
  *matched = found ? *matched + 1 : 0;
}

static void clear(automaton *a) {
  free(a->states.items);
  a->states = (list){0};
  free_edges(&a->next);
}

/* A text in flight: its own automaton, where it ends in it, and where it stands in the corpus as that was in some era. */
typedef struct {
  automaton own;
  int32_t end, in_corpus;
  int64_t matched, era, last_token;
} text;

typedef struct {
  double chance;
  int64_t order, token, level;
  int32_t parent, at;
} waiting;

/* A node of a tree. */
typedef struct {
  int64_t token;
  double chance; /* to be accepted */
  int32_t parent;
} node;

/* A tree grown from one match, with the sum of its nodes' estimated acceptance. */
typedef struct {
  double score;
  int64_t first, count; /* of its nodes among those grown; their parents: 0 is the root, others count from 1 */
} candidate;

typedef struct {
  double nodes_per_match, min_probability;
  int64_t max_nodes, corpus_tokens;
  automaton finished;       /* of finished texts */
  int64_t era;              /* how often it started anew */
  list heap, grown, places; /* memory to work in */
  edges children;           /* of the tree that is being made */
  list nodes, ends;         /* those of the trees made last, and where among them each one ends */
} corpus;

static int before(const waiting *a, const waiting *b) {
  return a->chance != b->chance ? a->chance > b->chance : a->order < b->order;
}

static int push(list *heap, waiting pushed) {
  if (!append(heap, sizeof pushed)) return 0;
  waiting *all = heap->items;
  int64_t at = heap->count - 1;
  for (; at && before(&pushed, &all[(at - 1) / 2]); at = (at - 1) / 2) all[at] = all[(at - 1) / 2];
  all[at] = pushed;
  return 1;
}

static waiting pop(list *heap) {
  waiting *all = heap->items;
  const waiting first = all[0], moved = all[--heap->count];
  int64_t at = 0;
  for (int64_t child; (child = 2 * at + 1) < heap->count; at = child) {
    if (child + 1 < heap->count && before(&all[child + 1], &all[child])) child++;
    if (!before(&all[child], &moved)) break;
    all[at] = all[child];
  }
  all[at] = moved;
  return first;
}

/* What may follow a state, by the share of its occurrences that went on this way. */
static int push_children(corpus *s, const automaton *a, int32_t of, int32_t parent, double probability, int64_t level,
                         int64_t *order) {
  int64_t followed = 0;
  for (int32_t i = state_at(a, of)->first; i != NONE; i = edge_at(a, i)->next)
    followed += state_at(a, edge_at(a, i)->target)->count;
  for (int32_t i = state_at(a, of)->first; i != NONE; i = edge_at(a, i)->next) {
    const edge *e = edge_at(a, i);
    const double chance = probability * (double)state_at(a, e->target)->count / (double)followed;
    if (chance >= s->min_probability && !push(&s->heap, (waiting){chance, ++*order, e->token, level, parent, e->target}))
      return 0;
  }
  return 1;
}

/* Grows a candidate best-first. */
static int grow(corpus *s, const automaton *a, int32_t at, int64_t matched, int64_t depth, candidate *made) {
  const double length = (double)matched, trusted = s->nodes_per_match * length;
  int64_t budget = s->max_nodes - 1, order = 0;
  if (trusted < (double)budget) budget = trusted < 1 ? 1 : (int64_t)trusted;
  *made = (candidate){0, s->grown.count, 0};
  s->heap.count = 0;
  if (depth > 0 && !push_children(s, a, at, 0, 1, 1, &order)) return 0;
  while (s->heap.count && made->count < budget) {
    const waiting best = pop(&s->heap);
    node *grown = append(&s->grown, sizeof *grown);
    if (!grown) return 0;
    *grown = (node){best.token, best.chance * length / (double)(matched + best.level), best.parent};
    made->count++;
    made->score += best.chance;
    if (best.level < depth && !push_children(s, a, best.at, (int32_t)made->count, best.chance, best.level + 1, &order))
      return 0;
  }
  made->score = made->score * length / (length + 1);
  return 1;
}

/* Adds a candidate's nodes to a tree that may hold some of them already; of two chances the better one counts. */
static int merge(corpus *s, const candidate *merged, int64_t first) {
  s->places.count = 0;
  int32_t *place = append(&s->places, sizeof *place);
  if (!place) return 0;
  *place = 0;
  for (int64_t i = merged->first; i < merged->first + merged->count; i++) {
    const node grown = ((node *)s->grown.items)[i];
    const int32_t parent = ((int32_t *)s->places.items)[grown.parent];
    int32_t at = NONE;
    const edge *known = parent == NONE ? NULL : find(&s->children, parent, grown.token);
    if (known)
      at = known->target;
    else if (parent != NONE && s->nodes.count - first < s->max_nodes) {
      at = (int32_t)(s->nodes.count - first);
      node *added = append(&s->nodes, sizeof *added);
      if (!added || add_edge(&s->children, parent, grown.token, at) == NONE) return 0;
      *added = (node){grown.token, 0, parent};
    }
    if (!(place = append(&s->places, sizeof *place))) return 0;
    *place = at;
    if (at == NONE) continue;
    node *held = (node *)s->nodes.items + first + at;
    if (grown.chance > held->chance) held->chance = grown.chance;
  }
  return 1;
}

/* A text's tree: what its two longest suffixes that occur earlier in it and its longest one of the corpus promise, the
   best of them first. */
static int draw(corpus *s, const text *t, int64_t depth) {
  candidate all[MATCHES];
  int count = 0;
  s->grown.count = 0;
  int32_t at = t->own.states.count ? state_at(&t->own, t->end)->link : ROOT;
  for (; at > 0 && count < OWN_MATCHES; at = state_at(&t->own, at)->link)
    if (!grow(s, &t->own, at, state_at(&t->own, at)->length, depth, &all[count++])) return 0;
  if (t->matched && !grow(s, &s->finished, t->in_corpus, t->matched, depth, &all[count++])) return 0;
  for (int i = 1; i < count; i++) { /* equals keep their order */
    const candidate moved = all[i];
    int to = i;
    for (; to && all[to - 1].score < moved.score; to--) all[to] = all[to - 1];
    all[to] = moved;
  }
  const int64_t first = s->nodes.count;
  node *root = append(&s->nodes, sizeof *root);
  if (!root) return 0;
  *root = (node){t->last_token, 1, ROOT};
  empty(&s->children);
  for (int i = 0; i < count; i++)
    if (!merge(s, &all[i], first)) return 0;
  int64_t *end = append(&s->ends, sizeof *end);
  if (end) *end = s->nodes.count;
  return end != NULL;
}

/* NULL where there is no memory, as of suffix_begin. */
corpus *suffix_new(int64_t max_nodes, double nodes_per_match, double min_probability, int64_t corpus_tokens) {
  corpus *s = calloc(1, sizeof *s);
  if (s)
    s->max_nodes = max_nodes, s->nodes_per_match = nodes_per_match, s->min_probability = min_probability,
    s->corpus_tokens = corpus_tokens;
  return s;
}

void suffix_free(corpus *s) {
  clear(&s->finished);
  free_edges(&s->children);
  const list *lists[] = {&s->heap, &s->grown, &s->places, &s->nodes, &s->ends};
  for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) free(lists[i]->items);
  free(s);
}

text *suffix_begin(void) { return calloc(1, sizeof(text)); }

void suffix_end(text *ended) {
  clear(&ended->own);
  free(ended);
}

/* Makes a tree for each of `count` texts. `asked`: of each its address, its tree's depth, how many new tokens it has, and
   these. Returns the nodes of the largest tree, NONE where there is no memory. */
int64_t suffix_draft(corpus *s, const int64_t *asked, int64_t count) {
  int64_t most = 0;
  s->nodes.count = s->ends.count = 0;
  for (int64_t i = 0; i < count; i++) {
    text *t = (text *)(intptr_t)asked[0];
    const int64_t depth = asked[1], fresh = asked[2], held = s->nodes.count;
    asked += 3;
    if (t->era != s->era) t->era = s->era, t->in_corpus = 0, t->matched = 0;
    for (const int64_t *stop = asked + fresh; asked < stop; asked++) {
      const int32_t end = extend(&t->own, t->end, *asked);
      if (end == NONE) return NONE;
      t->end = end;
      t->last_token = *asked;
      step(&s->finished, &t->in_corpus, &t->matched, *asked);
    }
    if (!draw(s, t, depth)) return NONE;
    if (s->nodes.count - held > most) most = s->nodes.count - held;
  }
  return most;
}

/* The trees made last, `width` columns each: tokens, parents and chances. */
void suffix_read(const corpus *s, int64_t width, int64_t *tokens, int64_t *parents, float *chances) {
  const node *at = s->nodes.items, *first = at;
  for (int64_t i = 0; i < s->ends.count; i++) {
    const node *end = first + ((int64_t *)s->ends.items)[i];
    for (int64_t column = 0; column < width; column++, tokens++, parents++, chances++)
      if (at < end)
        *tokens = at->token, *parents = at->parent, *chances = (float)at->chance, at++;
      else
        *tokens = 0, *parents = PADDING, *chances = 0;
  }
}

/* Takes in a finished text that is not too long. Returns 0 where there is no memory. */
int suffix_remember(corpus *s, const int64_t *tokens, int64_t count) {
  if (count > s->corpus_tokens) return 1;
  if (s->finished.states.count > 2 * s->corpus_tokens) clear(&s->finished), s->era++;
  int32_t last = 0;
  for (int64_t i = 0; i < count; i++) {
    last = extend(&s->finished, last, tokens[i]);
    if (last == NONE) return 0;
  }
  return 1;
}
