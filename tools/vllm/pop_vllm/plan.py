"""What a request says of POP_PLAN."""

from pop import PlanError


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
