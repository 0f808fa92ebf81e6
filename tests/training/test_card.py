"""The model card says what, how, on what; and nothing a user wrote can steer it."""

from __future__ import annotations

from specdec.training.card import make_card

FACTS = {
    "drafter": "medusa",
    "target": "smollm2",
    "dtype": "bfloat16",
    "options": {"heads": 4},
    "commit": "abc123",
    "texts": {"count": 10, "held_out": 1, "reply_tokens": 2000, "sha256": "ff" * 32, "data": None},
    "held_out": {"loss": 1.5, "acceptance": [0.6, 0.25], "positions": [100, 90], "expected_tau": 1.75},
    "curve": [{"step": 5, "tokens": 50, "held_out_loss": None, "acceptance": [0.5], "expected_tau": 1.5}],
}


def test_it_says_what_how_and_on_what() -> None:
    card = make_card(FACTS)
    for part in (
        "# medusa drafter for smollm2",
        "--drafter medusa",
        "| 1 | 0.600 | 100 |",
        "| 2 | 0.250 | 90 |",
        "1.75 tokens per target pass: an estimate",
        "The target wrote all of it",
        "| tokens of replies | 2000 |",
        "ff" * 32,
        "| commit | abc123 |",
        "| options.heads | 4 |",
        "| 5 | 50 | - | 0.500 | 1.500 |",
        "whose licence applies",
    ):
        assert part in card, part


def test_what_users_named_is_shown_not_obeyed() -> None:
    texts = {**FACTS["texts"], "data": {"name": "a|b\n# <script>`x`.jsonl", "sha256": "0"}}  # type: ignore[dict-item]
    card = make_card({**FACTS, "target": "m\n## Forged\x1b[31m", "texts": texts})
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "\n## Forged" not in card
    assert "a\\|b \\# &lt;script&gt;\\`x\\`.jsonl" in card


def test_the_weights_it_went_on_from_are_said_back_to_the_first() -> None:
    first = {"commit": "first|", "texts": {"reply_tokens": 300, "sha256": "aa"}, "tokens": 900}
    card = make_card({**FACTS, "start": {"commit": "second", "texts": {"reply_tokens": 600}, "start": first}})
    rows = card.partition("## Went on from")[2].partition("## How")[0].strip().splitlines()[-2:]
    assert rows == ["| second | 600 | ? | ? |", "| first\\| | 300 | 900 | aa |"]
    for start in (None, {}):
        assert "Went on from" not in make_card({**FACTS, "start": start})


def test_what_was_measured_is_said_with_how() -> None:
    how = {"questions": {"name": "mt|bench", "count": 80}, "commit": "def456"}
    card = make_card({**FACTS, "measured": {"tokens_per_pass": 2.625, **how}})
    section = card.partition("## Measured")[2].partition("## ")[0]
    assert "\n2.625 tokens per target pass.\n" in section
    assert "| questions.name | mt\\|bench |" in section
    assert "| commit | def456 |" in section
    for measured in (None, {}, how):
        assert "Measured" not in make_card({**FACTS, "measured": measured})


def test_it_says_that_the_curves_last_row_is_of_more_text_than_the_others() -> None:
    card = make_card({**FACTS, "trainer": {"evaluation_tokens": 50}})
    section = card.partition("## Learning curve")[2].partition("## ")[0]
    said = "on all held-out texts (100 positions), those above on the first 50 tokens of them"
    assert said in section
    assert section.index(said) < section.index("| step |")
    assert "The last row" not in make_card(FACTS)
    assert "The last row" not in make_card({**FACTS, "trainer": {"evaluation_tokens": 50}, "curve": ()})


def test_little_is_enough() -> None:
    card = make_card({})
    assert card.startswith("# ? drafter for ?")
    assert "Held-out" not in card
