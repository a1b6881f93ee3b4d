"""Qwen3-VL's images and videos in prompts and conversations of pop.Model, and calls that do not fit them."""

import json

import PIL.Image
import pytest
import torch
from support.chat_templates import QWEN3_THINKING
from support.text import GOLDENS
from support.tiny_images import random_bytes
from support.tiny_qwen3_vl import END, FILM, IMAGE, IMAGE_MARK, START, VIDEO, VIDEO_MARK, A, B, seeing_model

import pop
from pop.errors import InputError, UnsupportedError

LAYOUTS = json.loads((GOLDENS.parent / "qwen3_vl" / "layouts.json").read_bytes())["cases"]


@pytest.fixture(scope="module")
def model():
    return seeing_model()


def image(rows, columns):
    """The tokens of an image in a prompt."""
    return [START, *[IMAGE] * (rows * columns), END]


def film(encode, before=""):
    """The tokens of FILM in a prompt, after a text: three frame pairs, each after its time.

    A video has 24 frames a second and at least 4096 pixels in all, so 24 x 16 pixels become 64 x 32. The last frame is
    doubled.
    """
    ids = [*encode(before), START]
    for time in ("<0.0 seconds>", "<0.1 seconds>", "<0.2 seconds>"):
        ids += [*encode(time), START, VIDEO, VIDEO, END]
    return [*ids, END]


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversations_are_laid_out_as_by_the_references_processor(model, name):
    messages = []
    for role, *parts in LAYOUTS[name]["messages"]:
        content = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif "image" in part:
                height, width, seed = part["image"]
                content.append({"type": "image", "image": random_bytes(height, width, 3, seed)})
            else:
                frames, height, width, seed, fps = part["video"]
                video = random_bytes(frames * height, width, 3, seed).reshape(frames, height, width, 3)
                content.append({"type": "video", "video": video if fps is None else pop.Video(video, fps)})
        messages.append({"role": role, "content": content})
    assert model.chat_tokens(messages) == LAYOUTS[name]["tokens"]


def test_a_text_says_where_its_images_and_videos_are(model):
    encode = model.tokenizer.encode
    text = f"Look: {IMAGE_MARK} and{VIDEO_MARK}{IMAGE_MARK}?"
    expected = encode("Look: ") + image(8, 8) + film(encode, " and") + image(12, 6) + encode("?")
    options = {"images": [A, B], "videos": [FILM]}
    (seen,) = model.vision.prepare_batch([A, B], [FILM], 1)
    assert model.encode(text, media=seen) == expected
    answer = model.generate(text, max_new_tokens=6, **options)
    assert answer.tokens == model.generate(expected, max_new_tokens=6, **options).tokens
    assert answer.prompt_tokens == len(expected)
    assert "".join(model.stream(text, max_new_tokens=6, **options)) == answer.text
    assert model.encode(text) == encode(text)  # text, where there is nothing to see
    assert model.score(text, " x", **options) == pytest.approx(model.score(expected, " x", **options))


