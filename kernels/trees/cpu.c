/* What the parents of a tree's nodes say of ancestors and depths. Parents stand before their children, so one walk over
   the columns does it, where products of matrices take a dozen calls. */

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
