"""Pruned prefill for a model of Hugging Face's transformers: `with pruned(model, plan): model.generate(...)`.

    python -m tools.transformers_pop --check                    # compare it with pop's engine; needs transformers

Inside the context, a call with several tokens a row is a prompt, or a chat's next turn on a filled cache: it is pruned.
A call with one token is decode: it runs at full depth. tools/examples/README.md states what it takes and refuses.
States and logits of pruned tokens leave the model as NaN, because they predict nothing that pop's engine would.

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
from functools import partial, wraps
from pathlib import Path

import torch
import torch.nn.functional as F

import pop
from pop import models
from pop.checkpoints.config_json import read_config
from pop.errors import InputError, MissingExtra, UnsupportedError

FIRST = (5, 6)  # versions of transformers; tried: 5.6.2, 5.12.1, 5.18.0, 5.22.2, 5.23.0 and 5.24.0
LAST = (5, 24)
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
    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    if not FIRST <= version <= LAST:
        raise UnsupportedError(f"transformers is {transformers.__version__}, with which this was not tried; {wanted}")
    return transformers


class pruned:
    """A context in which a model's prompts skip the layers of a plan. It may be entered again, but not nested.

    Args:
        model: A model of transformers, one of FAMILIES.
        plan: A pop.PrunePlan, or anything else that `pop.load` takes as `prune`.

    Raises:
        UnsupportedError, PlanError: The model or the plan is not one of those that tools/examples/README.md lists.
    """

    def __init__(self, model, plan):
        if type(model) not in [getattr(library(), name) for name in FAMILIES]:
            raise UnsupportedError(f"the model is a {type(model).__name__}; pruned takes {', '.join(FAMILIES)}")
        self.model = model
        self.decoder = model.model
        self.layers = model.model.layers
        self.plan = pop.PrunePlan.of(plan, len(self.layers))
        if self.plan.full_depth_selected:
            raise UnsupportedError("the plan selects tokens by attention, which pruned cannot; give another plan")
        self.is_calibrated = self.plan.corrections is not None
        if self.is_calibrated:
            self.plan = as_pop(model).resolve(self.plan)

    def __enter__(self):
        for name, part in self.model.named_modules():
            if vars(part).keys() & {"forward", "generate"} or part._compiled_call_impl is not None:
                found = "is pruned already, compiled, or spread over devices"
                raise UnsupportedError(f"{name or 'the model'} {found}, as its own forward shows; give a plain model")
        if self.model.training or (getattr(self.model, "_tp_size", None) or 1) > 1:
            raise UnsupportedError("the model is in mode train or in tensor parallel; give a whole one in mode eval")
        self.model.generate = partial(self._generate, self.model.generate)
        self.model.forward = without_labels(self.model.forward)
        self.decoder.forward = partial(self._run_decoder, self.decoder.forward)
        for group in self.plan.groups(len(self.layers)):
            if group.is_pruned:
                for index in group.layers:
                    self.layers[index].forward = PrunedLayer(self.layers[index], index, group)
        return self.model

    def __exit__(self, *_):
        del self.model.generate
        del self.model.forward
        del self.decoder.forward
        for index in self.plan.layers:
            del self.layers[index].forward

    def _generate(self, generate, *args, **kwargs):
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        for options in (kwargs, vars(self.model.generation_config), {} if config is None else vars(config)):
            found = [name for name in REFUSED if options.get(name)]
            if found:
                raise UnsupportedError(f"generate has {found[0]}, whose calls look like prompts; leave it out")
        if self.is_calibrated:
            kwargs["disable_compile"] = True  # decode keeps states beside the cache; see `latest`
        return generate(*args, **kwargs)

    def _run_decoder(self, forward, input_ids=None, **kwargs):
        tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
        B, T = tokens.shape[:2]
        if T == 1:
            return forward(input_ids, **kwargs)
        if self.decoder.config._attn_implementation not in ("sdpa", "eager"):
            raise UnsupportedError("pruned takes attention of the kinds sdpa and eager; see set_attn_implementation")
        cache = _cache(kwargs)
        mask = kwargs.get("attention_mask")
        position = positions(B, T, cache, mask, kwargs.get("position_ids"))
        if self.is_calibrated:
            check_last_token(cache, mask)
        prompt = Prompt(position.to(self.model.device), self.plan)
        out = forward(input_ids, **kwargs, pruned_prompt=prompt)  # passed on to all layers
        if prompt.layers_run != len(self.plan.layers):
            raise InputError("the context ended during a prompt; leave it after all calls have returned")
        if self.plan.layers:
            h = out[0]  # [B, T, D], the last states
            h.masked_fill_(~prompt.at_full_depth[..., None], torch.nan)  # no score of a pruned token is a number
        return out


class PrunedLayer:
    """The `forward` of a pruned layer inside the context.

    Args:
        layer: The layer of transformers. Its own forward runs the full-depth rows.
        index: Its index.
        group: The pop.pruning.plan.Group that it is in.
    """

    def __init__(self, layer, index: int, group):
        self.layer = layer
        self.forward = layer.forward
        self.index = index
        self.number = index - group.layers[0]  # in its group
        self.is_last = index == group.layers[-1]
        self.corrections = group.corrections

    def __call__(self, hidden_states, *, pruned_prompt=None, **kwargs):
        h = hidden_states  # [B, T, D]
        prompt = pruned_prompt
        cache = _cache(kwargs)
        if prompt is None:  # decode
            if self.number == 0 and self.corrections is not None and cache is not None:
                latest(cache, self.index, normalised(h, self.layer.input_layernorm))  # keeps it for the next prompt
            return self.forward(h, **kwargs)
        if cache is None:
            raise InputError("pruned prefill writes a cache, but use_cache is off; turn it on")
        if self.number == 0:
            prompt.h = h
            prompt.z = None if self.corrections is None else self._code(h, prompt.is_token, cache)
        f = self._run_rows(h, prompt, kwargs)
        prompt.layers_run += 1
        if self.is_last and self.corrections is not None:
            h = self.corrections.updated(h, prompt.z)
        at = prompt.rows[..., None].expand_as(f)  # [B, W, D]
        return h.scatter(1, at, f)

    def _code(self, h, is_token, cache) -> torch.Tensor:
        """The code z [B, T, R] of the state that enters the group."""
        x = normalised(h, self.layer.input_layernorm)
        previous = latest(cache, self.index, x)  # [B, D]
        x = x.where(is_token[..., None], previous[:, None])  # padding precedes a row's first token
        return self.corrections.code(x, previous)

    def _run_rows(self, h, prompt, kwargs) -> torch.Tensor:
        """The full-depth rows f [B, W, D] after the layer. Writes K and V of all tokens to the cache."""
        rows = prompt.rows
        mask = kwargs.pop("attention_mask")
        tables = kwargs.pop("position_embeddings")
        k, v = self._keys_values(prompt, tables)
        T = h.shape[1]
        if mask is None:  # an empty cache without padding
            filled = T
            row_mask = (torch.arange(T, device=h.device) <= rows[..., None])[:, None]  # [B, 1, W, T]
        else:
            filled = None
            row_mask = torch.take_along_dim(mask, rows[:, None, :, None], dim=2)
        overwritten = Overwritten(_cache(kwargs), k, v, rows, filled)
        kwargs |= {name: overwritten for name in CACHES if name in kwargs}
        row_tables = tuple(torch.take_along_dim(table, rows[..., None], dim=1) for table in tables)
        f = torch.take_along_dim(h, rows[..., None], dim=1)
        return self.forward(f, attention_mask=row_mask, position_embeddings=row_tables, **kwargs)

    def _keys_values(self, prompt, tables):
        """K and V [B, K, T, E] as the cache holds them, from the h that enters the group."""
        attention = self.layer.self_attn
        x = self.layer.input_layernorm(prompt.h)
        k = attention.k_proj(x)  # [B, T, K * E]
        v = attention.v_proj(x)
        if self.corrections is not None:
            weight = self.corrections.weight[self.number]
            bias = self.corrections.bias[self.number]
            for_k, for_v = F.linear(prompt.z, weight, bias).chunk(2, dim=-1)
            k = k + for_k
            v = v + for_v
        k = k.unflatten(-1, (-1, attention.head_dim))  # [B, T, K, E]
        v = v.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "k_norm"):
            k = attention.k_norm(k)
        return rotated(k, *tables).transpose(1, 2), v.transpose(1, 2)


class Prompt:
    """The tokens [B, T] of a call, on their way through the pruned layers.

    Args:
        position: [B, T], of each token in its sequence, -1 for padding.
        plan: Decides which tokens run at full depth.
    """

    def __init__(self, position: torch.Tensor, plan: pop.PrunePlan):
        T = position.shape[1]
        column = torch.arange(T, device=position.device)
        self.is_token = position >= 0  # [B, T]
        self.at_full_depth = self.is_token & plan.at_full_depth(position, position[:, -1:] + 1)  # [B, T]
        count = self.at_full_depth.sum(1, keepdim=True)  # [B, 1]
        W = int(count.max())
        ordered = (~self.at_full_depth).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]  # their columns come first
        # The columns that run at full depth, [B, W]. Short rows repeat their last column.
        self.rows = ordered.where(column[:W] < count, T - 1)
        self.h: torch.Tensor | None = None  # [B, T, D], enters the present group
        self.z: torch.Tensor | None = None  # its code [B, T, R], in a calibrated plan
        self.layers_run = 0


class Overwritten:
    """The cache that a layer sees when it runs on some rows: it writes their K and V over those of all tokens.

    Args:
        cache: The cache of transformers.
        k, v: Of all tokens, [B, K, T, E].
        rows: [B, W], the columns that the layer runs.
        filled: How many slots the layer attends. None: all that the cache returns.
    """

    def __init__(self, cache, k, v, rows, filled: int | None):
        self.cache = cache
        self.k = k
        self.v = v
        self.rows = rows
        self.filled = filled

    def update(self, k, v, *args, **kwargs):
        at = self.rows[:, None, :, None].expand_as(k)  # [B, K, W, E]
        found = self.cache.update(self.k.scatter(2, at, k), self.v.scatter(2, at, v), *args, **kwargs)
        return tuple(x[:, :, : self.filled] for x in found)  # a static cache also returns its empty slots


def without_labels(forward):
    """A model's forward, except that it refuses labels. Its signature stays, because generate reads it."""

    @wraps(forward)
    def checked(*args, **kwargs):
        if kwargs.get("labels") is not None:
            raise UnsupportedError("a loss would be over pruned tokens; leave out labels, or call outside of pruned")
        return forward(*args, **kwargs)

    return checked


