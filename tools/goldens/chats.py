"""Make the golden conversations with tools and thoughts, by the checkpoints' own chat templates.

    python -m tools.goldens.chats FORMAT=FOLDER ...

Makes tests/goldens/tokenizers/chats.json. FORMAT is llama-3.1, llama-3.2, qwen3 or qwen3-instruct. FOLDER holds a
published tokenizer_config.json, or a chat_template.jinja. The ids are those of the reduced tokenizers that
tokenizers.py and added_tokens.py make.
"""

import hashlib
import json
import sys
from pathlib import Path

from tools.goldens.tokenizers import GOLDENS, MADE_WITH, transformers, write

TOKENIZERS = {"llama-3.1": "llama-3.1", "llama-3.2": "llama-3.1", "gemma": "gemma3"}  # the others: qwen3
BOS = {"llama-3.1": "<|begin_of_text|>", "llama-3.2": "<|begin_of_text|>", "gemma": "<bos>"}
WITH_IDS = 4  # the conversation whose ids are kept
DATE = "01 Feb 2025"  # in place of today's


def function(name: str, **properties: str) -> dict:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f'The "{name}" é <b>', "parameters": schema}}


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [function("weather", city="string", days="integer"), function("add", x="number")]
SYSTEM = {"role": "system", "content": " Be brief. "}
HI = {"role": "user", "content": " Is it warm\nin Paris? "}
AND = {"role": "user", "content": "And now?"}
RESULT = {"role": "tool", "content": '{"warm": "né"}'}
ONE = {"role": "assistant", "content": "", "tool_calls": [call("weather", city='Paris "é"', days=2)]}
TWO = {"role": "assistant", "content": "So:", "tool_calls": [call("add", x=1.5), call("weather", city="", days=None)]}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nNo.\n"}
APART = {"role": "assistant", "content": "\nNo.", "reasoning_content": "\nHm.\n"}
CONVERSATIONS = [
    ([HI], {"tools": TOOLS}),
    ([SYSTEM, HI], {"tools": TOOLS[:1]}),
    ([SYSTEM, HI, ONE, RESULT], {"tools": TOOLS}),
    ([HI, ONE, RESULT], {}),
    ([HI, ONE, RESULT, RESULT | {"content": "2"}, {"role": "assistant", "content": "Yes. "}, AND], {"tools": TOOLS}),
    ([HI, TWO, RESULT, RESULT, THOUGHT, AND, ONE, RESULT], {"tools": TOOLS}),
    ([HI, TWO, RESULT, THOUGHT], {"add_generation_prompt": False}),
    ([HI, THOUGHT, AND, THOUGHT], {"add_generation_prompt": False}),
    ([HI, APART, AND], {}),
    ([HI, APART], {"add_generation_prompt": False}),
    ([HI, APART | ONE | {"content": "Let us see."}, RESULT, APART | ONE, RESULT], {"tools": TOOLS}),
    ([HI, {"role": "assistant", "content": "plain"}], {"add_generation_prompt": False}),
    ([SYSTEM, HI, {"role": "assistant", "content": " x "}, AND], {"enable_thinking": False}),
    ([AND, {"role": "user", "content": "<tool_response>\nold\n</tool_response>"}, THOUGHT, THOUGHT], {}),
]


def main() -> None:
    golden = {"made_with": MADE_WITH, "date": DATE, "cases": CONVERSATIONS, "templates": {}}
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        jinja = Path(folder) / "chat_template.jinja"
        if jinja.is_file():
            template = jinja.read_text()
        else:
            template = json.loads((Path(folder) / "tokenizer_config.json").read_bytes())["chat_template"]
        file = GOLDENS / TOKENIZERS.get(name, "qwen3") / "tokenizer.json"
        bos = {"bos_token": BOS[name]} if name in BOS else {}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=template, **bos)
        texts = []
        for messages, options in CONVERSATIONS:
            given = {"add_generation_prompt": True, "date_string": DATE} | options
            if name == "llama-3.1":
                del given["date_string"]
            try:
                texts.append(tokenizer.apply_chat_template(messages, tokenize=False, **given))
            except Exception:  # not a conversation for this template
                texts.append(None)
        ids = tokenizer(texts[WITH_IDS], add_special_tokens=False)["input_ids"]
        sha256 = hashlib.sha256(template.encode()).hexdigest()
        golden["templates"][name] = {"sha256": sha256, "texts": texts, "ids": ids}
    write(GOLDENS / "chats.json", golden)


if __name__ == "__main__":
    main()
