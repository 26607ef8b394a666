"""What bare vLLM takes for the two turns of benchmarks/peers/turns.yaml: a floor for any actor.

    python -m benchmarks.actors.bare_turns

A batch of first turns, eight samples of a prompt as one request, then a batch of second ones for those that
called the calculator, which answers the same to all at once: no environment, seed, text or weights between.
CPU milliseconds of the process a sample are printed; other programs hardly change them.
"""

from __future__ import annotations

import time
from pathlib import Path

from actors.dialogue import Dialogue
from actors.engine_settings import engine_arguments, set_engine_environment
from actors.prompts import load_prompts
from cluster.preparation.prepare import ensure_model
from core.tokenizer import end_token_ids, load_tokenizer
from environments.spec import describe
from learner.catalogue import load_config

CONFIG_PATH = Path("benchmarks/peers/turns.yaml")
NUM_PROMPTS, ROUNDS = 256, 3
RESULT = {"role": "tool", "name": "calculate", "tool_call_id": "call00000", "content": "1554"}


def main() -> None:
    """Measures ROUNDS batches, after one that counts for nothing, and prints each."""
    config = ensure_model(load_config(CONFIG_PATH, []))
    tokenizer, (spec,) = load_tokenizer(config.model), describe(config.environment_paths).values()
    end_ids = end_token_ids(config.model, tokenizer)
    speech = Dialogue(tokenizer, spec.tools, end_ids=end_ids)
    prompts = load_prompts(config.data, tokenizer, environments={spec.name: spec.tools})
    set_engine_environment(config.actors)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    length, actors = config.max_sequence_tokens, config.actors
    llm = LLM(**engine_arguments(config.model, actors, max_model_len=length, seed=0))

    def sampling(samples: int) -> SamplingParams:
        return SamplingParams(
            n=samples,
            max_tokens=actors.max_new_tokens,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            stop_token_ids=list(end_ids),
        )

    shown = speech.continuation([RESULT])
    for number in range(ROUNDS + 1):
        rows = [
            prompts[place % len(prompts)] for place in range(number * NUM_PROMPTS, (number + 1) * NUM_PROMPTS)
        ]
        begun = [TokensPrompt(prompt_token_ids=list(speech.first(row.messages or ()))) for row in rows]
        start_s = time.process_time()
        asked, num_tokens = [], 0
        for output in llm.generate(begun, sampling(actors.group_size), use_tqdm=False):
            for said in output.outputs:
                num_tokens += len(said.token_ids)
                if speech.is_ended(said.token_ids) and speech.read("", said.token_ids).calls:
                    whole = [*(output.prompt_token_ids or ()), *said.token_ids, *shown]
                    asked.append(TokensPrompt(prompt_token_ids=whole))
        for output in llm.generate(asked, sampling(1), use_tqdm=False):
            num_tokens += len(output.outputs[0].token_ids)
        num_samples = NUM_PROMPTS * actors.group_size
        cpu_ms = 1000 * (time.process_time() - start_s) / num_samples
        if number:
            turns, tokens = 1 + len(asked) / num_samples, num_tokens / num_samples
            print(f"{cpu_ms:.2f} CPU ms a sample, {turns:.2f} turns, {tokens:.1f} sampled tokens", flush=True)


if __name__ == "__main__":
    main()
