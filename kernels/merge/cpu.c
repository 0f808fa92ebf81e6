/* Trees of several drafters as one per row: equal tokens under equal parents are one node. Nodes are scored by what was
   learnt of each drafter, the best of all rows are chosen, and what the target said then is learnt.

   Numbers are those of drafters/hybrid_tree.py and drafters/hybrid_calibration.py to the bit, constants too: every operation
   is done in the order it has there, comparisons with NaN included, and none is fused with another (COMPILE in __init__.py).

   What is learnt lies in the caller's memory, all zero before anything was seen. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

enum { PADDING = -2, CLASSES = 11, DEEPEST = 6, LAST_RANK = 3, MOST_PARTS = 4, MOST_CHOICES = 64 };

static const double LEAST = 1e-4, MOST = 0.98;
static const double EDGES[CLASSES - 1] = {0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97};
static const double RANKS[] = {0.45, 0.15, 0.08, 0.05, 0.03};

static inline long least_of(long a, long b) { return b < a ? b : a; }

/* What is learnt: hits and misses, observed and claimed. */

typedef struct {
  double hits, misses, claimed_hits, claimed_misses;
} odds;

typedef struct {
  double strength, memory;
} manner;

static const manner SLOW = {6.0, 0.998}, OF_A_ROW = {4.0, 0.97};

static inline double bounded(double chance) {
  chance = LEAST > chance ? LEAST : chance;
  return MOST < chance ? MOST : chance;
}

static double correct(const odds *seen, manner how, double chance) {
  double up = chance * (seen->hits + how.strength) / (seen->claimed_hits + how.strength);
  double down = (1.0 - chance) * (seen->misses + how.strength) / (seen->claimed_misses + how.strength);
  return bounded(up / (up + down));
}

static void see(odds *seen, manner how, double chance, int hit) {
  seen->hits = how.memory * seen->hits + hit;
  seen->misses = how.memory * seen->misses + !hit;
  seen->claimed_hits = how.memory * seen->claimed_hits + chance;
  seen->claimed_misses = how.memory * seen->claimed_misses + 1.0 - chance;
}

static long class_of(double chance) {
  long found = 0;
  while (found < CLASSES - 1 && !(chance < EDGES[found])) found++;
  return found;
}

/* Of one drafter. */
typedef struct {
  odds by_confidence[CLASSES], by_place[DEEPEST + 1][LAST_RANK + 1];
} part_odds;

/* Doubles of a calibration: of each drafter, then by who proposed a node, who only its siblings, and the class. */
long merge_size(long parts) {
  size_t agreement = ((size_t)CLASSES << 2 * parts) * sizeof(odds);
  return (long)((parts * sizeof(part_odds) + agreement) / sizeof(double));
}

/* Trees. */

typedef struct {
  int part;
  long rank;
  double confidence; /* NaN: none */
} proposal;

typedef struct {
  int64_t token;
  long parent, depth, first, last, next; /* first and last child, next sibling; 0: none */
  long proposals, column;
  proposal said[MOST_PARTS]; /* in the order they came */
  unsigned proposers;
  uint64_t chosen; /* a bit per choice */
  double claim, chance, joint;
} node;

typedef struct {
  double joint;
  long place, row; /* in the tree, or in the row's order */
} candidate;

typedef struct {
  node *nodes;
  candidate *order; /* the best nodes, of which `taken` are chosen */
  long count, room, ordered, taken, max_depth;
  odds *row;
} tree;

typedef struct {
  long rows, stored, parts, choices, num_ranked, ranked_room;
  tree **row;
  tree *storage;
  part_odds *part;
  odds *agreement;
  candidate *ranked; /* nodes of all rows but the roots, the best first */
} merged;

static int reserve(tree *of, long more) {
  if (of->count + more <= of->room) return 1;
  long room = of->count + more + 32;
  node *nodes = realloc(of->nodes, (size_t)room * sizeof *nodes);
  if (nodes) of->nodes = nodes;
  candidate *order = realloc(of->order, (size_t)room * sizeof *order);
  if (order) of->order = order;
  if (!nodes || !order) return 0;
  of->room = room;
  return 1;
}

