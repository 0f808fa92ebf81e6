"""Several prompts at once, several completions each: python examples/batch_sampling.py"""

from specdec import SpecDecoder

decoder = SpecDecoder("smollm2")
prompts = ["The best thing about winter is", "My favourite animal is the"]

for result in decoder.generate(prompts, n=2, max_new_tokens=24, temperature=0.8, top_p=0.9, seed=1, logprobs=True):
    mean = sum(result.logprobs) / len(result.logprobs)
    print(f"[{prompts[result.prompt_index]}] {result.text.strip()!r}")
    print(f"    {result.finish_reason}, mean log-probability {mean:.2f}, tau {result.stats.tau:.2f}")
print(f"all rows: {decoder.stats.emitted} tokens in {decoder.stats.passes} row passes")
