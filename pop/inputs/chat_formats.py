"""The chat formats of the families, each equal to the chat_template of its checkpoints."""

import datetime
import json
import re
from typing import Any

from pop.errors import InputError
from pop.inputs.chat import ChatFormat, Turn, to_json


class Llama3(ChatFormat):
    """Llama-3, before 3.1."""

    family = "Llama-3"
    ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    bos = "<|begin_of_text|>"
    before = "<|start_header_id|>{}<|end_header_id|>\n\n"
    after = "<|eot_id|>"

    def arrange(self, turns, tools):
        return [turn._replace(parts=[turn.text.strip()]) for turn in turns]


class Llama31(Llama3):
    """Llama-3.1 and 3.3. There is always a system message, which begins with two dates. Tools are the user's text."""

    family = "Llama-3.1"
    tools = True
    guide = (
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        "argument name and its value}.Do not use variables.\n\n"
    )

    def today(self) -> str:
        return "26 Jul 2024"

    def arrange(self, turns, tools):
        turns = [self._written(turn) for turn in turns]
        system = turns.pop(0).text if turns[0].role == "system" else ""
        if tools:
            if not turns or turns[0].role != "user":
                raise InputError("the tools stand in the user's first message, but the conversation begins otherwise.")
            listed = "".join(to_json(tool, indent=4) + "\n\n" for tool in tools)
            turns[0] = Turn("user", [self.guide + listed + turns[0].text])
        environment = "Environment: ipython\n" if tools else ""
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {self.today()}\n\n"
        return [Turn("system", [environment + dates + system]), *turns]

    def _written(self, turn: Turn) -> Turn:
        if len(turn.calls) > 1:
            raise InputError(f"{self.family} calls one tool at a time, not {len(turn.calls)}.")
        for name, arguments in turn.calls:
            return Turn("assistant", [f'{{"name": "{name}", "parameters": {to_json(arguments)}}}'])
        return Turn("ipython", [to_json(turn.text)]) if turn.role == "tool" else Turn(turn.role, [turn.text.strip()])

    def parse_tool_calls(self, text: str) -> list[dict]:
        try:
            call = json.loads(text)
            return [tool_call(call["name"], call["parameters"])]
        except (ValueError, LookupError, TypeError, RecursionError):  # an answer in words
            return []


class Llama32(Llama31):
    """Llama-3.2: the date is today's."""

    family = "Llama-3.2"

    def today(self) -> str:
        return datetime.datetime.now().strftime("%d %b %Y")


class ChatML(ChatFormat):
    """Plain ChatML."""

    family = "ChatML"
    ends = ("<|im_end|>", "<|endoftext|>")
    before = "<|im_start|>{}\n"
    after = "<|im_end|>\n"


class SmolLM2(ChatML):
    """ChatML with a default system message."""

    family = "SmolLM2"
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

    def arrange(self, turns, tools):
        return turns if turns[0].role == "system" else [Turn("system", [self.system]), *turns]


class Qwen3Instruct(ChatML):
    """Qwen3 and Qwen3-VL that never think: ChatML with tools. To Qwen's tokenizer, the tags are ordinary tokens."""

    family = "Qwen3-Instruct"
    tools = True
    guide = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\nFor each function call, return a "
        "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
    )

    def arrange(self, turns, tools):
        turns, written, previous = self.with_thoughts(turns), [], None
        if tools:
            system = turns.pop(0).text + "\n\n" if turns[0].role == "system" else ""
            listed = "".join("\n" + to_json(tool) for tool in tools)
            written.append(Turn("system", [system + self.guide.format(listed)]))
        for turn in turns:
            if turn.role == "tool":  # the results of several calls are one turn
                result = f"<tool_response>\n{turn.text}\n</tool_response>"
                if previous == "tool":
                    written[-1].parts.append("\n" + result)
                else:
                    written.append(Turn("user", [result]))
            else:
                calls = [f'{{"name": "{name}", "arguments": {to_json(given)}}}' for name, given in turn.calls]
                calls = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
                last = ["\n".join(filter(None, [turn.parts[-1], *calls]))] if calls else turn.parts[-1:]
                written.append(turn._replace(parts=turn.parts[:-1] + last))
            previous = turn.role
        return written

    def with_thoughts(self, turns: list[Turn]) -> list[Turn]:
        return turns

    def parse_tool_calls(self, text: str) -> list[dict]:
        calls = []
        for found in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL):
            try:
                call = json.loads(found)
                calls.append(tool_call(call["name"], call["arguments"]))
            except (ValueError, LookupError, TypeError, RecursionError):
                raise InputError(f"a tool call is not JSON with a name and arguments: {found!r:.80}") from None
        return calls


