"""The runner: generation, streaming, several at once, refusals, and life without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import gemma4
from numpy.typing import NDArray

import pleexport
from pleexport.backends.onnx import files, packing, session
from pleexport.errors import BundleError, InputError
from pleexport.process import memory
from pleexport.runtime.blob import Blob

SAMPLE = Path(__file__).parents[1] / "samples" / "gemma4-kjv"


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped sample, built as for phones."""
    out = tmp_path_factory.mktemp("sample") / "bundle"
    return pleexport.build(SAMPLE, out, target="android", verify=False).path


def test_the_sample_writes_text_that_streams_as_it_reads(sample_bundle: Path) -> None:
    runner = pleexport.Runner(sample_bundle)
    assert runner.tokenizer is not None
    tokens = list(runner.generate("And the LORD said unto", max_new_tokens=40))
    streamed = "".join(token.text for token in tokens)
    ids = runner.tokenizer.encode("And the LORD said unto")
    whole = runner.tokenizer.decode([*ids, *(token.id for token in tokens)])
    assert whole == "And the LORD said unto" + streamed
    known = set((SAMPLE.parent / "heldout.txt").read_text(encoding="utf-8").split())
    words = streamed.split()[1:-1]  # the ends may be cut
    assert sum(word in known for word in words) >= 0.8 * len(words)


