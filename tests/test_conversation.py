"""Conversations with a bundle: templates and their arguments, history, thoughts, odd input."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from chat_templates import PLAIN, THINKING
from checkpoints import gemma4
from resealed import change_manifest
from tokenizers_in_code import byte_fallback, save
from transformers import AutoTokenizer

import pleexport
from pleexport.errors import BundleError, CheckFailed, InputError, PleexportError
from pleexport.parity.text import check_text
from pleexport.runtime.bundle import read_manifest
from pleexport.runtime.conversation import Conversation
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.stats import Token
from pleexport.runtime.thoughts import ThoughtFilter
from pleexport.runtime.tokenizer import Tokenizer, tokenizer_files

HELLO = {"role": "user", "content": "ab"}
TALK = [
    {"role": "system", "content": " ab "},
    HELLO,
    {"role": "assistant", "content": "<think>b</think>\n\n a"},
    {"role": "user", "content": "b\na"},
]
SIZE = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with byte fallback, tokens in other files, and a template."""
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    gemma4(folder, vocab_size=SIZE, vocab_size_per_layer_input=SIZE)
    tokenizer = byte_fallback()
    tokenizer.enable_truncation(max_length=8)
    save(tokenizer, folder, bos_token="<bos>", eos_token="<eos>")
    (folder / "added_tokens.json").write_text('{"<late>": 290}')
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": THINKING}))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pleexport.build(checkpoint, tmp_path_factory.mktemp("chat") / "bundle").path


@pytest.fixture(scope="module")
def runner(bundle: Path) -> pleexport.Runner:
    return pleexport.Runner(bundle)


