"""Logged requests as the prompts that `vllm bench serve --dataset-name custom` sends.

    python -m tools.vllm.prompts FOLDER requests.jsonl prompts.jsonl

A line of requests.jsonl is {"messages": [...]}, with "tools" if there are some. A line of prompts.jsonl is the text
that the server would make of it, without BOS, which the server adds.
"""

import argparse
import json
import sys
from types import SimpleNamespace

import pop
from pop.checkpoints.registry import find_folder
from pop.cli.texts import encoded
from pop.errors import InputError
from pop.inputs.chat import chat_format
from pop.system import files
from tools.check_chats import questions_in
from tools.common import exit_status


def prompts_of(folder: str, path: str) -> list[str]:
    """The prompts of a file of requests, by the chat format of a folder or of a name that `pop models` lists."""
    tokenizer = pop.load_tokenizer(find_folder(folder))
    model = SimpleNamespace(chat_format=lambda: chat_format(tokenizer))
    requests = [(f"request {number}", as_text(request)) for number, request in enumerate(questions_in(path), 1)]
    prompts = []
    for ids in encoded(model, requests):
        head = [tokenizer.bos_id] if ids[:1] == [tokenizer.bos_id] else []
        prompts.append(tokenizer.decode(ids[len(head) :], special=True))
    return prompts


def as_text(request: dict) -> dict:
    """A request whose texts in several parts are joined by line breaks, as vLLM joins them."""
    messages = []
    for message in request["messages"]:
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
            message = message | {"content": "\n".join(str(part["text"]) for part in content)}
        messages.append(message)
    template = request.get("chat_template_kwargs")
    thinks = template.get("enable_thinking", True) if isinstance(template, dict) else True
    return {"messages": messages, "tools": request.get("tools"), "enable_thinking": thinks}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.vllm.prompts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with the tokenizer, or a name", metavar="FOLDER")
    parser.add_argument("requests", help="a .jsonl file of requests", metavar="REQUESTS")
    parser.add_argument("prompts", help="the file to write", metavar="PROMPTS")
    args = parser.parse_args(argv)

    def work() -> None:
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts_of(args.model, args.requests)]
        files.write_whole(args.prompts, "".join(lines).encode(), "the prompts", InputError)

    return exit_status("prompts", work)


if __name__ == "__main__":
    sys.exit(main())