def _cache(kwargs):
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def _length(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _is_padding_mask(mask) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def positions(B: int, T: int, cache, mask, position_ids) -> torch.Tensor:
    """The position of each new token in its sequence, -1 for padding: [B, T].

    A mask of padding states it. For a static cache, `generate` gives position_ids instead, which are 0 for padding.
    Raises InputError if neither is given, and for padding on the right.
    """
    past = _length(cache)
    if mask is None:
        return past + torch.arange(T).expand(B, -1)
    if _is_padding_mask(mask):
        counted = mask.long().cumsum(1) - 1
        found = counted.masked_fill(mask == 0, -1)[:, past : past + T]
    elif position_ids is not None:
        found = _without_padding(position_ids.expand(B, -1), past)
    else:
        raise InputError("the mask is one of attention; give the mask of padding [B, T], or position_ids as well")
    if found.shape[1] != T or (found[:, -1] < 0).any():
        raise InputError(f"the mask must cover the cache and {T} new tokens, with padding on the left")
    return found


def _without_padding(position_ids: torch.Tensor, past: int) -> torch.Tensor:
    """position_ids [B, T] with -1 in place of padding: where the row does not count up to its last token."""
    last = position_ids[:, -1:]
    counted = last - torch.arange(position_ids.shape[1], device=last.device).flip(0)
    fits = (position_ids == counted) & (position_ids >= min(past, 1))
    is_token = fits.long().flip(1).cumprod(1).flip(1) > 0
    is_padded_right = (position_ids > last).any(1, keepdim=True)
    return position_ids.masked_fill(~is_token | is_padded_right, -1)


def check_last_token(cache, mask) -> None:
    """Raise InputError if a mask of padding hides the cache's last token, which the next token's code needs."""
    past = _length(cache)
    if past and _is_padding_mask(mask) and not mask[:, past - 1].all():
        raise InputError("a calibrated plan needs the cache's last token, which a row's mask hides; encode it again")


def normalised(h: torch.Tensor, norm) -> torch.Tensor:
    """h [B, T, D] / rms(h), without the norm's weight."""
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return F.rms_norm(h.float(), h.shape[-1:], eps=eps).to(h.dtype)


def rotated(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """k [B, T, K, E] at its rotary positions. cos and sin are [B, T, E], with equal halves."""
    first, second = k.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return k * cos[:, :, None] + turned * sin[:, :, None]


def latest(cache, start: int, x: torch.Tensor) -> torch.Tensor:
    """The normalised state [B, D] of the cache's last token as it entered layer `start`; zeros for an empty cache.

    x [B, T, D] are the states of the tokens that follow. The last of them is kept beside the cache for the next call.
    """
    kept = vars(cache).setdefault("pruned_states", {})
    past = int(cache.get_seq_length(start))
    length = 0
    state = torch.zeros_like(x[:, 0])
    if past:
        length, state = kept.get(start, (0, state))
    if x.shape[1] > 1 and (length != past or state.shape != x[:, 0].shape):
        raise InputError("the cache's last token was encoded without this calibrated plan; encode it again")
    kept[start] = past + x.shape[1], x[:, -1].clone()
    return state


def as_pop(model) -> pop.Model:
    """The same model for pop's engine, with the same weights in the same memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = read_config(folder)
    with torch.device("meta"):
        module = models.build(config)
    weights = model.state_dict()
    names = module.state_dict().keys()
    missing = names - weights.keys()
    if missing:
        raise UnsupportedError(f"the model lacks {min(missing)}; merge its adapters, and use plain weights")
    module.load_state_dict({name: weights[name] for name in names}, assign=True)
    return pop.Model(module.eval(), config, compile=False)


def calibrate(model, texts, plan, **options) -> pop.PrunePlan:
    """Calibrate the plan for a model of transformers. Texts are lists of token ids; see pop.calibrate."""
    return pop.calibrate(as_pop(model), texts, plan, **options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call without -m
    from tools.transformers_check import main

    sys.exit(main())