static node *enter(tree *of, int64_t token, long parent, long depth) {
  node *new = &of->nodes[of->count++];
  *new = (node){.token = token, .parent = parent, .depth = depth, .claim = 1.0, .chance = 1.0, .joint = 1.0};
  return new;
}

void merge_free(merged *all) {
  if (!all) return;
  for (long i = 0; all->storage && i < all->stored; i++) free(all->storage[i].nodes), free(all->storage[i].order);
  free(all->storage), free(all->row), free(all->ranked), free(all);
}

/* Trees of roots alone, which are choice 0. `row_odds`: of each row, an odds per drafter. NULL without memory. */
merged *merge_new(long rows, long parts, const int64_t *pending, const int64_t *max_depth, void *calibration,
                  void *const *row_odds) {
  merged *all = calloc(1, sizeof *all);
  if (!all) return NULL;
  all->rows = all->stored = rows, all->parts = parts, all->choices = 1;
  all->part = calibration, all->agreement = (odds *)(all->part + parts);
  all->row = calloc((size_t)rows, sizeof *all->row), all->storage = calloc((size_t)rows, sizeof *all->storage);
  int made = all->row && all->storage;
  for (long i = 0; made && i < rows; i++) {
    tree *of = all->row[i] = &all->storage[i];
    of->max_depth = max_depth[i], of->row = row_odds[i];
    made = reserve(of, 1);
    if (!made) break;
    enter(of, pending[i], -1, 0)->chosen = 1;
    of->order[0] = (candidate){1.0, 0, 0}, of->ordered = of->taken = 1;
  }
  if (made) return all;
  merge_free(all);
  return NULL;
}

static long child_with(const tree *of, long above, int64_t token) {
  long child = of->nodes[above].first;
  while (child && of->nodes[child].token != token) child = of->nodes[child].next;
  return child;
}

static long child_of(tree *of, long above, int64_t token) {
  long child = child_with(of, above, token);
  if (child) return child;
  child = of->count;
  enter(of, token, above, of->nodes[above].depth + 1);
  node *parent = &of->nodes[above];
  if (parent->first)
    of->nodes[parent->last].next = child;
  else
    parent->first = child;
  parent->last = child;
  return child;
}

/* A drafter proposes a node; what it said first counts. */
static void propose(tree *of, long at, int part, double confidence) {
  node *proposed = &of->nodes[at];
  if (proposed->proposers >> part & 1) return;
  long rank = 0;
  for (long child = of->nodes[proposed->parent].first; child; child = of->nodes[child].next)
    rank += of->nodes[child].proposers >> part & 1;
  proposed->said[proposed->proposals++] = (proposal){part, rank, confidence};
  proposed->proposers |= 1u << part;
}

/* The steps of a drafter's calibration for a node: a first claim, and the odds that correct it one after the other. */
static double claim_of(const merged *all, const node *of, const proposal *said, odds *steps[2]) {
  part_odds *known = &all->part[said->part];
  double chance = said->confidence;
  if (chance != chance) chance = RANKS[least_of(said->rank, sizeof RANKS / sizeof *RANKS - 1)];
  chance = bounded(chance);
  steps[0] = &known->by_confidence[class_of(chance)];
  steps[1] = &known->by_place[least_of(of->depth, DEEPEST)][least_of(said->rank, LAST_RANK)];
  return chance;
}

static double chance_of(const merged *all, const node *of, const proposal *said) {
  odds *steps[2];
  double claim = claim_of(all, of, said, steps);
  for (int i = 0; i < 2; i++) claim = correct(steps[i], SLOW, claim);
  return claim;
}

/* Odds where several drafters spoke on one place, else NULL. */
static odds *agreement_of(const merged *all, const node *of, unsigned spoke) {
  if (!(spoke & (spoke - 1))) return NULL;
  return &all->agreement[((of->proposers << all->parts) + (spoke & ~of->proposers)) * CLASSES + class_of(of->claim)];
}

static unsigned who_spoke(const tree *of, const node *above) {
  unsigned spoke = 0;
  for (long child = above->first; child; child = of->nodes[child].next) spoke |= of->nodes[child].proposers;
  return spoke;
}

