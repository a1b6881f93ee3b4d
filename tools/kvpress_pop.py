"""Pruned prefill as a press of kvpress, so that its evaluation and leaderboard can run plans.

    pip install kvpress && git clone https://github.com/NVIDIA/kvpress
    python -m tools.kvpress_pop kvpress/evaluation --plan my.plan --model Qwen/Qwen3-8B --data_dir 4096

The options after --plan and --data are those of kvpress's evaluate.py, which gets the press `pop`. --data names a local
copy of the data set, which is then not fetched. In Python, with kvpress's pipeline:

    pipe(context, question=question, press=PopPress("my.plan"))

Other presses take K and V out of the cache after a full prefill. This one prunes the prefill and keeps the whole cache,
so its compression_ratio is 0. As with the others, the question that follows runs at full depth.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

from pop import InputError, MissingExtra, PrunePlan
from tools.common import exit_status
from tools.transformers_pop import pruned


@dataclass
class PopPress:
    """A press that prunes the prefill of a context.

    Args:
        plan: A pop.PrunePlan, or anything else that `pruned` takes.
        compression_ratio: How much of the cache is removed: 0.
    """

    plan: str | float | PrunePlan = "third"
    compression_ratio: float = 0.0
    context: pruned | None = field(default=None, init=False, repr=False)  # of the latest model

    def __call__(self, model) -> pruned:
        """A context in which the model's prompts are pruned. Raises InputError for another compression_ratio than 0."""
        if self.compression_ratio:
            given = f"compression_ratio is {self.compression_ratio}"
            raise InputError(f"{given}, but PopPress removes nothing from the cache; give 0, and choose a plan")
        if self.context is None or self.context.model is not model:
            self.context = pruned(model, self.plan)  # kept, because it compares a calibrated plan with the weights
        return self.context


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.kvpress_pop", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("evaluation", help="the folder of kvpress's evaluate.py")
    parser.add_argument("--plan", default="third", help="a saved plan, a share of the layers, or layers")
    parser.add_argument("--data", help="a local copy of the data set")
    args, options = parser.parse_known_args(argv)

    def evaluate():
        sys.path.insert(0, args.evaluation)
        try:
            import evaluate_registry
            from evaluate import CliEntryPoint
            from fire import Fire
        except ImportError as error:
            wanted = "pip install 'kvpress[eval]', and name the folder evaluation/ of its repository"
            raise MissingExtra(f"this needs kvpress and its evaluation ({error}); {wanted}") from None
        evaluate_registry.PRESS_REGISTRY["pop"] = PopPress(args.plan)
        if args.data is not None:
            registry = evaluate_registry.DATASET_REGISTRY
            registry.update(dict.fromkeys(registry, args.data))
        Fire(CliEntryPoint, [*options, "--press_name", "pop", "--compression_ratio", "0"])

    return exit_status("tools.kvpress_pop", evaluate)


if __name__ == "__main__":
    sys.exit(main())
