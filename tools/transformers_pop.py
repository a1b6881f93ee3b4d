"""Pruned prefill for a model of Hugging Face's transformers: `with pruned(model, plan): model.generate(...)`.

    python -m tools.transformers_pop --check                    # compare it with pop's engine; needs transformers

Inside the context, a call with several tokens a row is a prompt, or a chat's next turn on a filled cache: it is pruned.
A call with one token is decode: it runs at full depth. tools/examples/README.md states what it takes and refuses.
The last states and the logits of pruned tokens leave the model as NaN, because they predict nothing that pop's engine
would. Of output_hidden_states, those after pruned layers are meaningless too.

Nothing of transformers is subclassed or copied. The decoder and the pruned layers get another `forward` as an attribute
of the instance. It hides the class's own until the context ends. A pruned layer computes K and V of all tokens from the
state h that enters its group. Then its own forward runs on the full-depth rows f, with `Overwritten` as its cache. If
the plan selects tokens, here only of the new ones, they join these rows at the selecting layer:

    h [B, T, D] ──► k, v of all tokens ─────────────────┐
    f [B, W, D] ──► the layer's own forward ──► k, v ──► written over them ──► cache ──► what f attends to

Masks, windows, rotary positions and caches remain those of transformers. Shape letters: pop/models/layers.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from functools import partial, wraps
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F

import pop
from pop import InputError, MissingExtra, UnsupportedError, selection

FIRST = (5, 2)  # versions of transformers; tried: 5.2.0, 5.6.2, 5.12.1, 5.18.0, 5.19.0, 5.22.2, 5.23.0 and 5.24.0
LAST = (5, 24)
STATIC = (5, 6)  # before, a static cache takes its nonzero keys for its length
FAMILIES = "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"
# Options of generate that split a prompt into several calls, or that check several new tokens in one call, or that run
# a loop from elsewhere.
REFUSED = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size",
    "custom_generate", "trust_remote_code",
)  # fmt: skip
CACHES = "cache", "past_key_values"  # the cache's name as of 5.24, and before


def library():
    """The package transformers and its version. Raises UnsupportedError outside the range in which this was tried."""
    wanted = f"run pip install 'transformers>={FIRST[0]}.{FIRST[1]},<{LAST[0]}.{LAST[1] + 1}'"
    try:
        import transformers
    except ImportError:
        raise MissingExtra(f"this needs the package transformers; {wanted}") from None
    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    if not FIRST <= version <= LAST:
        raise UnsupportedError(f"transformers is {transformers.__version__}, with which this was not tried; {wanted}")
    return transformers, version


class pruned:
    """A context in which a model's prompts skip the layers of a plan. It may be entered again, but not nested.

    Args:
        model: A model of transformers, one of FAMILIES.
        plan: A pop.PrunePlan, or anything else that `pop.load` takes as `prune`.

    Raises:
        UnsupportedError, PlanError: The model or the plan is not one of those that tools/examples/README.md lists.
    """

    def __init__(self, model, plan):
        transformers, self.version = library()
        if type(model) not in [getattr(transformers, name) for name in FAMILIES]:
            raise UnsupportedError(f"the model is a {type(model).__name__}; pruned takes {', '.join(FAMILIES)}")
        self.model = model
        self.decoder = model.model
        self.layers = model.model.layers
        self.plan = pop.PrunePlan.of(plan, len(self.layers))
        self.replaced: list[tuple] = []  # see `_replacements`
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
        self.replaced = list(self._replacements())
        for part, name, function in self.replaced:
            setattr(part, name, function)
        return self.model

    def __exit__(self, *_):
        for part, name, _ in self.replaced:
            delattr(part, name)

    def _replacements(self) -> Iterator[tuple]:
        """Yield a part of the model, the name of a function of its class, and what hides it inside the context."""
        model = self.model
        yield model, "generate", partial(self._generate, model.generate)
        yield model, "init_continuous_batching", refuse_continuous_batching  # generate_batch calls it, too
        yield model, "forward", without_labels(model.forward)
        yield self.decoder, "forward", partial(self._run_decoder, self.decoder.forward)
        for group in self.plan.groups(len(self.layers)):
            for index in group.layers:
                layer = self.layers[index]
                if group.is_pruned:
                    yield layer, "forward", PrunedLayer(layer, index, group)
                elif self.plan.full_depth_selected and index == self.plan.selects_at:
                    yield layer, "forward", partial(select_and_run, layer, layer.forward)

    def _generate(self, generate, *args, **kwargs):
        given = signature(generate).bind(*args, **kwargs)
        given = given.arguments | given.kwargs
        config = given.get("generation_config")
        for options in (given, vars(self.model.generation_config), {} if config is None else vars(config)):
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
        if not hasattr(cache, "get_seq_length") and cache is not None:  # as of continuous batching
            raise UnsupportedError(f"pruned cannot use a {type(cache).__name__}; give a dynamic or static cache")
        mask = kwargs.get("attention_mask")
        if self.version < STATIC and getattr(cache, "is_compileable", False):
            raise UnsupportedError("static caches need transformers 5.6; upgrade it, or give a dynamic cache")
        position = positions(B, T, cache, mask, kwargs.get("position_ids"))
        if self.is_calibrated:
            check_last_token(cache, mask)
        prompt = Prompt(position.to(self.model.device), self.plan)
        if torch.equal(prompt.at_full_depth, prompt.is_token):
            return forward(input_ids, **kwargs)
        out = forward(input_ids, **kwargs, pruned_prompt=prompt)  # passed on to all layers
        if prompt.layers_run != len(self.plan.layers):
            raise InputError("the context ended during a prompt; leave it after all calls have returned")
        if self.plan.layers:
            out[0][:, :-1] = torch.nan  # [B, T, D]; what follows in a prompt has no score, since it is not an answer
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
        self.keeps_states = self.number == 0 and self.corrections is not None

    def __call__(self, hidden_states, *, pruned_prompt=None, **kwargs):
        h = hidden_states  # [B, T, D]
        prompt = pruned_prompt
        cache = _cache(kwargs)
        if cache is None and h.shape[1] > 1:
            raise InputError("pruned prefill writes a cache, but use_cache is off; turn it on")
        if prompt is None:  # decode, or a prompt at full depth
            out = self.forward(h, **kwargs)
            if self.keeps_states and cache is not None:
                keep(cache, self.index, self._normalised(h[:, -1:]))
            return out
        if self.number == 0:
            prompt.h = h
            prompt.z = self._code(h, prompt.is_token, cache) if self.keeps_states else None
        f = self._run_rows(h, prompt, kwargs)
        if self.keeps_states:
            keep(cache, self.index, self._normalised(h[:, -1:]))
        prompt.layers_run += 1
        if self.is_last and self.corrections is not None:
            h = self.corrections.with_update(h, prompt.z)
        at = prompt.rows[..., None].expand_as(f)  # [B, W, D]
        return h.scatter(1, at, f)

    def _normalised(self, h) -> torch.Tensor:
        """h [B, T, D] / rms(h), without the weight of the layer's first norm."""
        norm = self.layer.input_layernorm
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return F.rms_norm(h.float(), h.shape[-1:], eps=eps).to(h.dtype)

    def _code(self, h, is_token, cache) -> torch.Tensor:
        """The code z [B, T, R] of the state that enters the group."""
        x = self._normalised(h)
        previous = latest(cache, self.index, x)[:, None]  # [B, 1, D]
        x = x.where(is_token[..., None], previous)  # padding precedes a row's first token
        before = torch.cat((previous, x[:, :-1]), dim=1)  # [B, T, D]
        return F.linear(torch.cat((x, before), dim=-1), self.corrections.shared)

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
            for_k, for_v = F.linear(prompt.z, self.corrections.weight[self.number]).chunk(2, dim=-1)
            k = k + for_k
            v = v + for_v
        k = rotated(by_head(k, attention, "k_norm"), *tables)  # [B, T, K, E]
        v = by_head(v, attention)
        return k.transpose(1, 2), v.transpose(1, 2)


