"""Images and videos on the command line: `pop generate` and `pop chat` with --image and --video."""

import io
import sys

import pytest
from PIL import Image
from support.tiny import random_model, tiny_config
from support.tiny_qwen3_vl import FILM, IMAGE_MARK, VIDEO_MARK, A, B, seeing_model

import pop
from pop.cli import main

FILMS = {"film.mp4": FILM, "picture": A}


@pytest.fixture(scope="module")
def model():
    return seeing_model()


@pytest.fixture
def command(model, tmp_path, monkeypatch, capsys):
    """Run `pop` with words in which a and b are files with A and B, on lines that are typed: status, output, errors."""
    for name, picture in {"a": A, "b": B}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")

    def run(*words, typed="", loaded=model):
        monkeypatch.setattr(pop, "load", lambda *args, **options: loaded)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        words = [str(tmp_path / f"{word}.png") if word in "ab" else word for word in words]
        return main([*words, "--max-new-tokens", "5"]), *capsys.readouterr()

    return run


def test_generate_shows_images(command, model):
    """Where the text says so, or before it; in the order in which they are named."""
    marked = f"Look: {IMAGE_MARK} and{IMAGE_MARK}?"
    for words, prompt in (((marked,), marked), (("What?",), f"{IMAGE_MARK * 2}What?")):
        status, out, _ = command("generate", "m", *words, "--image", "a", "--image", "b")
        expected = model.generate(prompt, images=[A, B], max_new_tokens=5).text
        assert (status, out) == (0, expected + "\n")
        assert model.generate(prompt, images=[B, A], max_new_tokens=5).text != expected
    status, out, said = command("generate", "m", marked, "--image", "a")
    assert status == 2 and "1 images" in said


def test_generate_shows_videos(command, model, monkeypatch):
    prepare = model.vision.prepare

    def show(kind, given):
        return prepare(kind, FILMS[given] if isinstance(given, str) else given)

    monkeypatch.setattr(model.vision, "prepare", show)
    status, out, _ = command("generate", "m", "What?", "--video", "film.mp4", "--image", "picture")
    prompt = f"{IMAGE_MARK}{VIDEO_MARK}What?"
    monkeypatch.undo()
    assert (status, out) == (0, model.generate(prompt, images=[A], videos=[FILM], max_new_tokens=5).text + "\n")


def test_chat_shows_images_with_the_first_message_of_a_conversation(command, model):
    status, out, _ = command("chat", "m", "--image", "a", typed="What?\nAnd?\n/new\nWell?\n")
    expected = []
    for lines in (("What?", "And?"), ("Well?",)):
        chat, shown = model.start_chat(), [{"type": "image", "image": A}]
        for line in lines:
            expected.append(chat.send([*shown, {"type": "text", "text": line}], max_new_tokens=5).text)
            shown = []
    assert (status, out) == (0, "".join(f"{text}\n" for text in expected))


@pytest.mark.parametrize("words", [("generate", "m", "Hi"), ("chat", "m")])
def test_the_command_line_refuses_what_cannot_be_seen(command, model, words):
    config = tiny_config(vocab_size=926)
    blind = pop.Model(random_model(config), config, model.tokenizer, compile=False)
    status, out, said = command(*words, "--image", "a", typed="Hi\n", loaded=blind)
    assert (status, out) == (2, "") and "llama model takes text only" in said and "images" in said
    status, out, said = command(*words, "--image", "c.png", typed="Hi\n")
    assert (status, out) == (2, "") and "c.png" in said
    status, out, said = command(*words, "--video", "a", typed="Hi\n")
    assert (status, out) == (2, "") and said.count("\n") == 1
