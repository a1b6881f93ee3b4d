"""What a request says of POP_PLAN."""


def may_prune(params) -> bool:
    """Whether a request may be pruned. Not if it asks for log-probabilities of its prompt, or opts out.

    Args:
        params: The request's SamplingParams, or None if it samples nothing.
    """
    if params is None or params.prompt_logprobs is not None:
        return False
    return (params.extra_args or {}).get("pop_plan") != "none"
