"""Images and videos on the command line: `pop generate` and `pop chat` with --image and --video."""

import io
import sys

import pytest
from PIL import Image
from support.tiny import tiny_config, tiny_model
from support.tiny_qwen3_vl import FILM, IMAGE_MARK, VIDEO_MARK, A, B, seeing_model

import pop

FILMS = {"film.mp4": FILM, "picture": A}


@pytest.fixture(scope="module")
def model():
    return seeing_model()


@pytest.fixture
def command(model, tmp_path, monkeypatch, run):
    """Run `pop` in a folder with a.png and b.png, which are A and B, on lines that are typed."""
    monkeypatch.chdir(tmp_path)
    for name, picture in {"a": A, "b": B}.items():
        Image.fromarray(picture).save(f"{name}.png")

    def command(*words, typed="", loaded=model, status=0):
        monkeypatch.setattr(pop, "load", lambda *args, **options: loaded)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return run(*words, "--max-new-tokens", "5", status=status)

    return command


def test_generate_shows_images(command, model):
    """Where the text says so, or before it; in the order in which they are named."""
    marked = f"Look: {IMAGE_MARK} and{IMAGE_MARK}?"
    for text, prompt in ((marked, marked), ("What?", f"{IMAGE_MARK * 2}What?")):
        expected = model.generate(prompt, images=[A, B], max_new_tokens=5).text
        assert command("generate", "m", text, "--image", "a.png", "--image", "b.png").out == expected + "\n"
        assert model.generate(prompt, images=[B, A], max_new_tokens=5).text != expected
    assert "1 images" in command("generate", "m", marked, "--image", "a.png", status=2).err


def test_generate_shows_videos(command, model, monkeypatch):
    prepare = model.vision.prepare

    def show(kind, given):
        return prepare(kind, FILMS[given] if isinstance(given, str) else given)

    monkeypatch.setattr(model.vision, "prepare", show)
    out = command("generate", "m", "What?", "--video", "film.mp4", "--image", "picture").out
    prompt = f"{IMAGE_MARK}{VIDEO_MARK}What?"
    monkeypatch.undo()
    assert out == model.generate(prompt, images=[A], videos=[FILM], max_new_tokens=5).text + "\n"


def test_chat_shows_images_with_the_first_message_of_a_conversation(command, model):
    out = command("chat", "m", "--image", "a.png", typed="What?\nAnd?\n/new\nWell?\n").out
    expected = []
    for lines in (("What?", "And?"), ("Well?",)):
        chat, shown = model.start_chat(), [{"type": "image", "image": A}]
        for line in lines:
            expected.append(chat.send([*shown, {"type": "text", "text": line}], max_new_tokens=5).text)
            shown = []
    assert out == "".join(f"{text}\n" for text in expected)


@pytest.mark.parametrize("words", [("generate", "m", "Hi"), ("chat", "m")])
def test_the_command_line_refuses_what_cannot_be_seen(command, model, words):
    blind = tiny_model(tiny_config(vocab_size=926), tokenizer=model.tokenizer, compile=False)
    out, said = command(*words, "--image", "a.png", typed="Hi\n", loaded=blind, status=2)
    assert out == "" and "llama model takes text only" in said and "images" in said
    out, said = command(*words, "--image", "c.png", typed="Hi\n", status=2)
    assert out == "" and "c.png" in said
    out, said = command(*words, "--video", "a.png", typed="Hi\n", status=2)
    assert out == "" and said.count("\n") == 1
