"""A drafter of one's own, used as an object: python examples/custom_drafter.py

To use it by name (`specdec generate -d bigram -o depth=6`), name it in your package's pyproject.toml:

    [project.entry-points."specdec.drafters"]
    bigram = "your_package:BigramDrafter"
"""

from dataclasses import dataclass

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.tree import TokenTree, TreeBuilder


@dataclass(frozen=True)
class BigramConfig:
    """Options of the bigram drafter.

    Attributes:
        depth: tokens proposed per step.
    """

    depth: int = 4


class BigramDrafter(Drafter):
    """Proposes for each token what followed it last time."""

    name = "bigram"
    Config = BigramConfig

    def __init__(self, config: BigramConfig | None = None) -> None:
        self.config = config or BigramConfig()

    def propose(self, batch: Batch) -> TokenTree:
        builders = []
        for row in batch.rows:
            follower = dict(zip(row.tokens, row.tokens[1:], strict=False))
            path, token = [], row.pending
            while len(path) < self.config.depth and token in follower:
                token = follower[token]
                path.append(token)
            builder = TreeBuilder(row.pending, max_nodes=1 + self.config.depth)
            builder.add_path(path)
            builders.append(builder)
        return TokenTree.from_rows(builders, batch.device)


if __name__ == "__main__":
    prompt = [
        {"role": "user", "content": "Write Python functions add, subtract, multiply and divide, each with a docstring."}
    ]
    result = SpecDecoder("smollm2", BigramDrafter()).chat(prompt, max_new_tokens=96)
    plain = SpecDecoder("smollm2", "none").chat(prompt, max_new_tokens=96)
    print(result.text)
    print(f"{result.stats.tau:.2f} tokens per target pass; same text as without: {result.text == plain.text}")
