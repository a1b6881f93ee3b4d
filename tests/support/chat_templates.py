"""Chat templates in the style of fine-tunes whose format is none of ours, and a tokenizer with their control tokens."""

import json
from pathlib import Path

from support.text import spec_of

from pop.inputs.tokenizers import load_tokenizer

PLAIN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen3's template writes, with tools and thoughts; QWEN3_INSTRUCT never thinks, QWEN3_THINKING always does.
QWEN3 = (
    "{% macro written(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% if tools %}<|im_start|>system\n{{ messages[0].content ~ '\n\n' if messages[0].role == 'system' }}# Tools\n\n"
    "You may call one or more functions to assist with the user query.\n\nYou are provided with function signatures "
    "within <tools></tools> XML tags:\n<tools>{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}"
    "{{ '\n' }}</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "{% set messages = messages[1:] if messages[0].role == 'system' else messages %}{% endif %}"
    "{% set asked = namespace(last=messages | length) %}{% for m in messages if m.role == 'user' %}"
    "{% set content = written(m.content) %}"
    "{% if not (content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}"
    "{% set asked.last = messages.index(m) %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = written(m.content) %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if thinks %}{% set thoughts = m.reasoning_content or '' %}{% if '</think>' in content and not thoughts %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > asked.last and (loop.last or thoughts) %}<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n"
    "{% set content = content.lstrip('\n') %}{% endif %}{% endif %}{{ content }}{% for call in m.tool_calls or [] %}"
    "{{ '\n' if content or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user' if (loop.previtem or {}).role != 'tool' }}\n"
    "<tool_response>\n{{ content }}\n</tool_response>{{ '<|im_end|>\n' if (loop.nextitem or {}).role != 'tool' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinks and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN3_INSTRUCT = "{% set thinks = false %}" + QWEN3
QWEN3_THINKING = "{% set thinks = true %}" + QWEN3.replace("<think>\n\n</think>\n\n{% endif", "{% endif").replace(
    "assistant\n{% if thinks and enable_thinking is false %}", "assistant\n<think>\n{% if false %}"
)
QWEN3 = "{% set thinks = true %}" + QWEN3
OTHERS = {
    # Hermes-3: ChatML with a default system message
    "hermes": "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Hermes.<|im_end|>\n"
    "{% endif %}" + PLAIN_CHATML,
    # Tulu-3: the roles are ordinary text, and only the end is a token
    "tulu": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|assistant|>\n' + m.content + "
    "(eos_token + '\n' if not loop.last else eos_token) }}{% endgeneration %}{% else %}{{ '<|' + m.role + '|>\n' + "
    "m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # DeepSeek-R1-Distill: the system message comes first, and thoughts are dropped
    "deepseek": "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endfor %}{{ bos_token + ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    # Zephyr: each turn ends with EOS, and texts are trimmed
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # Mistral: only users' turns are marked, and roles must alternate
    "mistral": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ (system if loop.first else '') + m.content }} [/INST]{% else %}"
    " {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}",
    # Llama-3.1 with other dates, which must not pass for Llama-3.1
    "dates": "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: May 2025\n\n"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # Alpaca: no control tokens but the end
    "alpaca": "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% else %}{{ m.content }}\n\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
}
NAMES = {
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<s>": True,
    "</s>": True,
}


def tokenizer_with(template: str | None, folder: Path, **more):
    """Llama's tokenizer with control tokens of fine-tunes, some of which are not special, and a chat template."""
    spec = spec_of("llama-3.1")
    free = 1 + max(token["id"] for token in spec["added_tokens"])
    spec["added_tokens"] += [
        {"id": free + n, "content": name, "special": special} for n, (name, special) in enumerate(NAMES.items())
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    config = tokens | more | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)