def test_sampling_with_a_seed_repeats_and_without_differs(sample_bundle: Path) -> None:
    runner = pleexport.Runner(sample_bundle)

    def ids(seed: int) -> list[int]:
        options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
        tokens = runner.generate("In the", max_new_tokens=20, seed=seed, **options)  # type: ignore[arg-type]
        return [token.id for token in tokens]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_pages_are_asked_for_before_their_rows_are_read(
    sample_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = pleexport.Runner(sample_bundle)
    calls: list[tuple[str, set[int]]] = []

    def record(name: str) -> None:
        original = getattr(runner.blob, name)

        def recorded(row_ids: NDArray[np.int64], *rest: object) -> object:
            calls.append((name, set(row_ids.tolist())))
            return original(row_ids, *rest)

        monkeypatch.setattr(runner.blob, name, recorded)

    record("prefetch")
    record("lookup")
    tokens = list(runner.generate([5, 6, 7], max_new_tokens=4))
    asked: set[int] = set()
    for name, rows in calls:
        if name == "prefetch":
            asked |= rows
        else:
            assert rows <= asked
    assert asked == {5, 6, 7, *(token.id for token in tokens[:-1])}


def vectors_of(runner: pleexport.Runner, ids: list[int]) -> dict[str, NDArray[np.float32]]:
    """By graph input, what ids look up."""
    found = runner.blob.lookup(runner.blob.row_ids(ids))
    return {n.name: found[n.table] for n in runner.bundle.decoder.contract.lookup_inputs}


def test_given_vectors_take_the_place_of_the_rows(sample_bundle: Path) -> None:
    runner = pleexport.Runner(sample_bundle)
    expected = runner.feed([9, 10])
    runner.reset()
    given = vectors_of(runner, [9, 10])
    np.testing.assert_array_equal(runner.feed([1, 2], given), expected)
    runner.reset()
    assert not np.array_equal(runner.feed([1, 2]), expected)


def test_a_stop_string_ends_the_text_before_it(sample_bundle: Path) -> None:
    runner = pleexport.Runner(sample_bundle)
    full = "".join(t.text for t in runner.generate("And the LORD said", max_new_tokens=40))
    stop = full[10:14]
    cut = "".join(
        t.text for t in runner.generate("And the LORD said", max_new_tokens=40, stop=[stop])
    )
    assert cut == full[: full.index(stop)]
    assert runner.stats.finish_reason == "stop"


def test_a_longer_prompt_reads_only_its_new_part(gemma4_bundle: Path) -> None:
    runner, fresh = pleexport.Runner(gemma4_bundle), pleexport.Runner(gemma4_bundle)
    first = [5, 6, 7, 8, 9]
    answer = [t.id for t in runner.generate(first, max_new_tokens=5, ignore_eos=True)]
    longer = [*first, *answer, 11, 12]
    continued = [t.id for t in runner.generate(longer, max_new_tokens=8, ignore_eos=True)]
    assert runner.stats.prompt_tokens == 3  # the last token of the answer, and two new ones
    expected = [t.id for t in fresh.generate(longer, max_new_tokens=8, ignore_eos=True)]
    assert fresh.stats.prompt_tokens == len(longer)
    assert continued == expected


def test_runners_on_one_bundle_do_not_disturb_each_other(gemma4_bundle: Path) -> None:
    a, b = pleexport.Runner(gemma4_bundle), pleexport.Runner(gemma4_bundle)
    expected = [t.id for t in a.generate([3, 4, 5], max_new_tokens=10, ignore_eos=True)]
    one = a.generate([3, 4, 5], max_new_tokens=10, ignore_eos=True)
    two = b.generate([60, 61], max_new_tokens=10, ignore_eos=True)
    a.reset()
    got = [x.id for x, _ in zip(one, two, strict=True)]
    assert got == expected


def test_generators_that_are_used_later_read_their_whole_prompt(gemma4_bundle: Path) -> None:
    runner = pleexport.Runner(gemma4_bundle)
    expected = [t.id for t in runner.generate([60, 61], max_new_tokens=5, ignore_eos=True)]
    runner.reset()
    one = runner.generate([3, 4, 5], max_new_tokens=5, ignore_eos=True)
    two = runner.generate([60, 61], max_new_tokens=5, ignore_eos=True)
    list(one)
    assert [t.id for t in two] == expected


def test_a_text_whose_runner_was_used_for_another_does_not_go_on(gemma4_bundle: Path) -> None:
    runner = pleexport.Runner(gemma4_bundle)
    for use in (
        lambda: runner.logits([1, 2]),
        lambda: runner.feed([1]),
        runner.reset,
        lambda: next(runner.generate([60, 61])),
    ):
        text = runner.generate([3, 4, 5], max_new_tokens=5, ignore_eos=True)
        next(text)
        use()
        with pytest.raises(InputError, match="another call has used this runner since"):
            next(text)


def test_two_threads_get_right_answers_or_a_clear_error(gemma4_bundle: Path) -> None:
    runner, rng = pleexport.Runner(gemma4_bundle, threads=1), np.random.default_rng(0)
    prompts = [rng.integers(0, 100, 30).tolist() for _ in range(4)]
    logits = [runner.logits(ids) for ids in prompts]
    texts = [[t.id for t in runner.generate(ids, max_new_tokens=6)] for ids in prompts]
    refused: list[str] = []
    wrong: list[int] = []

    def use(first: int) -> None:
        for i in range(first, first + 40):
            n = i % len(prompts)
            try:
                if i % 2:
                    right = np.array_equal(runner.logits(prompts[n]), logits[n])
                else:
                    got = [t.id for t in runner.generate(prompts[n], max_new_tokens=6)]
                    right = got == texts[n]
            except InputError as err:
                refused.append(err.message)
            else:
                wrong.extend([] if right else [i])

    threads = [threading.Thread(target=use, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(refused) <= {
        "another thread is using this runner",
        "another call has used this runner since, so this text cannot go on",
    }
    assert refused, "the threads did meet"


@pytest.mark.parametrize(("count", "keep"), [(0, 1), (257, 1), (3, 4), (3, -1)])
def test_feeding_what_the_rings_cannot_hold_is_refused(
    count: int, keep: int, gemma4_bundle: Path
) -> None:
    runner = pleexport.Runner(gemma4_bundle)
    with pytest.raises(InputError, match=r"tokens at once|keep is"):
        runner.feed([1] * count, keep=keep)


def test_a_graph_that_fails_while_it_runs_is_one_sentence(
    gemma4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Error in execution:\nindices out of bounds")

    runner = pleexport.Runner(gemma4_bundle)
    monkeypatch.setattr("onnxruntime.InferenceSession.run_with_iobinding", fail)
    with pytest.raises(BundleError) as caught:
        runner.logits([1, 2])
    said = "model.onnx` cannot be run: Error in execution: indices out of bounds"
    assert caught.value.message.endswith(said)


def test_vectors_in_any_memory_order_are_read_right(gemma4_bundle: Path) -> None:
    runner = pleexport.Runner(gemma4_bundle)
    ids = [3, 4, 5]
    vectors = vectors_of(runner, ids)
    fortran = {name: np.asfortranarray(v) for name, v in vectors.items()}
    np.testing.assert_array_equal(runner.logits(ids), runner.logits(ids, vectors=fortran))


def test_processes_share_a_bundle(gemma4_bundle: Path) -> None:
    command = [sys.executable, "-m", "pleexport.cli", "run", str(gemma4_bundle)]
    processes = [
        subprocess.Popen(
            [*command, "--ids", "3,4,5", "--max-new-tokens", "6"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    texts = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(texts) == 1


def test_stats_count_rows_pages_and_memory(gemma4_bundle: Path) -> None:
    runner = pleexport.Runner(gemma4_bundle)
    list(runner.generate([3, 4, 5], max_new_tokens=4, ignore_eos=True))
    stats = runner.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finish_reason) == (3, 4, "length")
    assert stats.rows == 6  # the last token is not fed
    assert stats.row_bytes == 6 * runner.blob.row_stride
    assert 1 <= stats.pages <= 2 * stats.rows
    assert stats.first_token_seconds >= stats.prefill_seconds > 0
    if sys.platform == "linux":
        assert stats.anonymous_bytes
        assert stats.file_backed_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells memory apart")
def test_a_prompt_gives_its_scratch_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = gemma4(tmp_path / "ckpt", intermediate_size=32_768)
    bundle = pleexport.build(checkpoint, tmp_path / "bundle", verify=False)

    def kept() -> int:
        runner = pleexport.Runner(bundle)
        runner.feed([1])
        before = memory().anonymous or 0
        runner.feed([3] * 256)
        return (memory().anonymous or 0) - before

    def least() -> int:  # what runs for the first time keeps memory of its own
        return min(kept() for _ in range(3))

    one_array = 256 * 32_768 * 4
    assert least() < one_array
    # The same, if it is never asked to.
    monkeypatch.setattr(session, "give_back_memory", lambda: None)
    assert least() > 2 * one_array


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells memory apart")
def test_rows_that_were_read_leave_the_memory_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 1500, "vocab_size_per_layer_input": 1500}
    checkpoint = gemma4(tmp_path / "ckpt", hidden_size_per_layer_input=512, **sizes)
    bundle = pleexport.build(checkpoint, tmp_path / "b", table_dtype="fp32", verify=False)

    def mapped() -> int:
        runner = pleexport.Runner(bundle)
        runner.feed([3] * 256)
        before = memory().file_backed or 0
        for begin in range(0, 1280, 256):
            runner.feed(list(range(begin, begin + 256)))
        return (memory().file_backed or 0) - before

    def least() -> int:  # code that runs for the first time is mapped too
        return min(mapped() for _ in range(3))

    table = 1500 * 6 * 512 * 4
    assert least() < 0.2 * table
    monkeypatch.setattr(Blob, "release_pages", lambda _: None)
    assert least() > 0.8 * table


def test_the_context_ends_a_text(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(gemma4_checkpoint, tmp_path / "b", context=12, verify=False)
    runner = pleexport.Runner(bundle)
    tokens = list(runner.generate([1, 2, 3, 4], max_new_tokens=50, ignore_eos=True))
    assert len(tokens) == 8
    assert runner.stats.finish_reason == "context"
    with pytest.raises(InputError, match="13 tokens exceed the bundle's context of 12"):
        runner.logits(list(range(13)))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([500], {}, "token id 500 has no row; ids go from 0 to 119"),
        ([-1], {}, "token id -1 has no row"),
        ("text", {}, "this bundle has no tokenizer"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"stop": ["x"]}, "stop strings need a tokenizer"),
    ],
)
def test_unusable_prompts_and_options_are_refused_at_once(
    gemma4_bundle: Path, prompt: object, options: dict[str, object], message: str
) -> None:
    runner = pleexport.Runner(gemma4_bundle)
    with pytest.raises(InputError, match=message):
        runner.generate(prompt, **options)  # type: ignore[arg-type]


def test_ids_beyond_the_per_layer_table_follow_the_original(gemma3n_bundle: Path) -> None:
    blob = pleexport.Runner(gemma3n_bundle).blob
    rows = blob.lookup(np.array([0, 120, 123]))["embed_tokens_per_layer"]
    assert (rows[0] == rows[1]).all()
    assert (rows[0] == rows[2]).all()


def test_the_runner_needs_neither_torch_nor_transformers(
    gemma4_bundle: Path, tmp_path: Path
) -> None:
    code = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "safetensors"):
            raise ImportError(f"{{name}} must not be imported")

sys.meta_path.insert(0, Refuse())
import pleexport
runner = pleexport.Runner({str(gemma4_bundle)!r})
print([t.id for t in runner.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)])
pleexport.verify({str(gemma4_bundle)!r})
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    expected = pleexport.Runner(gemma4_bundle).generate(
        [1, 2, 3], max_new_tokens=4, ignore_eos=True
    )
    assert result.stdout.strip() == str([t.id for t in expected])


def test_packed_weights_are_written_once_and_give_the_same_logits(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [5, 9, 2, 77, 31]
    expected = pleexport.Runner(sample_bundle).logits(ids)
    folder = tmp_path / "packed"
    first = pleexport.Runner(sample_bundle, packed_weights=folder).logits(ids)
    (kept,) = folder.iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert set(written) == {"model.onnx", "model.onnx.data", "checksums.json"}
    monkeypatch.setattr(packing, "_write_packed", None)  # not again
    second = pleexport.Runner(sample_bundle, packed_weights=folder).logits(ids)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, expected, atol=1e-5)
    monkeypatch.setattr(packing, "_processor", lambda: "another")
    with pytest.raises(TypeError):  # weights for another processor are not used
        pleexport.Runner(sample_bundle, packed_weights=folder)


def test_packed_weights_that_the_runtime_cannot_read_again_are_its_fault(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = packing.open_graph

    def open_graph(graph: Path, options: Any) -> Any:
        # As versions up to 1.30 do with a graph of branches.
        if graph.parent != sample_bundle:
            graph.write_bytes(b"no graph")
        return opened(graph, options)

    monkeypatch.setattr(packing, "open_graph", open_graph)
    with pytest.raises(InputError, match="cannot load the packed weights that it wrote") as caught:
        pleexport.Runner(sample_bundle, packed_weights=tmp_path / "packed")
    assert caught.value.hint == ("leave the packed weights out, or take onnxruntime 1.31 or newer")
    assert list((tmp_path / "packed").iterdir()) == []


def test_packing_that_fails_leaves_nothing(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: object, artifact: object, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_write_packed", fail)
    with pytest.raises(KeyboardInterrupt):
        pleexport.Runner(sample_bundle, packed_weights=tmp_path / "packed")
    assert list((tmp_path / "packed").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder that can be written to"):
        pleexport.Runner(sample_bundle, packed_weights=tmp_path / "file")


def test_threads_spin_as_the_target_or_the_caller_says(
    gemma4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laptop = (Path(__file__).parents[1] / "targets" / "laptop.toml").read_text()
    (tmp_path / "shared.toml").write_text(f"spin = false\n{laptop}")
    bundle = pleexport.build(
        gemma4_checkpoint, tmp_path / "b", target=str(tmp_path / "shared.toml"), verify=False
    )
    assert json.loads((bundle.path / "manifest.json").read_text())["spin"] is False
    told, of_threads = [], files.session_options

    def options(threads: int, **others: Any) -> Any:
        found = of_threads(threads, **others)
        told.append(found.get_session_config_entry("session.intra_op.allow_spinning"))
        return found

    monkeypatch.setattr(files, "session_options", options)
    logits = [pleexport.Runner(bundle, spin=spin).logits([2, 3]) for spin in (None, False, True)]
    assert told == ["0", "0", "1"]
    assert np.array_equal(logits[0], logits[2])
