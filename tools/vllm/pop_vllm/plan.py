"""What is refused before the weights load, and what a request says of POP_PLAN."""

import os
from functools import cache, wraps

from pop import PlanError, PrunePlan
from pop_vllm.checks import check_architecture


@cache
def install() -> None:
    """Wrap two methods of vLLM's input processor, which exists before the engine.

    It refuses models that cannot be pruned, a POP_PLAN that cannot be used, and requests for other plans where they
    arrive, so that clients see why.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    init = InputProcessor.__init__
    process = InputProcessor.process_inputs

    @wraps(init)
    def wrapped_init(self, vllm_config, *args, **kwargs):
        check_architecture(vllm_config)
        model_config = vllm_config.model_config
        plan = PrunePlan.of(os.environ["POP_PLAN"], model_config.hf_text_config.num_hidden_layers)
        check_widths(plan, model_config)
        self.pop_longest = longest()
        init(self, vllm_config, *args, **kwargs)

    @wraps(process)
    def wrapped(self, request_id, prompt, params, *args, **kwargs):
        try:
            may_prune(params)
        except PlanError as error:
            raise VLLMValidationError(str(error), parameter="pop_plan") from None
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if self.pop_longest is not None and len(request.prompt_token_ids or ()) > self.pop_longest:
            opt_out(request.sampling_params)
        return request

    InputProcessor.__init__ = wrapped_init
    InputProcessor.process_inputs = wrapped


def check_widths(plan: PrunePlan, model_config) -> None:
    """Raise PlanError if a plan's corrections are those of a model with other widths.

    Quantised weights cannot be compared with a plan's sketch, so nothing else would notice before a prompt is pruned.
    """
    if plan.corrections is None:
        return
    codes = plan.corrections.shared  # [m, R, 2 * D]
    outputs = plan.corrections.weight  # [n, 2, K * E, R]
    width = model_config.get_hidden_size()
    keys = model_config.get_total_num_kv_heads() * model_config.get_head_size()
    if codes.shape[2] != 2 * width or outputs.shape[2] != keys:
        raise PlanError(
            f"POP_PLAN is for a model with a width of {codes.shape[2] // 2} and keys of {outputs.shape[2]} numbers, "
            f"and this one has {width} and {keys}; give this model's own plan"
        )


def longest() -> int | None:
    """How many tokens a prompt may have that is pruned: POP_LONGEST. None: it is not set. Raises PlanError."""
    text = os.environ.get("POP_LONGEST")
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise PlanError(f"POP_LONGEST is {text!r:.40}; it must be the tokens of the longest prompt that is pruned")
    return int(text)


def opt_out(params) -> None:
    """Let a request run at full depth, as if it had asked for it. params: its own SamplingParams, or None."""
    if params is not None:
        params.extra_args = (params.extra_args or {}) | {"pop_plan": "none"}


def may_prune(params) -> bool:
    """Whether a request may be pruned. Not if it asks for log-probabilities of its prompt, or opts out.

    Args:
        params: The request's SamplingParams, or None if it samples nothing.

    Raises:
        PlanError: Its `pop_plan` is another plan. The server has only its own.
    """
    if params is None:
        return False
    wanted = (params.extra_args or {}).get("pop_plan")
    if wanted not in (None, "none"):
        advice = "give 'none', or leave it out for the server's plan"
        raise PlanError(f"the request's pop_plan is {wanted!r:.100}; {advice}")
    scores_prompt = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
    return wanted is None and not scores_prompt
