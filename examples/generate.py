"""Generate with a drafter, and look at what it did: python examples/generate.py"""

from specdec import SamplingParams, SpecDecoder

decoder = SpecDecoder("smollm2", "ngram")  # `specdec list` shows the other drafters

result = decoder.generate("The capital of France is", max_new_tokens=32)
print(result.text)
print(f"{result.finish_reason}; {result.stats.tau:.2f} tokens per target pass")

# The same seed gives the same text with every drafter, "none" included.
params = SamplingParams(max_new_tokens=32, temperature=0.8, top_p=0.95, seed=7)
print(decoder.generate("Once upon a time", params).text)
