"""Pruned prefill for a model of Hugging Face's transformers: `with pruned(model, plan): model.generate(...)`.

    python -m tools.transformers_pop --check                    # compare it with pop's engine; needs transformers

Inside the context, a call with several tokens a row is a prompt, or a chat's next turn on a filled cache: it is pruned.
A call with one token is decode: it runs at full depth. tools/examples/README.md states what it takes and refuses.

Nothing of transformers is subclassed or copied. The decoder and the pruned layers get another `forward` as an attribute
of the instance. It hides the class's own until the context ends. A pruned layer computes K and V of all tokens from the
state h that enters its group. Then its own forward runs on the full-depth rows f, with `Overwritten` as its cache:

    h [B, T, D] ──► k, v of all tokens ─────────────────┐
    f [B, W, D] ──► the layer's own forward ──► k, v ──► written over them ──► cache ──► what f attends

Masks, windows, rotary positions and caches remain those of transformers. Shape letters: pop/models/layers.py.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import pop
from pop import models
from pop.checkpoints.config_json import read_config
from pop.errors import InputError, MissingExtra, PlanError, UnsupportedError
from pop.models.layers import rotate

FIRST, LAST = (5, 6), (5, 24)  # tried: 5.6.2, 5.12.1, 5.18.0, 5.22.2, 5.23.0 and 5.24.0
FAMILIES = "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"
# Options of generate that split a prompt into several calls, or that check several new tokens in one call.
REFUSED = "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size"
CACHES = "cache", "past_key_values"  # the cache's name as of 5.24, and before


def library():
    """The package transformers. Raises UnsupportedError for a version outside the range in which this was tried."""
    wanted = f"run pip install 'transformers>={FIRST[0]}.{FIRST[1]},<{LAST[0]}.{LAST[1] + 1}'"
    try:
        import transformers
    except ImportError:
        raise MissingExtra(f"this needs the package transformers; {wanted}") from None
    version = transformers.__version__
    if not FIRST <= tuple(int(number) for number in version.split(".")[:2]) <= LAST:
        raise UnsupportedError(f"transformers is {version}, with which this was not tried; {wanted}")
    return transformers


class pruned:
    """A context in which a model's prompts skip the layers of a plan. It may be entered again, but not nested."""

    def __init__(self, model, plan):
        if type(model) not in [getattr(library(), name) for name in FAMILIES]:
            raise UnsupportedError(f"the model is a {type(model).__name__}; pruned takes {', '.join(FAMILIES)}")
        self.model, self.decoder, self.layers = model, model.model, model.model.layers
        self.plan = pop.PrunePlan.of(plan, len(self.layers))
        if self.plan.full_depth_selected:
            raise UnsupportedError("the plan selects tokens by attention, which pruned cannot; give another plan")
        refit = self.plan.corrections
        if refit is not None and refit.fingerprint != as_pop(model).fingerprint:
            raise PlanError("the plan was calibrated for another model; calibrate it for this one")
        self.refit = None if refit is None else refit.to(model.device, model.dtype)
        self.two_taps = refit is not None and refit.taps == 2

    def __enter__(self):
        for name, part in self.model.named_modules():
            if vars(part).keys() & {"forward", "generate"} or part._compiled_call_impl is not None:
                found = "is pruned already, compiled, or spread over devices"
                raise UnsupportedError(f"{name or 'the model'} {found}, as its own forward shows; give a plain model")
        if self.model.training or (getattr(self.model, "_tp_size", None) or 1) > 1:
            raise UnsupportedError("the model is in mode train or in tensor parallel; give a whole one in mode eval")
        self.model.generate = partial(self._generate, self.model.generate)
        self.decoder.forward = partial(self._run_decoder, self.decoder.forward)
        for is_pruned, group in self.plan.groups(len(self.layers)):
            for index in group if is_pruned else ():
                layer = self.layers[index]
                layer.forward = partial(self._run_layer, layer.forward, layer, index, group)
        return self.model

    def __exit__(self, *_):
        del self.model.generate, self.decoder.forward
        for index in self.plan.layers:
            del self.layers[index].forward

    def _generate(self, generate, *args, **kwargs):
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        for options in (kwargs, vars(self.model.generation_config), {} if config is None else vars(config)):
            if found := [name for name in REFUSED if options.get(name)]:
                raise UnsupportedError(f"generate has {found[0]}, whose calls look like prompts; leave it out")
        if self.two_taps:
            kwargs["disable_compile"] = True  # decode keeps states beside the cache; see `latest`
        return generate(*args, **kwargs)

    def _run_decoder(self, forward, input_ids=None, **kwargs):
        B, T = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[:2]
        if T == 1:
            return forward(input_ids, **kwargs)
        if self.decoder.config._attn_implementation not in ("sdpa", "eager"):
            raise UnsupportedError("pruned takes attention of the kinds sdpa and eager; see set_attn_implementation")
        masks = kwargs.get("attention_mask"), kwargs.get("position_ids"), self.two_taps
        prompt = Prompt(positions(B, T, _cache(kwargs), *masks).to(self.model.device), self.plan)
        out = forward(input_ids, **kwargs, pruned_prompt=prompt)  # passed on to all layers
        if prompt.layers_run != len(self.plan.layers):
            raise InputError("the context ended during a prompt; leave it after all calls have returned")
        return out

    def _run_layer(self, forward, layer, index, group, hidden_states, *, pruned_prompt=None, **kwargs):
        h, prompt, cache, start = hidden_states, pruned_prompt, _cache(kwargs), group[0]
        if prompt is None:
            if index == start and self.two_taps and cache is not None:
                latest(cache, start, normalised(h, layer.input_layernorm))  # keeps it for the next prompt
            return forward(h, **kwargs)
        if cache is None:
            raise InputError("pruned prefill writes a cache, but use_cache is off; turn it on")
        if index == start:
            prompt.entering = h, None if self.refit is None else self._refit_inputs(layer, h, prompt, cache, start)
        rows, mask, tables = prompt.rows, kwargs.pop("attention_mask"), kwargs.pop("position_embeddings")
        k, v = self._keys_values(layer, index, *prompt.entering, tables)
        filled = h.shape[1] if mask is None else None
        causal = torch.arange(h.shape[1], device=h.device) <= rows[..., None]  # for an empty cache without padding
        row_mask = causal[:, None] if mask is None else torch.take_along_dim(mask, rows[:, None, :, None], dim=2)
        kwargs |= {name: Overwritten(cache, k, v, rows, filled) for name in CACHES if name in kwargs}
        row_tables = tuple(torch.take_along_dim(table, rows[..., None], dim=1) for table in tables)
        at = rows[..., None].expand(-1, -1, h.shape[2])  # [B, W, D]
        f = forward(h.gather(1, at), attention_mask=row_mask, position_embeddings=row_tables, **kwargs)
        prompt.layers_run += 1
        if index == group[-1] and self.refit is not None:
            h = self.refit.passed(h, prompt.entering[1], index)
        return h.scatter(1, at, f)

    def _refit_inputs(self, layer, h, prompt, cache, start):
        """What the group's refit projections take, as Corrections.inputs returns it."""
        x = normalised(h, layer.input_layernorm)
        previous = latest(cache, start, x) if self.two_taps else torch.zeros_like(x[:, 0])  # [B, D]
        x = x.where(prompt.valid[..., None], previous[:, None])  # padding precedes a row's first token
        return self.refit.inputs(x, previous, start)

    def _keys_values(self, layer, index, h, inputs, tables):
        """K and V [B, K, T, E] of a layer as the cache holds them, from the h and the refit's inputs of its group."""
        attention, refit, x, n = layer.self_attn, self.refit, layer.input_layernorm(h), self.plan.layers.index(index)
        is_whole = refit is not None and refit.shared is None  # otherwise the layer's own projections have a part in it
        k, v = (0, 0) if is_whole else (attention.k_proj(x), attention.v_proj(x))
        if refit is not None:
            fitted = F.linear(inputs, refit.weight[n].flatten(0, 1), refit.bias[n].flatten()).chunk(2, dim=-1)
            k, v = k + fitted[0], v + fitted[1]
        k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in (k, v))  # [B, T, K, E]
        k = attention.k_norm(k) if hasattr(attention, "k_norm") else k
        k = rotate(k, tuple(table[:, :, None, : k.shape[-1] // 2] for table in tables))  # both halves are the same
        return k.transpose(1, 2), v.transpose(1, 2)


class Prompt:
    """The tokens [B, T] of a call. position [B, T]: of each token in its sequence, -1 for padding."""

    def __init__(self, position: torch.Tensor, plan: pop.PrunePlan):
        T, self.valid = position.shape[1], position >= 0
        column = torch.arange(T, device=position.device)
        full_depth = self.valid & ((position < plan.full_depth_first) | (column >= T - plan.full_depth_last))
        count = full_depth.sum(1, keepdim=True)  # [B, 1]
        rows = (~full_depth).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]  # their columns first
        self.rows = rows.where(column[: rows.shape[1]] < count, T - 1)  # [B, W]; short rows repeat their last column
        self.entering, self.layers_run = None, 0


class Overwritten:
    """The cache that a layer sees when it runs on some rows: it writes their K and V over those of all tokens."""

    def __init__(self, cache, k, v, rows, filled: int | None):
        self.cache, self.k, self.v, self.rows, self.filled = cache, k, v, rows, filled

    def update(self, k, v, *args, **kwargs):
        at = self.rows[:, None, :, None].expand_as(k)  # [B, K, W, E]
        found = self.cache.update(self.k.scatter(2, at, k), self.v.scatter(2, at, v), *args, **kwargs)
        return tuple(x[:, :, : self.filled] for x in found)  # a static cache returns its empty slots as well


def _cache(kwargs):
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def positions(B: int, T: int, cache, mask, position_ids, two_taps: bool = False) -> torch.Tensor:
    """The position of each new token in its sequence, -1 for padding: [B, T], as a mask of padding states it.

    For a static cache, `generate` gives position_ids instead, which are 0 for padding."""
    past = 0 if cache is None else int(cache.get_seq_length())
    if mask is None:
        return past + torch.arange(T).expand(B, -1)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if two_taps and past and not mask[:, past - 1].all():
            raise InputError("two taps need the cache's last token, which a row's mask hides; encode the row again")
        found = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)[:, past : past + T]
    elif position_ids is not None:
        found = position_ids.expand(B, -1)
        counted = found[:, -1:] - torch.arange(T, device=found.device).flip(0)
        is_token = ((found == counted) & (found >= min(past, 1))).long().flip(1).cumprod(1).flip(1)
        found = found.masked_fill((is_token == 0) | (found > found[:, -1:]).any(1, keepdim=True), -1)
    else:
        raise InputError("the mask is one of attention; give the mask of padding [B, T], or position_ids as well")
    if found.shape[1] != T or (found[:, -1] < 0).any():
        raise InputError(f"the mask must cover the cache and {T} new tokens, with padding on the left")
    return found


def normalised(h: torch.Tensor, norm) -> torch.Tensor:
    """h [B, T, D] / rms(h), without the norm's weight."""
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return F.rms_norm(h.float(), h.shape[-1:], eps=eps).to(h.dtype)


def latest(cache, start: int, x: torch.Tensor) -> torch.Tensor:
    """The normalised state [B, D] of the cache's last token as it entered layer `start`; zeros for an empty cache.

    x [B, T, D] are the states of the tokens that follow. The last of them is kept beside the cache for the next call.
    """
    past, kept = int(cache.get_seq_length(start)), vars(cache).setdefault("pruned_states", {})
    length, state = kept.get(start, (0, x[:, 0])) if past else (0, torch.zeros_like(x[:, 0]))
    if x.shape[1] > 1 and (length != past or state.shape != x[:, 0].shape):
        raise InputError("the cache's last token was encoded without this plan, which has two taps; encode it again")
    kept[start] = past + x.shape[1], x[:, -1].clone()
    return state


def as_pop(model) -> pop.Model:
    """The same model for pop's engine, with the same weights in the same memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = read_config(folder)
    with torch.device("meta"):
        module = models.build(config)
    weights, names = model.state_dict(), module.state_dict().keys()
    if missing := names - weights.keys():
        raise UnsupportedError(f"the model lacks {min(missing)}; merge its adapters, and use plain weights")
    module.load_state_dict({name: weights[name] for name in names}, assign=True)
    return pop.Model(module.eval(), config, compile=False)


def calibrate(model, texts, plan, **options) -> pop.PrunePlan:
    """Refit the plan's projections to a model of transformers. Texts are lists of token ids; see pop.calibrate."""
    return pop.calibrate(as_pop(model), texts, plan, **options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call without -m
    from tools.transformers_check import main

    sys.exit(main())
