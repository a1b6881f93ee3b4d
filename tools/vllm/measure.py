"""What plans gain in vLLM on a CPU: python tools/vllm/measure.py weights/smollm2-135m [PLAN ...]

Unpruned vLLM is the baseline, which the rounds run in turn with the plans. All times are seconds of CPU of one thread,
the best of the rounds. A plan's limit is what it can gain by the FLOPs that it saves (PrunePlan.speedup).
"""

import argparse
import os
import time
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "POP_PLAN": "none",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import torch
from pop_vllm.prefix_cache import limit_hits
from vllm import LLM, SamplingParams

import pop

PLANS = ["1/3", "smollm2-135m-third", "smollm2-135m-14", "1/2"]
MIXED = (1024, 512, 1536, 640, 768, 896)  # tokens of the prompts of one batch
TEXTS = Path(pop.__file__).parent / "data" / "calibration"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("plans", nargs="*", default=PLANS, help="values of POP_PLAN, or shares such as 1/3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--compile", action="store_true", help="let vLLM compile")
    parser.add_argument("--alone", action="store_true", help="vLLM without the plugin, to see what that costs")
    args = parser.parse_args()
    if args.alone:
        del os.environ["POP_PLAN"]
        args.plans = []
    torch.set_num_threads(1)
    model = pop.load(args.model, dtype=torch.float32, compile=False, prune=None, progress=False)
    ids = model.tokenizer.encode("\n".join(path.read_text() for path in sorted(TEXTS.glob("*.txt"))))
    longest = max(2304, *args.lengths) + 64
    options = {"max_model_len": longest, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 1 << 30}
    llm = LLM(args.model, dtype="float32", enforce_eager=not args.compile, block_size=32, **options)
    plans = {"none": pop.PrunePlan.none()} | {name: plan_of(name, model) for name in args.plans}

    def seconds(prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
        """The least seconds of CPU for each plan."""
        best = dict.fromkeys(plans, float("inf"))
        for _ in range(args.rounds):
            for name, plan in plans.items():
                best[name] = min(best[name], run(llm, plan, prompts, new_tokens))
        return best

    for length in args.lengths:
        best = seconds([ids[:length]], 1)
        for name, value in best.items():
            gain = best["none"] / value
            limit = plans[name].speedup(model, length)
            print(f"first token, {length} tokens, {name}: {value:.3f} s, {gain:.2f}x of {limit:.2f}x", flush=True)
    prompts = [ids[1000 * i : 1000 * i + length] for i, length in enumerate(MIXED)]
    for name, value in seconds(prompts, 16).items():
        print(
            f"{len(MIXED)} mixed requests, 16 new tokens each, {name}: {len(MIXED) / value:.3f} requests/s", flush=True
        )
    for name, value in decoding(seconds, ids).items():
        print(f"a new token, {name}: {1000 * value:.1f} ms", flush=True)


def decoding(seconds, ids: list[int]) -> dict[str, float]:
    """Seconds for each new token after a prompt of 128 tokens."""
    few = seconds([ids[:128]], 1)
    many = seconds([ids[:128]], 33)
    return {name: (many[name] - few[name]) / 32 for name in few}


def plan_of(name: str, model) -> pop.PrunePlan:
    if "/" in name:
        parts, _, whole = name.partition("/")
        return pop.PrunePlan.deepest(model.config.num_layers, int(parts) / int(whole))
    return pop.PrunePlan.load(name)


def run(llm, plan: pop.PrunePlan, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds of CPU for prompts with an empty prefix cache."""
    if "POP_PLAN" in os.environ:
        llm.apply_model(lambda module: module.use(plan))
        limit_hits(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager, plan)
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    before = time.process_time()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return time.process_time() - before


if __name__ == "__main__":
    main()