def select_and_run(layer, forward, hidden_states, *, pruned_prompt=None, **kwargs):
    """The `forward` of the selecting layer inside the context."""
    if pruned_prompt is not None:
        pruned_prompt.select(layer, hidden_states, kwargs["position_embeddings"])
    return forward(hidden_states, **kwargs)


class Prompt:
    """The tokens [B, T] of a call, on their way through the pruned layers.

    Args:
        position: [B, T], of each token in its sequence, -1 for padding.
        plan: Decides which tokens run at full depth.
    """

    def __init__(self, position: torch.Tensor, plan: pop.PrunePlan):
        self.position = position
        self.plan = plan
        self.is_token = position >= 0  # [B, T]
        # Those that run every layer: [B, T]. Selected tokens are not among them.
        self.at_full_depth = self.is_token & plan.at_full_depth(position, position[:, -1:] + 1)
        self.rows = columns_of(self.at_full_depth)  # [B, W]: the columns that run the next pruned layers
        self.h: torch.Tensor | None = None  # [B, T, D], enters the present group
        self.z: torch.Tensor | None = None  # its code [B, T, R], in a calibrated plan
        self.layers_run = 0

    def select(self, layer, h: torch.Tensor, tables) -> None:
        """Let the tokens that the prompt's last ones attend to most run the pruned layers from here on.

        h [B, T, D] enters the selecting layer, and `tables` are its rotary ones.
        """
        others = self.is_token & ~self.at_full_depth
        counts = [self.plan.num_selected(number) for number in others.sum(1).tolist()]
        if not any(counts):
            return
        attention = layer.self_attn
        x = layer.input_layernorm(h)
        k = rotated(by_head(attention.k_proj(x), attention, "k_norm"), *tables)  # [B, T, K, E]
        last = slice(-selection.SELECTING, None)
        last_tables = (table[:, last] for table in tables)
        q = rotated(by_head(attention.q_proj(x[:, last]), attention, "q_norm"), *last_tables)  # [B, Q, H, E]
        received = selection.attention_received(q, k, self.position[:, last], self.position, attention.scaling)
        selected = selection.most_attended(received, others, torch.tensor(counts, device=h.device))
        self.rows = columns_of(self.at_full_depth | selected)


