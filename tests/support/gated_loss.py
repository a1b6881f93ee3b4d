"""The loss with virtual gates, in numpy and float64, token by token, and its slopes by finite differences."""

import numpy as np
import torch

# ---- The gated loss, in numpy and float64, token by token ----


def gated_loss(config, weights, prompt, response, gate):
    """The negative log-likelihood of a response, with gate [2 (prefill, decode), L] float64."""
    E, G = config.head_dim, config.num_heads // config.num_kv_heads
    gemma = config.family == "gemma3"
    scale = config.query_pre_attn_scalar**-0.5 if gemma else E**-0.5

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * (gemma + weights[f"{name}.weight"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def rotated(x, position, rope):  # [heads, E]
        angle = position / rope.factor / rope.base ** (np.arange(0, E, 2) / E)
        a, b = x[:, : E // 2], x[:, E // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    tokens = [*prompt, *response]
    cache = [([], []) for _ in config.windows]
    loss = 0.0
    for position, token in enumerate(tokens[:-1]):
        stage = int(position >= len(prompt) - 1)
        h = weights["model.embed_tokens.weight"][token] * (config.hidden_size**0.5 if gemma else 1)
        for index, window in enumerate(config.windows):
            name = f"model.layers.{index}"
            rope = config.rope if window is None else config.local_rope
            x = norm(h, f"{name}.input_layernorm")
            q, k, v = (linear(x, f"{name}.self_attn.{kind}_proj").reshape(-1, E) for kind in "qkv")
            if f"{name}.self_attn.q_norm.weight" in weights:
                q, k = norm(q, f"{name}.self_attn.q_norm"), norm(k, f"{name}.self_attn.k_norm")
            keys, values = cache[index]
            keys.append(rotated(k, position, rope))
            values.append(v)
            attended = slice(max(0, position + 1 - window) if window else 0, None)
            heads = []
            for head, query in enumerate(rotated(q, position, rope)):
                scores = np.array([key[head // G] for key in keys[attended]]) @ query * scale
                weight = np.exp(scores - scores.max())
                heads.append(weight / weight.sum() @ np.array([value[head // G] for value in values[attended]]))
            update = linear(np.concatenate(heads), f"{name}.self_attn.o_proj")
            h = h + gate[stage, index] * (norm(update, f"{name}.post_attention_layernorm") if gemma else update)
            x = norm(h, f"{name}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm")
            inner, up = linear(x, f"{name}.mlp.gate_proj"), linear(x, f"{name}.mlp.up_proj")
            if gemma:
                inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
            else:
                inner = inner / (1 + np.exp(-inner))
            update = linear(inner * up, f"{name}.mlp.down_proj")
            h = h + gate[stage, index] * (norm(update, f"{name}.post_feedforward_layernorm") if gemma else update)
        if stage:
            head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
            logits = norm(h, "model.norm") @ weights[head].T
            loss += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[position + 1]]
    return loss


def slopes(module, prompt, response, step=1e-4):
    """Central differences of the gated loss by each gate, [2 (prefill, decode), L]."""
    weights = {name: value.double().numpy() for name, value in module.state_dict().items()}
    result = np.zeros((2, module.config.num_layers))
    for gate in np.ndindex(result.shape):
        change = np.zeros(result.shape)
        change[gate] = step
        high = gated_loss(module.config, weights, prompt, response, 1 + change)
        low = gated_loss(module.config, weights, prompt, response, 1 - change)
        result[gate] = (high - low) / (2 * step)
    return result


def assert_close(actual, expected, tolerance=1e-4):
    """To a share of the largest expected value."""
    actual, expected = (torch.as_tensor(numbers, dtype=torch.float64) for numbers in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
