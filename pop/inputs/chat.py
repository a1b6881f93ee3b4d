"""Chat formats: conversations to token ids, as each family of instruct models was trained on them.

A format is a checkpoint's chat_template, or the caller's choice (chat_templates.py). Control tokens come only from the
template's own texts. The text of a message is encoded as text, so nothing that a user writes can become one.
"""

import copy
import datetime
import json
import re
from collections.abc import Sequence

from pop.errors import InputError, UnsupportedError
from pop.inputs.chat_templates import TEMPLATES, ControlMarks, jinja
from pop.inputs.messages import read_call, read_messages
from pop.inputs.processors import TEXT_ONLY, Prepared, Processor
from pop.inputs.tokenizers import Tokenizer, any_of

ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "<eos>")  # end any answer, if the tokenizer has them

# The texts of a conversation that shows how a template writes one. No template writes these characters itself.
_QUESTION = "\U0010fffd"
_ANSWER = "\U0010fffc"
_ASKED = {"role": "user", "content": _QUESTION}
_ANSWERED = {"role": "assistant", "content": _ANSWER}


def chat_format(tokenizer: Tokenizer, vision: Processor = TEXT_ONLY, choice=None) -> "ChatFormat":
    """Return the chat format of a checkpoint, or the caller's choice. See `chat_format` in `pop.load`.

    Raises UnsupportedError if there is none, or if the choice does not fit the tokenizer; MissingExtra without jinja2.
    """
    if choice is None and tokenizer.chat_template:
        return ChatFormat(tokenizer, vision, tokenizer.chat_template)
    choices = f"{', '.join(map(repr, TEMPLATES))}, or a template in Jinja as text"
    if choice is None:
        raise UnsupportedError(
            f"the checkpoint has no chat_template, so it is a base model: use generate, or pass chat_format= {choices}"
        )
    if not isinstance(choice, str) or (choice not in TEMPLATES and "{" not in choice):
        raise InputError(f"chat_format is {choice!r:.80}; it must be one of {choices}")
    form = ChatFormat(tokenizer, vision, TEMPLATES.get(choice, choice))
    if not form.ends[0]:
        raise UnsupportedError(f"chat_format {choice!r:.80} ends an answer with no token that the tokenizer has")
    return form