/* Parents come before their children. */
static void score(const merged *all, tree *of) {
  for (long at = 0; at < of->count; at++) {
    const node *above = &of->nodes[at];
    if (!above->first) continue;
    const unsigned spoke = who_spoke(of, above);
    double total = 0.0;
    for (long child = above->first; child; child = of->nodes[child].next) {
      node *below = &of->nodes[child];
      double none = 1.0;
      for (long i = 0; i < below->proposals; i++) {
        const proposal *said = &below->said[i];
        none *= 1.0 - correct(&of->row[said->part], OF_A_ROW, chance_of(all, below, said));
      }
      below->claim = 1.0 - none;
      if (MOST < below->claim) below->claim = MOST;
      total += below->claim;
    }
    const double share = MOST / total < 1.0 ? MOST / total : 1.0; /* only one of them can be right */
    for (long child = above->first; child; child = of->nodes[child].next) {
      node *below = &of->nodes[child];
      below->claim *= share;
      const odds *agreed = agreement_of(all, below, spoke);
      below->chance = agreed ? correct(agreed, SLOW, below->claim) : below->claim;
      below->joint = above->joint * below->chance;
    }
  }
}

/* Merges a drafter's trees, [rows, columns] each, confidence NULL where it gives none, and scores all nodes anew. Returns
   0 where one is not rooted at its row's pending token, -1 without memory. */
int merge_add(merged *all, int part, const int64_t *tokens, const int64_t *parents, const float *confidence,
              long columns) {
  for (long i = 0; i < all->rows; i++)
    if (tokens[i * columns] != all->row[i]->nodes[0].token) return 0;
  long *place = malloc((size_t)columns * sizeof *place); /* column -> node */
  if (!place) return -1;
  place[0] = 0;
  for (long i = 0; i < all->rows; i++, tokens += columns, parents += columns) {
    tree *of = all->row[i];
    if (!reserve(of, columns)) return free(place), -1;
    for (long column = 1; column < columns; column++) {
      const int64_t parent = parents[column];
      const long above = parent < 0 || parent >= column ? -1 : place[parent];
      place[column] = -1;
      if (above < 0 || of->nodes[above].depth >= of->max_depth) continue;
      place[column] = child_of(of, above, tokens[column]);
      double given = NAN;
      if (confidence) {
        const double base = confidence[i * columns + parent];
        given = confidence[i * columns + column] / (1e-9 > base ? 1e-9 : base);
      }
      propose(of, place[column], part, given);
    }
    score(all, of);
  }
  free(place);
  return 1;
}

/* The likelier ones first, of equals the one that stands further in front. */
static int in_order(const void *left, const void *right) {
  const candidate *a = left, *b = right;
  if (a->joint != b->joint) return a->joint < b->joint ? 1 : -1;
  return a->place != b->place ? (a->place > b->place) - (a->place < b->place) : (a->row > b->row) - (a->row < b->row);
}

/* Ranks the best nodes of each row, at most `max_nodes` with the root and none less likely than `least`, and those of all
   rows but the roots against each other. Writes the chances of the first `most`; returns how many nodes there are, -1
   without memory. */
long merge_rank(merged *all, long max_nodes, double least, long most, double *chances) {
  long total = 0;
  for (long i = 0; i < all->rows; i++) total += least_of(all->row[i]->count, max_nodes) - 1;
  if (total > all->ranked_room) {
    candidate *ranked = realloc(all->ranked, (size_t)total * sizeof *ranked);
    if (!ranked) return -1;
    all->ranked = ranked, all->ranked_room = total;
  }
  all->num_ranked = 0;
  for (long i = 0; i < all->rows; i++) {
    tree *of = all->row[i];
    for (long at = 0; at < of->count; at++) of->order[at] = (candidate){of->nodes[at].joint, at, 0};
    qsort(of->order, (size_t)of->count, sizeof *of->order, in_order);
    of->ordered = of->taken = 1;
    for (long place = 1; place < of->count && place < max_nodes && of->order[place].joint >= least; place++, of->ordered++)
      all->ranked[all->num_ranked++] = (candidate){of->order[place].joint, place, i};
  }
  if (all->num_ranked) qsort(all->ranked, (size_t)all->num_ranked, sizeof *all->ranked, in_order);
  for (long i = 0; i < all->num_ranked && i < most; i++) chances[i] = all->ranked[i].joint;
  return all->num_ranked;
}

