"""Pruned prefill for a decoder of another code base: what it takes to run it on pop's engine.

The first half is the other code base: a decoder like GPT-2, with its own attention, learned positions, LayerNorm and
GELU. It stays as it is. The second half wraps its blocks and the model in `PrunableLayer` and `PrunableModel`
(pop/models/base.py). Then `engine.prefill` and `engine.decode` run it on a `pop.KVCache`, with any `pop.PrunePlan`
that is not calibrated. The engine takes care of attention, masks, chunks and batches of different lengths.

Here positions are learned and added to the embedding, so `tokens` carry them: id + vocab_size * position. A model with
rotary positions takes plain ids, returns cos and sin from `rope`, and rotates in `queries_keys_values`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pop import KVCache, PrunePlan, engine
from pop.models.base import PrunableLayer, PrunableModel

# The other code base


@dataclass
class GPTConfig:
    vocab_size: int = 65
    block_size: int = 128  # tokens, at most
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 48


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, D = x.shape
        E = D // self.n_head
        q, k, v = (part.view(B, T, self.n_head, E).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1)) / E**0.5  # [B, H, T, T]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(), nn.Linear(4 * config.n_embd, config.n_embd)
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, V]."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


# What makes it a model for pop's engine


class PrunableBlock(PrunableLayer):
    """A Block as the engine calls it."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        self.heads = block.attn.n_head
        head_dim = block.attn.c_attn.in_features // self.heads
        self.scale = head_dim**-0.5

    def queries_keys_values(self, h, rope):
        projected = self.block.attn.c_attn(self.block.ln_1(h)).chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in projected)  # [B, T, H, E] each

    def keys_values(self, h, rope):
        c_attn = self.block.attn.c_attn
        D = h.shape[-1]  # the first D rows project q
        projected = F.linear(self.block.ln_1(h), c_attn.weight[D:], c_attn.bias[D:]).chunk(2, dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in projected)  # [B, T, H, E] each

    def attention_update(self, attended):
        return self.block.attn.c_proj(attended)

    def mlp_update(self, h):
        return self.block.mlp(self.block.ln_2(h))


class PrunableGPT(PrunableModel):
    """A GPT as the engine calls it. It is also the config from which a KVCache reads its sizes."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt
        self.layers = nn.ModuleList(PrunableBlock(block) for block in gpt.h)
        self.num_layers = len(gpt.h)
        self.windows = (None,) * len(gpt.h)
        self.hidden_size = gpt.config.n_embd
        self.num_kv_heads = gpt.config.n_head
        self.head_dim = self.hidden_size // self.num_kv_heads

    @property
    def config(self):
        return self

    def embed(self, tokens):
        V = self.gpt.config.vocab_size
        return self.gpt.wte(tokens % V) + self.gpt.wpe(tokens // V)

    def tokens(self, ids, positions):
        """What `embed` takes for ids at positions of the same shape."""
        tokens = ids + self.gpt.config.vocab_size * positions.to(ids.device)
        return tokens.to(self.gpt.wte.weight.device)

    def head(self, h):
        return self.gpt.lm_head(self.gpt.ln_f(h))


@torch.no_grad()
def generate(gpt: GPT, prompts: list[list[int]], plan: PrunePlan, count: int, chunk_size: int = 2048) -> torch.Tensor:
    """The greedy continuations of the prompts by `count` tokens each: [B, count]."""
    model = PrunableGPT(gpt)
    weight = gpt.wte.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    cache = KVCache(model, len(prompts), longest + count, dtype=weight.dtype, device=weight.device)
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])  # [B, T]
    tokens = model.tokens(ids, torch.arange(longest))
    logits = engine.prefill(model, tokens, cache, lengths, plan.check(model.num_layers), chunk_size)
    answer = [logits.argmax(-1)]
    while len(answer) < count:
        logits = engine.decode(model, model.tokens(answer[-1], cache.lengths), cache)
        answer.append(logits.argmax(-1))
    return torch.stack(answer, dim=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    gpt = GPT(GPTConfig()).eval()
    for plan in (PrunePlan.none(), PrunePlan.deepest(gpt.config.n_layer, 1 / 3)):
        answer = generate(gpt, [[1, 2, 3, 4, 5]], plan, 8)[0]
        print(f"prefill without layers {plan.layers}: {answer.tolist()}")
