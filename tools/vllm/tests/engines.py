"""An engine of vLLM in this process, on a tiny model with random weights, and what pop's reference says of it."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

import pop
from pop import models, reference
from pop.checkpoints.config_json import read_config
from pop.pruning.corrections import Corrections

DEFAULTS = {
    "POP_PLAN": "none",
    "VLLM_PLUGINS": "pop",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the tests reach the model
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)

VOCABULARY = 512
BLOCK = 32  # tokens; the smallest that vLLM's attention on CPUs takes
OPTIONS = {  # of vLLM's LLM
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "skip_tokenizer_init": True,
    "block_size": BLOCK,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "LlamaForCausalLM": {"model_type": "llama", "rope_theta": 1e4, "hidden_act": "silu"},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "rope_theta": 1e6, "hidden_act": "silu"},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    "Gemma3ForCausalLM": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 32,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


def write_checkpoint(folder: Path, family: str) -> None:
    """A checkpoint with random weights, the same at each call."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [family]} | SIZES | FAMILIES[family]
    (folder / "config.json").write_text(json.dumps(config))
    module = models.build(read_config(folder))
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if "norm" in name:
            centre = 0 if family.startswith("Gemma") else 1
            weights[name] = centre + 0.3 * noise
        else:
            weights[name] = noise / parameter.shape[-1] ** 0.5
    save_file(by_expert(weights), folder / "model.safetensors")


def by_expert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as checkpoints hold them: each expert's matrices apart."""
    found = {}
    for name, weight in weights.items():
        prefix, is_expert, part = name.partition("experts.")
        if not is_expert:
            found[name] = weight
            continue
        names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        for number, matrix in enumerate(weight):
            for own, rows in zip(names, matrix.chunk(len(names)), strict=True):
                found[f"{prefix}experts.{number}.{own}.weight"] = rows.clone()
    return found


class Reference:
    """pop's model of a checkpoint."""

    def __init__(self, folder):
        self.folder = folder
        self.pop = pop.load(folder, dtype=torch.float32, compile=False, prune=None, tokenizer=None, progress=False)

    def expected(self, prompt: list[int], answer: list[int], plan, also=()) -> torch.Tensor:
        """The reference's log-probabilities [n, V] of each of n answered tokens, given those before it.

        Tokens at the positions `also` run at full depth as well.
        """
        module = self.pop.module
        selected = reference.selected_tokens(module, torch.tensor(prompt), plan)
        tokens = torch.tensor(prompt + answer[:-1])
        full_depth = reference.full_depth_tokens(len(prompt), len(tokens), plan)
        full_depth[list(also)] = True
        logits, _ = reference.forward(module, tokens, full_depth, plan, selected=selected)
        return logits[len(prompt) - 1 :].log_softmax(-1)


class Engine(Reference):
    """vLLM's engine and pop's model of one checkpoint."""

    def __init__(self, folder, **options):
        from vllm import LLM

        super().__init__(folder)
        self.llm = LLM(str(folder), **OPTIONS | options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.model = self.llm.apply_model(lambda model: model)[0]

    def use(self, plan, budget: int = 2048) -> None:
        """Prune by a plan, in steps of at most `budget` tokens, with an empty prefix cache."""
        from pop_vllm.prefix_cache import limit_hits

        scheduler = self.core.scheduler
        scheduler.max_num_scheduled_tokens = budget
        limit_hits(scheduler.kv_cache_manager, plan)
        self.model.use(plan)
        self.llm.reset_prefix_cache()

    def generate(self, prompts, count: int = 4, **params):
        """vLLM's outputs. params: of all requests, or of each if they are lists."""
        from vllm import SamplingParams

        shared = {"temperature": 0, "max_tokens": count, "logprobs": 20, "ignore_eos": True, "detokenize": False}
        each = [
            {name: value[i] if isinstance(value, list) else value for name, value in params.items()}
            for i in range(len(prompts))
        ]
        params = [SamplingParams(**shared | own) for own in each]
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def assert_equal(self, outputs, prompts, plan, also=(), tolerance: float = 1e-4) -> None:
        """Outputs have the first log-probabilities, and the greedy tokens, that pop's reference computes.

        Args:
            outputs: Of vLLM.
            prompts: Their ids.
            plan: The plan of all prompts.
            also: Positions of further full-depth tokens.
            tolerance: Of log-probabilities.
        """
        for output, prompt in zip(outputs, prompts, strict=True):
            answer = list(output.outputs[0].token_ids)
            log_probabilities = self.expected(prompt, answer, plan, also)
            assert error(output, log_probabilities[0]) < tolerance
            assert answer == log_probabilities.argmax(-1).tolist()


def error(output, first) -> float:
    """The largest difference between the log-probabilities of an output's first token and those expected [V]."""
    found = output.outputs[0].logprobs[0]
    return max(abs(entry.logprob - float(first[token])) for token, entry in found.items())


def calibrated(engine: Reference, layers: tuple[int, ...], **fields) -> pop.PrunePlan:
    """A plan with random corrections of a size that matters. Groups that kept layers follow update h."""
    config = engine.pop.config
    rank = 24
    kv_rows = config.num_kv_heads * config.head_dim
    groups = [layer for layer in layers if layer - 1 not in layers]
    num_updates = len(groups) - (max(layers) == config.num_layers - 1)
    draw = torch.Generator().manual_seed(5)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=draw)

    tensors = {
        "weight": random(len(layers), 2, kv_rows, rank, scale=0.1),
        "shared": random(len(groups), rank, 2 * config.hidden_size, scale=(2 * config.hidden_size) ** -0.5),
    }
    if num_updates:
        tensors["update"] = random(num_updates, config.hidden_size, rank, scale=0.2)
    corrections = Corrections(layers, **tensors, sketch=engine.pop.sketch[list(layers)])
    return pop.PrunePlan(layers, full_depth_first=1, corrections=corrections, **fields)


def prompts_of(lengths, seed: int = 1) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