class ChatFormat:
    """How a template writes conversations.

    Args:
        tokenizer: Encodes what the template writes.
        vision: Prepares images and videos.
        template: In Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, vision: Processor, template: str):
        self.vision = vision
        self._variables = tokenizer.template_variables
        self._places = vision.marks  # for each kind, what a template writes in its place
        self._template = jinja(template)
        self._added = any_of(tokenizer.special_tokens | tokenizer.added_tokens)
        # As in "<|im_start|>user\n", _QUESTION, "<|im_end|>\n<|im_start|>assistant\n", _ANSWER, "<|im_end|>\n" ...
        text = self._write([_ASKED, _ANSWERED, _ASKED], add_generation_prompt=False)
        begun, answered, rest = text.partition(_ANSWER)
        if not answered:
            raise UnsupportedError("the chat_template does not write the messages; pass another chat_format=")
        # Tokens that are not special, but that the template writes around messages, are reserved for it.
        prompt = self._write([_ASKED])
        around = self._names(text)
        opening = tokenizer.added_tokens.keys() & self._names(prompt)
        self._spoken = opening.difference(around)  # such as <think>, which answers have too
        self.tokenizer = tokenizer.reserving([*around, *self._spoken])
        after_answer = self._names(rest.partition(_QUESTION)[0])
        self.ends = ("".join(after_answer[:1]), tokenizer.template_variables.get("eos_token", ""), *ENDS)
        ids = self.tokenizer.special_tokens
        self.end_ids = tuple(ids[name] for name in dict.fromkeys(self.ends) if name in ids)  # these end an answer
        continues = prompt.startswith(begun.rstrip())  # up to the answer, it writes a prompt in the same way
        self.opening = prompt[len(begun) :] if continues else ""  # the text that opens the model's turn

        texts = [template, *self._variables.values(), *self._places.values()]
        self._marks = ControlMarks(ids, texts)
        self._variables = {key: self._marks.put(text) for key, text in self._variables.items()}
        self._places = {kind: self._marks.put(text) for kind, text in self._places.items()}
        self._template = jinja(self._marks.put(template))

    def as_of(self, date: datetime.date) -> "ChatFormat":
        """Return this format on a date, for templates that write today's."""
        dated = copy.copy(self)
        dated._variables = self._variables | {"strftime_now": date.strftime}
        return dated

    def encode(self, messages: list[dict], add_generation_prompt: bool = True, **options) -> list[int]:
        """Return the token ids of a conversation. Arguments as for `prompt`."""
        return self.prompt(messages, add_generation_prompt, **options)[0]

    def prompt(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        tools: list[dict] | None = None,
        enable_thinking: bool = True,
    ) -> tuple[list[int], list[Prepared]]:
        """Return a conversation's token ids and its images and videos in order.

        Args:
            messages: As in `pop.Model.chat`. Only the first may be a system message.
            add_generation_prompt: Open the model's turn at the end.
            tools: The JSON schemas of functions that the model may call.
            enable_thinking: False asks a model that may think to answer at once.

        Raises InputError for messages or tools that are wrong, and UnsupportedError for what the template cannot write.
        """
        told, media = read_messages(messages, self.vision)
        if not isinstance(enable_thinking, bool):
            raise InputError(f"enable_thinking is {enable_thinking!r:.80}; it must be True or False")
        if tools and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
            raise InputError(f"tools must be a list of dicts, the JSON schemas of functions, got {tools!r:.80}")
        conversation = _as_json([told, tools])
        told = [self._with_marks(message) for message in told]
        options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
        text = self._write(told, tools, **options)
        if tools and self._write(told, **options) == text:
            raise UnsupportedError(
                "this model's chat_template leaves out the tools; put them into a message, or take a model that knows "
                "them, such as qwen3-0.6b"
            )
        without_calls = [{key: part for key, part in message.items() if key != "tool_calls"} for message in told]
        if without_calls != told and self._write(without_calls, tools, **options) == text:
            raise UnsupportedError("the chat_template leaves out the tool calls; put them into a message")
        if add_generation_prompt and not enable_thinking and text.endswith(self._marks.put("<think>\n")):
            raise UnsupportedError("the model always thinks; leave out enable_thinking=False")
        return self._encode(text, media, conversation), media

    def next_prompt(
        self, content, enable_thinking: bool = True, system: Sequence[dict] = ()
    ) -> tuple[list[int], list[Prepared]]:
        """Return what `prompt` adds after an answer: the turn's end, the user's message, and the next turn's opening.

        A control token follows an answer, so no text is encoded across this boundary, and these ids can be appended.

        Args:
            content, enable_thinking: Of the user's message, and of the turn.
            system: The conversation's system message, if it has one.
        """
        (*system, asked), media = read_messages([*system, {"role": "user", "content": content}], self.vision)
        conversation = _as_json([*system, asked])
        turn = [_ASKED, _ANSWERED]
        opened = self._write([*system, _ASKED], enable_thinking=enable_thinking)
        begun, _, added = self._write([*system, *turn, asked], enable_thinking=enable_thinking).partition(_ANSWER)
        after_more = self._write([*system, *turn, *turn, asked], enable_thinking=enable_thinking).split(_ANSWER, 2)[-1]
        if not opened.startswith(begun.rstrip()) or after_more != added:
            raise UnsupportedError("the chat_template rewrites earlier turns; answer whole lists of messages with chat")
        return self._encode(added, media, conversation), media

    def parse_tool_calls(self, text: str) -> list[dict]:
        """Return the calls in an answer, as a message takes them under "tool_calls". An answer in words has none.

        A call is JSON: in Qwen3 between tags, with "arguments", and in Llama the whole answer, with "parameters".
        A call that thoughts mention does not count.
        """
        text = text[end_of_thoughts(text) :]
        tagged = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
        key = "arguments" if tagged else "parameters"
        calls = []
        for found in tagged or [text]:
            try:
                given = json.loads(found)
                call = read_call({"name": given["name"], "arguments": given[key]})
                _as_json(call)  # raises InputError if a message could not hold it
                calls.append(call)
            except (ValueError, LookupError, TypeError, RecursionError):
                if tagged:
                    raise InputError(f"a tool call is not JSON with a name and arguments: {found!r:.80}") from None
        return calls

    def _with_marks(self, message: dict) -> dict:
        """Return a message with marks for the control tokens that an answer may have. Templates cut old thoughts there.

        Other names of control tokens stay text.
        """
        if message["role"] != "assistant":
            return message
        content = message["content"]
        for name in self._spoken:
            content = content.replace(name, self._marks.put(name))
        return message | {"content": content}

    def _write(
        self, told: list[dict], tools=None, add_generation_prompt: bool = True, enable_thinking: bool = True
    ) -> str:
        variables = {"messages": told, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        if not enable_thinking:  # by default, the variable stays undefined
            variables["enable_thinking"] = False
        return self._template(marks=self._places, **self._variables, **variables)

    def _encode(self, text: str, media: list[Prepared], conversation: str) -> list[int]:
        """Return the ids of what a template wrote, with images and videos in place of their marks.

        A name of a control token that has no mark stands in a text of the conversation, or the template has formed it
        from parts. The first is text. The second would be a control token elsewhere, so it is refused.
        """
        pieces = []
        for part in self.vision.replace_marks(text, media, self._places, "chat_template"):
            pieces += self._marks.split(part) if isinstance(part, str) else [part]
        for name in self._names(text):  # a mark is part of no name
            if name in self.tokenizer.special_tokens and _as_json(name)[1:-1] not in conversation:
                raise UnsupportedError(
                    f"the chat_template forms the control token {name!r} from parts; pass another chat_format="
                )
        return self.tokenizer.encode_pieces(pieces, bos=False)

    def _names(self, text: str) -> list[str]:
        """Return the names of the added tokens in a text that a template wrote, each once. Line breaks have none."""
        return [name for name in dict.fromkeys(self._added.findall(text)) if name.strip()]


def _as_json(value) -> str:
    """Return a conversation, or a part of it, in lower case: templates may change the case of texts."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError
        raise InputError(f"a message, a tool or a call of one cannot be written as JSON: {error}") from None
    return text.lower()


def end_of_thoughts(text: str) -> int:
    """Where the answer of a text begins that may have thoughts. One that begins with a call has none."""
    if "</think>" not in text or text.lstrip().startswith(("{", "<tool_call>")):
        return 0
    return text.index("</think>") + len("</think>")


def split_thoughts(text: str) -> tuple[str, str]:
    """Return the thoughts and the answer of a text with <think>...</think>, whose first tag may be in the prompt.

    A text that begins with <think> and has no </think> was cut in its thoughts. If that tag is in the prompt, they
    cannot be told from an answer.
    """
    if "</think>" not in text:
        before, opened, thoughts = text.partition("<think>")
        was_cut = opened and not before.strip()
        return (thoughts.strip("\n"), "") if was_cut else ("", text)
    thoughts, *_, answer = text.split("</think>")
    thoughts = thoughts.rstrip("\n").split("<think>")[-1]
    return thoughts.lstrip("\n"), answer.lstrip("\n")