def test_a_build_compares_text_and_says_so(bundle: Path) -> None:
    report = json.loads((bundle / "parity.json").read_text())
    text = report["tokenizer"]
    assert text["original"].startswith("transformers 5.23")
    assert text["template"] == "chat_template.json"
    assert text["differences"] == []
    assert text["conversations"] > 15
    assert text["streams"] > 400
    assert sorted(p.name for p in bundle.iterdir() if "token" in p.name or "chat" in p.name) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_verify_fails_where_a_token_is_missing(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    report = pleexport.verify(bundle, checkpoint=checkpoint)
    assert report is not None
    assert report.passed
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    (other / "added_tokens.json").write_text('{"<later>": 290}')
    report = pleexport.verify(bundle, checkpoint=other)
    assert report is not None
    assert not report.passed
    assert report.failures[0].startswith("text: the text 'a <later> b<later>c' becomes the ids")
    # What a build was given as tokenizer is what it is compared with.
    report = pleexport.verify(bundle, checkpoint=other, tokenizer=checkpoint)
    assert report is not None
    assert report.passed


def test_a_build_whose_text_differs_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pleexport.runtime.tokenizer.render_chat", lambda *_, **__: "another")
    with pytest.raises(CheckFailed, match=r"text: the conversation `.*becomes another prompt"):
        pleexport.build(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_ids_of_a_bundle_are_those_of_the_original(
    runner: pleexport.Runner, checkpoint: Path
) -> None:
    original = AutoTokenizer.from_pretrained(checkpoint, chat_template=THINKING)
    for text in ("ab a b<late>é€", "a" * 100, "<wide> <tool>"):
        assert runner.encode(text) == original(text)["input_ids"]
    for arguments in ({}, {"enable_thinking": False}, {"tools": [{"name": "f"}]}):
        expected = original.apply_chat_template(
            [HELLO], add_generation_prompt=True, return_dict=False, **arguments
        )
        assert runner.encode([HELLO], arguments) == expected


def test_the_library_opens_a_bundle_as_it_opens_the_checkpoint(
    bundle: Path, checkpoint: Path
) -> None:
    stored, original = (AutoTokenizer.from_pretrained(folder) for folder in (bundle, checkpoint))
    for text in ("ab a b<late>é€", "<wide> <tool>"):
        assert stored(text)["input_ids"] == original(text)["input_ids"]
    assert stored.special_tokens_map == original.special_tokens_map
    assert stored.apply_chat_template([HELLO], tokenize=False).startswith("(none)<turn>user")


def test_an_answer_that_was_begun_goes_on(runner: pleexport.Runner, checkpoint: Path) -> None:
    original = AutoTokenizer.from_pretrained(checkpoint, chat_template=THINKING)
    begun = [HELLO, {"role": "assistant", "content": "ab a"}]
    expected = original.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert runner.encode(begun) == expected
    closed = original.apply_chat_template(begun, add_generation_prompt=True, return_dict=False)
    assert runner.encode(begun, {"add_generation_prompt": True}) == closed
    with pytest.raises(InputError, match="leaves no place for another"):
        runner.encode(begun, {"add_generation_prompt": True, "continue_final_message": True})


def test_generated_text_is_what_the_original_decodes(
    runner: pleexport.Runner, checkpoint: Path
) -> None:
    original = AutoTokenizer.from_pretrained(checkpoint)
    for seed in range(20):
        tokens = list(
            runner.generate(
                "ab",
                max_new_tokens=24,
                temperature=3.0,
                seed=seed,
                ignore_eos=True,
                template_arguments=None,
            )
        )
        ids = [token.id for token in tokens]
        text = "".join(token.text for token in tokens)
        assert text == original.decode(ids, skip_special_tokens=True)


def test_stop_strings_end_a_text_of_bytes(runner: pleexport.Runner) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 3.0, "ignore_eos": True}
    whole = "".join(t.text for t in runner.generate("ab", seed=1, **options))
    stop = whole[len(whole) // 2 :][:2]
    cut = "".join(t.text for t in runner.generate("ab", seed=1, stop=[stop], **options))
    assert cut == whole.partition(stop)[0]
    assert runner.stats.finish_reason == "stop"


def test_a_bundle_holds_the_format_and_its_proof(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    form = manifest.chat_format
    assert form is not None
    tokenizer = Tokenizer(tokenizer_files(bundle))
    ids = tokenizer.encode_prompt(form.render(TALK))
    assert ids == tokenizer.encode_chat(TALK)
    assert [tokenizer.special_text(i) for i in form.end_ids] == ["<eos>"]
    text = json.loads((bundle / "parity.json").read_text())["tokenizer"]
    assert text["formatted"] > 500


def test_parity_fails_where_the_format_differs(bundle: Path) -> None:
    form = read_manifest(bundle).chat_format
    assert form is not None
    tokenizer = Tokenizer(tokenizer_files(bundle))
    worse = msgspec.structs.replace(form.joints[0], text="")
    changed = msgspec.structs.replace(form, joints=[worse, *form.joints[1:]])
    found = check_text(tokenizer, None, changed)
    assert found is not None
    assert found.differences[0].startswith("the chat format differs from the template: of the")
    files = tokenizer_files(bundle)
    bare = Tokenizer({k: v for k, v in files.items() if k != "chat_template.jinja"})
    found = check_text(bare, None, form)
    assert found is not None
    assert "there is a chat format, and no chat template" in found.differences


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f["joints"].append(f["joints"][0]), "`joints` has two joints from `start` to"),
        (lambda f: f["joints"].extend(f["joints"] * 2), "Expected `array` of length <= 16"),
        (lambda f: f["joints"][0].update(text="a" * 70000), "Expected `str` of length <= 65536"),
        (lambda f: f["joints"][0].update(trim_next="a" * 65), "Expected `str` of length <= 64"),
        (lambda f: f["joints"][0].update(next="tool"), "Invalid enum value 'tool'"),
        (lambda f: f.update(thoughts={"close": ""}), "Expected `str` of length >= 1"),
        (lambda f: f.update(tools=[]), "unknown field `tools`"),
    ],
)
def test_a_format_that_cannot_be_is_refused(
    change: Any, reason: str, bundle: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    change_manifest(other, lambda manifest: change(manifest["chat_format"]))
    with pytest.raises(BundleError, match=reason):
        read_manifest(other)


class Scripted:
    """A runner that writes what it is told; the ids of each prompt are kept."""

    def __init__(self, folder: Path, answers: Sequence[str]) -> None:
        self.tokenizer = Tokenizer(tokenizer_files(folder))
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(eos_token_ids=[1]))
        self.config = GenerationConfig(stop_strings="b!")
        self._answers, self.prompts = iter(answers), []  # type: ignore[var-annotated]

    def encode(self, messages: Any, arguments: Any) -> list[int]:
        ids = self.tokenizer.encode_chat(messages, arguments)
        self.prompts.append(self.tokenizer.decode(ids, with_specials=True))
        return ids

    def generate(self, ids: list[int], **options: Any) -> Iterator[Token]:
        answer = next(self._answers)
        if answer == "fails":
            raise InputError("too long", hint="none")
        stream = self.tokenizer.stream(ids)
        for token_id in self.tokenizer.encode_prompt(answer):
            yield Token(token_id, stream.push(token_id))
        yield Token(1, stream.flush())


def scripted(folder: Path, *answers: str, template: str = THINKING) -> Scripted:
    save(byte_fallback(), folder, bos_token="<bos>", chat_template=template)
    return Scripted(folder, answers)


def asked(conversation: Conversation, *contents: str) -> list[str]:
    return ["".join(conversation.ask(content)) for content in contents]


def test_history_keeps_markers_by_which_templates_take_thoughts_out(tmp_path: Path) -> None:
    model = scripted(tmp_path, "<think>\nhm é</think>\n\nbab", "a")
    conversation = Conversation(model, system="ab")  # type: ignore[arg-type]
    assert asked(conversation, "a", "b") == ["bab", "a"]
    assert conversation.messages[2]["content"] == "<think>\nhm é</think>\n\nbab"
    assert "hm" not in model.prompts[1]
    assert "<turn>assistant\nbab<eos>" in model.prompts[1]
    assert model.prompts[0].count("<turn>system\nab<eos>") == 1