class Qwen3(Qwen3Instruct):
    """Qwen3 that may think. Thoughts before the user's last message are dropped."""

    family = "Qwen3"
    without_thoughts = "<think>\n\n</think>\n\n"

    def with_thoughts(self, turns):
        response = re.compile("<tool_response>.*</tool_response>", re.DOTALL)  # of a tool, in a user's name
        asked = [n for n, turn in enumerate(turns) if turn.role == "user" and not response.fullmatch(turn.text)]
        last, written = asked[-1] if asked else len(turns), []
        for n, turn in enumerate(turns):
            if turn.role == "assistant":
                thoughts, answer = split_thoughts(turn.text)
                if turn.thoughts is not None:
                    thoughts, answer = turn.thoughts, turn.text
                if n > last and (thoughts or n == len(turns) - 1):
                    kept = "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n"
                    turn = turn._replace(parts=[kept, answer.lstrip("\n")])
                else:
                    turn = turn._replace(parts=[answer])
            written.append(turn)
        return written


class Qwen3Thinking(Qwen3):
    """Qwen3 and Qwen3-VL that always think: the prompt opens the thought."""

    family = "Qwen3-Thinking"
    opening = "<think>\n"
    without_thoughts = None


def split_thoughts(text: str) -> tuple[str, str]:
    """Return the thoughts and the answer of a text with <think>...</think>, whose first tag may be in the prompt."""
    if "</think>" not in text:
        return "", text
    thoughts, *_, answer = text.split("</think>")
    return thoughts.rstrip("\n").split("<think>")[-1].lstrip("\n"), answer.lstrip("\n")


class Gemma(ChatFormat):
    """Gemma-3. It does not know the role system, so the system's text goes before the user's first message."""

    family = "Gemma"
    ends = ("<end_of_turn>", "<eos>")
    bos = "<bos>"
    before = "<start_of_turn>{}\n"
    after = "<end_of_turn>\n"
    assistant = "model"

    def arrange(self, turns, tools):
        system = []
        if turns[0].role == "system":
            system, turns = [*turns[0].parts, "\n\n"], turns[1:]
        roles = [turn.role for turn in turns]
        if not roles or roles != [("user", "assistant")[n % 2] for n in range(len(roles))]:
            raise InputError(f"Gemma takes turns of user and assistant, not of {', '.join(roles) or 'system'}.")
        stripped = [[part.strip() if isinstance(part, str) else part for part in turn.parts] for turn in turns]
        stripped[0] = [*system, *stripped[0]]
        return [Turn(role, parts) for role, parts in zip(roles, stripped, strict=True)]


FORMATS: dict[str, type[ChatFormat]] = {
    "llama-3.1": Llama31,
    "llama-3.2": Llama32,
    "llama-3": Llama3,
    "smollm2": SmolLM2,
    "qwen3": Qwen3,
    "qwen3-thinking": Qwen3Thinking,
    "chatml": ChatML,
    "qwen3-instruct": Qwen3Instruct,  # after ChatML, which it equals but for tools
    "gemma": Gemma,
}


def tool_call(name: str, arguments: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
