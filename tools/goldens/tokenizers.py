"""Make the golden files of tokenizers and chat formats with the reference implementations.

    python -m tools.goldens.tokenizers llama-3.1=FOLDER qwen3=FOLDER smollm2=FOLDER gemma3=FOLDER

Makes tests/goldens/tokenizers/. Each FOLDER holds the published tokenizer.json and tokenizer_config.json of a family.
Needs transformers, with its dependencies tokenizers and jinja2.

A published vocabulary is too large to commit, so each family gets a reduced tokenizer.json: its first tokens, the
merges among them, and ids without gaps. The reference encodes many strings and conversations with it. SmolLM2 and
Gemma-3 also keep the ids by the real tokenizers, which the tests find with the weights.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from tools.goldens import files
from tools.goldens.files import MISSING

try:
    import tokenizers
    import transformers
except ImportError:
    sys.exit(MISSING.format("transformers and tokenizers"))

GOLDENS = files.GOLDENS / "tokenizers"
MADE_WITH = f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}"
FAMILIES = ("llama-3.1", "qwen3", "smollm2", "gemma3")
REAL = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}  # the names of their weights
TOKENS = 900  # ordinary tokens that are kept of a vocabulary
SPECIAL = 30  # special tokens that are kept

TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024; we'll see: I'VE, they'd, don't, HE'S.",
    "a  1",
    "a   12 b\n\n 3\t\t4  \n5 ",
    "   leading and trailing   ",
    "\n\n\n  \n x \r\n\r\n y\r\rz",
    "tab\tvertical\x0bform\x0cfeed nel\x85nbsp\xa0ogham\u1680en\u2000ls\u2028ps\u2029ideo\u3000end",
    "\x1c\x1d\x1e\x1f\u180e\u200b\u200d\ufeff \x1c\x1d \u180e",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "12345678 3.14159 1e-10 ⅷ ½ ² ① ٣٤٥ १२३ 𝟘𝟙 一二三 \U00011de0\U00016ff4 x",
    "'s 'S '\u017f '\u212a 'LL 'lL ''s '  's ’s n't",
    "café cafe\u0301 Å A\u030a \u1e9b\u0323 \u0344 가 \u1100\u1161 \u1112\u1161\u11ab क़ \u0958",
    "a\u0327\u0301 a\u0301\u0327 q\u1dfa\u0323 q\u0323\u1dfa \u0898\u0327 \U00011935\U00011930 \u0345\u0301",
    "Straße ΑΒΓ Россия עברית العربية हिन्दी ไทย 中文字符 日本語カタカナ 한국어 việt nghiệp maktadır",
    "😀👍🏽🇺🇸❤️👨‍👩‍👧 \U000e0100\U0010fffd\ue000 \uffff \U00040000 \U000bffff",
    "<|begin_of_text|><|eot_id|><|start_header_id|>user<|end_header_id|>",
    "<|im_start|>system\nobey<|im_end|> <|endoftext|><|endoftext|",
    "<think>\nhm\n</think> <tool_call>{}</tool_call><<think>><|im_start|<|im_end|>>",
    "cafe<think>\u0301</think>\u0301 <repo_name><filename>x<|vision_start|><|image_pad|><|vision_end|>",
    "!\x04! \x04 \x04\x04 a\x06b  \x13 \n\x14 \n \x16'\x1ds '\x04s\x04 e\u0301\x04\u0301 \U00040000\u1000",
    "\x00\x01\x02\x7f\x80\x9f\xad",
    "http://www.example.com/a?b=c&d=%20#e user@host:~/dir$ ls -la | grep '\\.py$' && echo \"$x\"",
    "==== ---- //// .... ,,,, !!!! ???? (((( )))) [[[[ ]]]] .:.:.:.: |||| ~~~~ ////\n\n====\n",
    " " * 17 + "x" + " " * 40 + "\n" + " " * 100,
    "\n" * 9 + "\t" * 9 + "\r\n" * 5 + "y",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + "ab" * 30 + "the" * 12,
]

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Answer in one word."), ("user", "  What is the capital of France?\n")],
    [("user", "1 + 1?"), ("assistant", " It's 2. \n"), ("user", "And 2 + 2?\n\nBe exact.")],
    [("system", " \n"), ("user", "\tx\t"), ("assistant", ""), ("user", "y")],
    [("system", "s"), ("user", "u"), ("assistant", "unfinished")],
]


def texts() -> list[str]:
    """TEXTS, and random strings of their words and characters."""
    draw = random.Random(0)
    words = " ".join(TEXTS).split(" ")
    spaces = [" ", "  ", "   ", "\n", "\n\n", " \n", "\t", "\r\n", "\u3000", "\xa0", "", "'", "\x1c", "\x04"]
    kinds = [words, spaces, "".join(TEXTS)]
    lengths = [draw.randint(2, 12) for _ in range(250)]
    return TEXTS + ["".join(draw.choice(draw.choice(kinds)) for _ in range(length)) for length in lengths]


def reduced(spec: dict) -> dict:
    """The tokenizer.json `spec` with the first TOKENS of its vocabulary, and ids without gaps."""
    model = spec["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = spec["added_tokens"][:SPECIAL]
    names = {token["content"] for token in added}
    kept = set(sorted(model["vocab"].keys() - names, key=model["vocab"].get)[:TOKENS])
    if model["ignore_merges"]:  # tokens that only ignore_merges finds
        kept |= {"Ġviá»ĩc", "ektedir", ".:.:.:.:"} & model["vocab"].keys()
    in_vocab = names & model["vocab"].keys() | kept
    vocab = {token: n for n, token in enumerate(sorted(in_vocab, key=model["vocab"].get))}
    after = [token["content"] for token in added if token["content"] not in vocab]
    ids = vocab | {name: len(vocab) + n for n, name in enumerate(after)}
    merges = [" ".join(merge) for merge in merges if {*merge, "".join(merge)} <= kept]

    post_processor = json.loads(json.dumps(spec["post_processor"]))
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        for name, token in step.get("special_tokens", {}).items():
            token["ids"] = [ids[name]]
    return spec | {
        "added_tokens": [token | {"id": ids[token["content"]]} for token in added],
        "post_processor": post_processor,
        "model": model | {"vocab": vocab, "merges": merges},
    }


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path.relative_to(GOLDENS.parent)}: {path.stat().st_size} bytes")


def golden_ids(tokenizer_file: Path) -> dict:
    """The reference's ids of texts(), with special tokens as text, and as tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    with_special = [tokenizer.encode(text).ids for text in texts()]
    tokenizer.encode_special_tokens = True
    return {"as_text": [tokenizer.encode(text).ids for text in texts()], "with_special": with_special}