def test_special_tokens_stay_in_history_and_out_of_sight(tmp_path: Path) -> None:
    model = scripted(tmp_path, "<|channel>thought\na b<channel|>ab<turn>a", "b", template=PLAIN)
    conversation = Conversation(model)  # type: ignore[arg-type]
    assert asked(conversation, "a", "b") == ["aba", "b"]
    assert "<|channel>thought\na b<channel|>ab<turn>a<eos>" in model.prompts[1]


def test_thoughts_are_shown_when_asked_for(tmp_path: Path) -> None:
    model = scripted(tmp_path, "<|channel>thought\na b<channel|>ab", template=PLAIN)
    conversation = Conversation(model, show_thinking=True)  # type: ignore[arg-type]
    assert asked(conversation, "a") == ["<|channel>thought\na b<channel|>ab"]


def test_a_message_that_cannot_be_answered_is_forgotten(tmp_path: Path) -> None:
    model = scripted(tmp_path, "a", "fails", "b")
    conversation = Conversation(model)  # type: ignore[arg-type]
    assert asked(conversation, "a") == ["a"]
    with pytest.raises(PleexportError):
        asked(conversation, "b")
    assert len(conversation.messages) == 2
    assert asked(conversation, "c") == ["b"]


def test_a_stop_string_is_not_kept(tmp_path: Path) -> None:
    model = scripted(tmp_path, "abca", "ab!ca")
    conversation = Conversation(model, stop=["c"])  # type: ignore[arg-type]
    asked(conversation, "a", "a")
    assert [m["content"] for m in conversation.messages[1::2]] == ["ab", "a"]


@pytest.mark.parametrize(
    ("prompt", "answer", "seen"),
    [
        ("a", "a<think>b</think>c", "ac"),
        ("a", "<think>b</think>  c<think>b</think>a", "ca"),
        ("a", "<think>b", ""),
        ("a", "a<thin", "a<thin"),
        ("a", "a < b", "a < b"),
        ("<think>\n", "b</think>\n\nc", "c"),
        ("a", "</think>c", "</think>c"),
        ("a", "<|channel>c<channel|>a", "ca"),
    ],
)
def test_thoughts_are_told_from_answers_however_they_come(
    prompt: str, answer: str, seen: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(tokenizer_files(save(byte_fallback(), tmp_path)))
    before, ids = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(answer)
    stream, found = tokenizer.stream(before), ThoughtFilter(tokenizer, before, show=False)
    pieces = [found.push(i, stream.push(i)) for i in ids]
    pieces += [found.push(1, stream.flush()), found.flush()]
    assert "".join(pieces) == seen


def test_other_markers_are_taken_from_the_folder(tmp_path: Path) -> None:
    field = {"reasoning_content": {"open": "<hm>", "close": "</hm>"}, "content": {}}
    folder = save(byte_fallback(), tmp_path, response_template={"fields": field})
    tokenizer = Tokenizer(tokenizer_files(folder))
    found = ThoughtFilter(tokenizer, [], show=False)
    assert found.push(5, "a<hm>b</hm>c") + found.flush() == "ac"


def test_thoughts_cut_at_random_are_never_shown(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_files(save(byte_fallback(), tmp_path)))
    generator = random.Random(0)
    for _ in range(300):
        text = "ans<think>secret <b> </thin </think>wer <thinking"
        found, shown = ThoughtFilter(tokenizer, [], show=False), ""
        while text:
            cut = generator.randrange(1, 6)
            shown += found.push(5, text[:cut])
            text = text[cut:]
        assert shown + found.flush() == "answer <thinking"


def run(bundle: Path, *args: object, stdin: bytes = b"", **environment: str) -> Any:
    command = [sys.executable, "-m", "pleexport", "run", str(bundle), *map(str, args)]
    return subprocess.run(
        [*command, "--max-new-tokens", "3"],
        input=stdin,
        capture_output=True,
        check=False,
        env=os.environ | {"NO_COLOR": "1"} | environment,
    )


def test_the_command_line_passes_arguments_to_the_template(bundle: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "f"}}]')
    done = run(
        bundle,
        *("--prompt", "ab", "--system", "a", "--tools", tools, "--show-thinking"),
        *("--template-argument", "enable_thinking=false", "--template-argument", "x=text"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--no-chat", "--system", "a"], "are for a chat template, and there is none in use"),
        (["--template-argument", "x"], "`--template-argument` has `x`; expected NAME=VALUE"),
        (["--tools", "no.json"], "No such file"),
        (["--tools", __file__], "is not valid JSON"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_sentence(
    args: list[str], message: str, bundle: Path
) -> None:
    done = run(bundle, "--prompt", "ab", *args)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1", "C.UTF-8"])
def test_input_with_half_a_character_is_read(locale: str, bundle: Path) -> None:
    broken = b"a\xc3\n\xe2\x82\nab \xc3\xa9\n\xff\xfe\n"
    done = run(bundle, stdin=broken, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr
