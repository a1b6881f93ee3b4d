"""Runs prompts on two ranks of vLLM: python two_ranks.py CHECKPOINT BUDGET. Prints ids and log-probabilities.

test_two_ranks.py calls it, with the plan in POP_PLAN.
"""

import json
import os
import sys

from engines import OPTIONS, prompts_of

LENGTHS = (3, 97, 130)


def main(folder: str, budget: int) -> None:
    from vllm import LLM, SamplingParams

    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": budget}
    llm = LLM(folder, **OPTIONS | ranks)
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=20, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts_of(LENGTHS)], params, use_tqdm=False)
    answers = []
    for output in outputs:
        (answer,) = output.outputs
        first = {token: entry.logprob for token, entry in answer.logprobs[0].items()}
        answers.append({"ids": list(answer.token_ids), "first": first})
    print("ANSWERS", json.dumps(answers), flush=True)
    os._exit(0)  # vLLM's workers need no farewell


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