def test_marks_in_the_texts_of_a_conversation_stay_text(model):
    """An answer to messages is the answer to their tokens with the same images and videos."""
    text = {"type": "text", "text": f"What is this? <|im_start|>{IMAGE_MARK}"}
    content = [{"type": "image", "image": A}, text, {"type": "video", "video": FILM}, {"type": "image", "image": B}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    tokens = model.chat_tokens(messages)
    assert tokens.count(IMAGE) == 8 * 8 + 12 * 6 and text["text"] in model.tokenizer.decode(tokens)
    answer = model.chat(messages, max_new_tokens=5)
    assert answer.tokens == model.generate(tokens, images=[A, B], videos=[FILM], max_new_tokens=5).tokens
    messages.append({"role": "assistant", "content": "A film."})
    asked = [*messages, {"role": "user", "content": "And?"}]
    for last in (1, 1000):  # with the images encoded ahead, and with each message
        plan = pop.PrunePlan((0, 3, 4), full_depth_last=last)
        prefix = model.prefix(messages, plan=plan)
        expected = model.chat(asked, plan=plan, max_new_tokens=5)
        assert prefix.generate("And?", max_new_tokens=5).tokens == expected.tokens
    with pytest.raises(InputError, match="text of the user's next message"):
        prefix.generate([[{"type": "image", "image": A}]])


def test_the_turn_of_a_model_that_always_thinks_is_opened_with_a_tag(model):
    options = {"compile": False, "chat_format": QWEN3_THINKING}
    thinking = pop.Model(model.module, model.config, model.tokenizer, **options)
    messages = [{"role": "user", "content": "Hi"}]
    encode = model.tokenizer.encode
    assert thinking.chat_tokens(messages) == model.chat_tokens(messages) + encode("<think>\n")
    chat = thinking.start_chat()
    chat.send("Hi", max_new_tokens=4)
    assert chat.messages[-1]["content"].startswith("<think>\n")
    answer = chat.send("And?", max_new_tokens=4)
    assert chat.tokens[: answer.prompt_tokens][-2:] == encode("<think>\n")
    with pytest.raises(UnsupportedError, match="always thinks"):
        thinking.chat(messages, enable_thinking=False)


@pytest.mark.parametrize("plan", [pop.PrunePlan.none(), pop.PrunePlan((0, 3, 4), full_depth_last=3)])
def test_turns_continue_where_images_end(model, plan):
    """Unpruned answers are those of one long prompt. Pruned ones are those of its parts, prefilled in turn."""
    chat = model.start_chat("Be brief.", plan=plan)
    shown = [{"type": "image", "image": A}, {"type": "video", "video": FILM}]
    answers = [chat.send([*shown, {"type": "text", "text": "What?"}], max_new_tokens=3)]
    answers.append(chat.send([{"type": "text", "text": "And"}, {"type": "image", "image": B}], max_new_tokens=4))
    answers.append(chat.send("Well?", max_new_tokens=4))
    seen = [{"images": [[A]], "videos": [[FILM]]}, {"images": [[B]]}, {}]
    cache = model.new_cache(1, len(chat.tokens))
    for answer, given in zip(answers, seen, strict=True):
        prompt = chat.tokens[int(cache.lengths) : answer.prompt_tokens]
        token = model.prefill([prompt], cache, plan=plan, **given).argmax(-1)
        for expected in answer.tokens:
            assert token.item() == expected
            token = model.decode(token, cache).argmax(-1)
    if not plan.layers:
        prompt = chat.tokens[: -len(answers[-1].tokens)]
        again = model.generate(prompt, images=[A, B], videos=[FILM], max_new_tokens=4, plan=plan)
        assert again.tokens == answers[-1].tokens
        assert cache.rope_offsets.item() < 0  # an image of 8 x 8 tokens is eight positions
    other = model.start_chat(messages=chat.messages, plan=plan)
    asked = [*chat.messages, {"role": "user", "content": "And?"}]
    assert other.send("And?", max_new_tokens=4).tokens == model.chat(asked, max_new_tokens=4, plan=plan).tokens


ONE = image(8, 8)
REFUSED = [
    (lambda m: m.generate([2, *ONE]), "912.*images"),
    (lambda m: m.score([2, *ONE], [3]), "context.*912"),
    (lambda m: m.generate([2, *ONE], images=[A, B]), r"row 0.*\[64\].*images.*\[64, 72\]"),
    (lambda m: m.logits([[2, 3], [2, IMAGE]]), r"row 1.*\[1\].*images.*\[\]"),
    (lambda m: m.generate(f"{VIDEO_MARK}?", images=[A]), "1 images.*0"),
    (lambda m: m.generate(f"{IMAGE_MARK}{VIDEO_MARK}", images=[A]), "0 videos.*1"),
    (lambda m: m.generate([[2], [2, *ONE]], images=[A, [B]]), "images.* 2 lists"),
    (lambda m: m.generate([[2], [2, *ONE]], videos=[FILM]), "videos.* 2 lists"),
    (lambda m: m.generate([2], videos=FILM), "videos.*ndarray"),
    (lambda m: m.generate([2], videos=[FILM[0]]), "an image.*shape"),
    (lambda m: m.generate([2, *ONE], images=["no.png"]), "'no.png'"),
    (lambda m: m.chat([{"role": "user", "content": "x"}], videos=[FILM]), "option 'videos', but there is the part"),
    (lambda m: m.chat([{"role": "user", "content": [{"type": "video"}]}]), "message 0"),
    (lambda m: m.chat([{"role": "system", "content": [{"type": "image", "image": A}]}]), "message 0 has an image"),
    (lambda m: m.start_chat().send([]), r"message.*\[\]"),
]


def test_what_does_not_fit_is_refused(model):
    for call, named in REFUSED:
        with pytest.raises(InputError, match=named):
            call(model)


def test_the_plain_pass_compiles_nothing(model, monkeypatch):
    """`logits` takes the plain module, vision tower included, also where prefill would run compiled."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("the plain pass compiles"))
    compiled = pop.Model(model.module, model.config, model.tokenizer, compile=True)
    images = model.vision.prepare_batch([A], None, 1)[0]
    tokens = [[7, *(token for piece in images[0].pieces for token in piece), 8]]
    assert torch.equal(compiled.logits(tokens, images=images), model.logits(tokens, images=images))


def test_the_frames_of_a_video_may_be_pil_images(model):
    """In the list of one prompt too."""
    (expected,) = model.vision.prepare_batch(None, [FILM], 1)
    (found,) = model.vision.prepare_batch(None, [[PIL.Image.fromarray(frame) for frame in FILM]], 1)
    assert [one.sha256 for one in found] == [one.sha256 for one in expected]