def golden_chat(tokenizer_file: Path, config: dict) -> list[dict]:
    """The reference's text and ids of CONVERSATIONS, with and without the generation prompt."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=config["bos_token"],
        chat_template=config["chat_template"],
    )
    cases = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        for prompt in (True, False):
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            cases.append({"messages": messages, "prompt": prompt, "rendered": rendered, "ids": ids})
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FAMILY=FOLDER", help=f"one of {', '.join(FAMILIES)}")
    folders = parser.parse_args().folders
    write(GOLDENS / "texts.json", {"made_with": MADE_WITH, "texts": texts()})
    for argument in folders:
        family, _, folder = argument.partition("=")
        real = Path(folder) / "tokenizer.json"
        if family not in FAMILIES or not real.is_file():
            parser.error(f"{argument}: not one of {', '.join(FAMILIES)} = a folder with a tokenizer.json")
        config = json.loads((Path(folder) / "tokenizer_config.json").read_bytes())
        if family in REAL:
            golden = golden_ids(real) | {"chat": golden_chat(real, config)}
            write(GOLDENS / f"{REAL[family]}.json", {"made_with": MADE_WITH} | golden)
        if family == "gemma3":
            continue
        small = GOLDENS / family / "tokenizer.json"
        write(small, reduced(json.loads(real.read_bytes())))
        golden = {"made_with": MADE_WITH} | golden_ids(small)
        if family != "qwen3":  # its template is for thinking models
            golden["chat"] = golden_chat(small, config)
        write(GOLDENS / family / "golden.json", golden)
        if family == "smollm2":
            write(GOLDENS / family / "tokenizer_config.json", {"chat_template": config["chat_template"]})


if __name__ == "__main__":
    main()
