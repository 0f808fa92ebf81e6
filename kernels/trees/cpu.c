/* What the parents of a tree's nodes say of ancestors and depths, whether they make a tree, and which nodes of several trees
   are the most promising. Parents stand before their children, so one walk over the columns does it, where products of
   matrices take a dozen calls. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

void tree_shape(const int64_t *parents, long rows, long nodes, uint8_t *ancestors, int64_t *depth) {
  for (long row = 0; row < rows; row++, parents += nodes, depth += nodes)
    for (long i = 0; i < nodes; i++, ancestors += nodes) {
      int64_t parent = parents[i];
      int root = parent < 0 || parent >= i;
      if (root)
        __builtin_memset(ancestors, 0, (size_t)nodes);
      else
        __builtin_memcpy(ancestors, ancestors - (i - parent) * nodes, (size_t)nodes);
      ancestors[i] = 1;
      depth[i] = root ? 0 : depth[parent] + 1;
    }
}

enum { ROOT = -1, PADDING = -2 };

/* Whether column 0 alone is a root, other nodes hang on an earlier column that is no padding, and tokens but those of
   padding are in the vocabulary. */
int is_tree(const int64_t *tokens, const int64_t *parents, long rows, long nodes, int64_t vocab_size) {
  for (long row = 0; row < rows; row++, tokens += nodes, parents += nodes)
    for (long i = 0; i < nodes; i++) {
      const int64_t parent = parents[i];
      if (i && parent == PADDING) continue;
      if (i ? parent < 0 || parent >= i || parents[parent] == PADDING : parent != ROOT) return 0;
      if (tokens[i] < 0 || tokens[i] >= vocab_size) return 0;
    }
  return 1;
}

/* Of each row: nodes below the root, and the depth of the deepest. */
void count_drafts(const int64_t *parents, const int64_t *depth, long rows, long nodes, int64_t *counts) {
  for (long row = 0; row < rows; row++, parents += nodes, depth += nodes, counts += 2) {
    counts[0] = counts[1] = 0;
    for (long i = 0; i < nodes; i++) {
      counts[0] += parents[i] >= 0;
      if (parents[i] >= 0 && depth[i] > counts[1]) counts[1] = depth[i];
    }
  }
}

typedef struct {
  float chance;
  long at;
} candidate;

/* The likelier ones first, of equals the earlier one. */
static int in_order(const void *left, const void *right) {
  const candidate *a = left, *b = right;
  return a->chance != b->chance ? (a->chance < b->chance ? 1 : -1) : (a->at > b->at) - (a->at < b->at);
}

/* Every node's place among those of all rows, counted per row: roots first, then by how likely the least likely node on
   the way to each is, column by column, padding last. `memory`: a candidate for every node. */
void standing(const int64_t *parents, const float *confidence, long rows, long nodes, void *memory, int64_t *places) {
  candidate *all = memory;
  for (long row = 0; row < rows; row++) {
    for (long i = 0; i < nodes; i++) {
      const int64_t parent = parents[row * nodes + i];
      float chance = parent == PADDING ? -INFINITY : confidence[row * nodes + i];
      if (chance != chance) chance = 0; /* NaN has no place in an order */
      if (parent >= 0 && all[parent * rows + row].chance < chance) chance = all[parent * rows + row].chance;
      all[i * rows + row] = (candidate){chance, i * rows + row};
    }
    all[row].chance = INFINITY; /* the root's */
  }
  qsort(all, (size_t)(rows * nodes), sizeof *all, in_order);
  for (long place = 0; place < rows * nodes; place++)
    places[all[place].at % rows * nodes + all[place].at / rows] = place / rows;
}

/* Keeps the nodes that stand before `count`, each row's moved up; parents, which are kept where their children are, are
   told by their new columns. `out`: tokens, parents and confidence, [rows, nodes] each. Returns the columns in use. */
long keep_best(const int64_t *tokens, const int64_t *parents, const float *confidence, const int64_t *places, long rows,
               long nodes, long count, int64_t *out_tokens, int64_t *out_parents, float *out_confidence, int64_t *moved) {
  long most = 0;
  for (long row = 0; row < rows; row++) {
    const long first = row * nodes;
    long kept = 0;
    for (long i = 0; i < nodes; i++) {
      if (parents[first + i] == PADDING || places[first + i] >= count) continue;
      const int64_t parent = parents[first + i];
      moved[i] = kept;
      out_tokens[first + kept] = tokens[first + i];
      out_parents[first + kept] = parent < 0 ? parent : moved[parent];
      out_confidence[first + kept++] = confidence[first + i];
    }
    if (kept > most) most = kept;
    for (; kept < nodes; kept++)
      out_tokens[first + kept] = 0, out_parents[first + kept] = PADDING, out_confidence[first + kept] = 0;
  }
  return most;
}
