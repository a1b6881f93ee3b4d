"""What a CUDA graph does to a decode step or a pass, without one."""

import torch


class Replay:
    """Runs a function as pop.backends.cuda_graph.Graph does: each call overwrites the memory of the call before.

    The caller gets copies.
    """

    def __init__(self, module, what, other=None):
        self.outputs = None
        self.layers = []

    def __call__(self, step) -> tuple[torch.Tensor, ...]:
        layers = [argument for argument in step.args if isinstance(argument, range)]  # of a pass
        if self.outputs is None:
            self.layers = layers
            self.outputs = step()
        else:
            assert layers == self.layers, "a graph would run the layers of its first call"
            for memory, output in zip(self.outputs, step(), strict=True):
                memory.copy_(output)
        return tuple(output.clone() for output in self.outputs)