/* Chooses the first `count` ranked nodes beside the roots. Writes, of each row, how many nodes these are and how many of
   them are expected to be accepted. */
void merge_choose(merged *all, long count, int64_t *sizes, double *expected) {
  for (long i = 0; i < all->num_ranked && i < count; i++) all->row[all->ranked[i].row]->taken++;
  for (long i = 0; i < all->rows; i++) {
    tree *of = all->row[i];
    double total = 0.0;
    for (long place = 0; place < of->taken; place++) {
      total += of->order[place].joint;
      of->nodes[of->order[place].place].chosen |= (uint64_t)1 << all->choices;
    }
    sizes[i] = of->taken, expected[i] = total - 1.0;
  }
  all->choices++;
}

/* The nodes chosen last, the best first, padded at the end: [rows, width] each. */
void merge_columns(merged *all, long width, int64_t *tokens, int64_t *parents, float *confidence) {
  for (long i = 0; i < all->rows; i++, tokens += width, parents += width, confidence += width) {
    tree *of = all->row[i];
    for (long place = 0; place < width; place++) {
      tokens[place] = 0, parents[place] = PADDING, confidence[place] = 0.0f;
      if (place >= of->taken) continue;
      node *chosen = &of->nodes[of->order[place].place];
      chosen->column = place;
      tokens[place] = chosen->token, confidence[place] = (float)chosen->joint;
      parents[place] = chosen->parent < 0 ? -1 : of->nodes[chosen->parent].column;
    }
  }
}

/* Keeps these rows alone, in the order given. Returns 0 without memory. */
int merge_keep(merged *all, const int64_t *rows, long count) {
  tree **kept = malloc((size_t)(count ? count : 1) * sizeof *kept);
  if (!kept) return 0;
  for (long i = 0; i < count; i++) kept[i] = all->row[rows[i]];
  free(all->row);
  all->row = kept, all->rows = count;
  return 1;
}

static void learn_node(const merged *all, const tree *of, const node *child, unsigned spoke, int hit) {
  odds *agreed = agreement_of(all, child, spoke);
  if (agreed) see(agreed, SLOW, child->claim, hit);
  for (long i = 0; i < child->proposals; i++) {
    const proposal *said = &child->said[i];
    odds *steps[2];
    see(&of->row[said->part], OF_A_ROW, chance_of(all, child, said), hit);
    double claim = claim_of(all, child, said, steps);
    for (int step = 0; step < 2; step++) {
      const double corrected = correct(steps[step], SLOW, claim);
      see(steps[step], SLOW, claim, hit);
      claim = corrected;
    }
  }
}

/* The target went this way from each root: all children of the nodes on it were right or wrong. `tokens`: of all rows, one
   after the other. Writes [choices, rows] how many tokens each choice would have had accepted. */
void merge_learn(merged *all, const int64_t *tokens, const int64_t *lengths, int64_t *accepted) {
  for (long i = 0; i < all->choices * all->rows; i++) accepted[i] = 0;
  for (long i = 0; i < all->rows; tokens += lengths[i++]) {
    const tree *of = all->row[i];
    uint64_t within = ~(uint64_t)0; /* choices that hold the way so far */
    for (long at = 0, step = 0; step < lengths[i]; step++) {
      const node *above = &of->nodes[at];
      const unsigned spoke = who_spoke(of, above);
      for (long child = above->first; child; child = of->nodes[child].next)
        learn_node(all, of, &of->nodes[child], spoke, of->nodes[child].token == tokens[step]);
      at = child_with(of, at, tokens[step]);
      if (!at) break;
      within &= of->nodes[at].chosen;
      for (long choice = 0; choice < all->choices; choice++) accepted[choice * all->rows + i] += within >> choice & 1;
    }
  }
}
