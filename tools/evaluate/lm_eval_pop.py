"""lm-evaluation-harness with `pop` as a model: its command line, options and tasks.

    pip install -e . lm_eval
    python -m tools.evaluate.lm_eval_pop --model pop --model_args name=llama3.1-8b,prune=default --tasks hellaswag,piqa

tools/evaluate/README.md lists the --model_args. All other options are the harness's own. Tasks of your own, such as a
YAML file next to a local .jsonl, are found with `--include_path FOLDER`.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import ClassVar

import torch

import pop
from pop.errors import InputError, MissingExtra
from pop.models.config import DTYPES
from tools.common import exit_status
from tools.evaluate.adapter import PopAdapter


def load_model(
    name=None, prune="default", full_depth_last=None, dtype=None, device=None, max_seq_len=None, compile="auto"
) -> pop.Model:
    """The model that --model_args describe. The harness has turned their values into numbers, booleans and None."""
    if name is None:
        raise InputError("--model_args has no name; write name=NAME_OR_DIR, with a name that `pop models` lists")
    model = pop.load(
        str(name),
        prune=prune,
        dtype=DTYPES.get(dtype, dtype),
        device=device,
        max_seq_len=max_seq_len,
        compile=compile,
    )
    if full_depth_last is not None:
        model.plan = replace(model.plan, full_depth_last=full_depth_last)
    return model


def register() -> type:
    """Make `pop` one of the harness's models, and return its class. Raises MissingExtra without the harness."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise MissingExtra(
            f"lm_eval_pop needs lm-evaluation-harness ({error}); install it next to pop: `pip install -e . lm_eval`, "
            "best in a separate virtual environment"
        ) from None

    @register_model("pop")
    class PopLM(PopAdapter, LM):
        made: ClassVar[list[PopAdapter]] = []  # by the harness, which does not hand them out

        def __init__(self, *, batch_size=1, **model_args):
            known = inspect.signature(load_model).parameters
            if unknown := [key for key in model_args if key not in known]:
                raise InputError(f"--model_args has no {unknown[0]}; it takes {', '.join(known)} and batch_size")
            LM.__init__(self)
            PopAdapter.__init__(self, load_model(**model_args), batch_size, str(model_args["name"]))
            self.made.append(self)

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config=None):
            """Like the harness's own method, but --model_args override --batch_size and --device."""
            options = {key: value for key, value in (additional_config or {}).items() if value is not None}
            if options.get("device") == "cuda:0" and not torch.cuda.is_available():
                del options["device"]  # the default of --device, whatever the machine has
            return cls(**{**options, **arg_dict})

    return PopLM


def main() -> int:
    """Run the harness's command line on sys.argv. Returns the exit status, 2 for a mistake told in one sentence."""

    def evaluate():
        models = register().made
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()  # which prints the accuracies
        for model in models:
            print(model.summary())

    return exit_status("lm_eval_pop", evaluate)


if __name__ == "__main__":
    sys.exit(main())
