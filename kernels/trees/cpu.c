/* What the parents of a tree's nodes say of ancestors and depths, and whether they make a tree. Parents stand before their
   children, so one walk over the columns does it, where products of matrices take a dozen calls. */

#include <stddef.h>
#include <stdint.h>

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
