"""A chat of two turns, streamed; the second turn prefills only what is new: python examples/chat_stream.py"""

from specdec import SpecDecoder
from specdec.conversation import Conversation

conversation = Conversation(SpecDecoder("smollm2"), system="You answer in one short sentence.")

for question in ("What is photosynthesis?", "Which gas does it need?"):
    print(f"> {question}")
    with conversation.send(question, max_new_tokens=48) as stream:
        for piece in stream:  # piece.from_draft: drafted and accepted
            print(piece, end="", flush=True)
    print(f"\n  ({stream.stats.tau:.2f} tokens per target pass)")