def columns_of(chosen: torch.Tensor) -> torch.Tensor:
    """The columns [B, W] of the chosen tokens [B, T] bool, in order. Rows with fewer of them repeat the last column."""
    T = chosen.shape[1]
    counts = chosen.sum(1, keepdim=True)  # [B, 1]
    W = int(counts.max())
    ordered = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]
    return ordered.where(torch.arange(W, device=chosen.device) < counts, T - 1)


class Overwritten:
    """The cache that a layer sees when it runs on some rows: it writes their K and V over those of all tokens.

    Args:
        cache: The cache of transformers.
        k, v: Of all tokens, [B, K, T, E].
        rows: [B, W], the columns that the layer runs.
        filled: How many slots the layer attends to. None: all that the cache returns.
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


def refuse_continuous_batching(*_, **__):
    raise UnsupportedError("continuous batching hides which tokens end a prompt; call generate, or leave pruned")


def without_labels(forward):
    """A model's forward, except that it refuses labels. Its signature stays, because generate reads it."""
    parameters = signature(forward)

    @wraps(forward)
    def checked(*args, **kwargs):
        if parameters.bind(*args, **kwargs).arguments.get("labels") is not None:  # also of a call by position
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
    """Raise InputError if a row's mask hides the cache's last token, which the next token's code needs.

    Args:
        cache: Of transformers, or None.
        mask: Of padding, [B, slots]; or of attention, [B, 1, T, slots], where a hidden slot is False or the lowest
            number; or one of attention for each kind of layer. `generate` gives the latter two with static caches.
    """
    past = _length(cache)
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not past or mask is None:
        return
    if _is_padding_mask(mask):
        is_hidden = mask[:, past - 1] == 0  # [B]
    else:
        seen = mask[:, 0, -1, past - 1]  # [B], by the last new token
        is_hidden = seen < 0 if seen.is_floating_point() else ~seen
    if is_hidden.any():
        raise InputError("a calibrated plan needs the cache's last token, which a row's mask hides; encode it again")


def by_head(x: torch.Tensor, attention, norm: str = "") -> torch.Tensor:
    """x [B, T, heads * E] -> [B, T, heads, E], normalised if the family has a norm of that name."""
    x = x.unflatten(-1, (-1, attention.head_dim))
    return getattr(attention, norm)(x) if hasattr(attention, norm) else x


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, T, heads, E] at its rotary positions. cos and sin are [B, T, E], with equal halves."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


def keep(cache, start: int, x: torch.Tensor) -> None:
    """Keep the normalised state x [B, 1, D] of the cache's last token, as it entered layer `start`, beside the cache.

    The layer's keys are kept with it. If others have taken their place, the cache was cut or its rows were reordered.
    """
    kept = vars(cache).setdefault("pruned_states", {})
    kept[start] = int(cache.get_seq_length(start)), cache.layers[start].keys, x[:, 0].clone()


def latest(cache, start: int, x: torch.Tensor) -> torch.Tensor:
    """What `keep` has kept of the cache's last token [B, D], zeros for an empty cache. x [B, T, D]: what follows it."""
    past = int(cache.get_seq_length(start))
    if not past:
        return torch.zeros_like(x[:, 0])
    length, keys, state = vars(cache).get("pruned_states", {}).get(start, (0, None, None))
    if length != past or keys is not cache.layers[start].keys or state.shape != x[:, 0].shape:
        raise InputError("the cache's last token was encoded without this calibrated plan, or moved; encode it again")
    return state


def as_pop(model) -> pop.Model:
    """The same model for pop's engine, with the same weights in the same memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        module = pop.build(folder)
    weights = model.state_dict()
    names = module.state_dict().keys()
    missing = names - weights.keys()
    if missing:
        raise UnsupportedError(f"the model lacks {min(missing)}; merge its adapters, and use plain weights")
    module.load_state_dict({name: weights[name] for name in names}, assign=True)
    return pop.Model(module, module.config, compile=False)


def calibrate(model, texts, plan, **options) -> pop.PrunePlan:
    """Calibrate the plan for a model of transformers. Texts are lists of token ids; see pop.calibrate."""
    return pop.calibrate(as_pop(model), texts, plan, **options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call without -m
    from tools.transformers_check import main

    sys.exit(main())
