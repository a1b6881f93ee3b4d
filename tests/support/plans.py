"""Plans as values that compare."""


def contents(plan) -> dict:
    """What a plan holds, for ==. Corrections compare by identity, so two plans with equal ones differ."""
    held = plan.fields()
    if plan.corrections is not None:
        tensors = plan.corrections.tensors | {"sketch": plan.corrections.sketch}
        held |= {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}
    return held
