"""The command line: parse, call, print. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import typer

from pleexport import errors
from pleexport.backends.registry import NAMES
from pleexport.errors import escaped, escaped_json
from pleexport.progress import Progress

app = typer.Typer(
    name="pleexport",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="Hugging Face folder of the trained model or of an adapter, or RWKV's .pth file; "
        "or the id of a model on the Hugging Face hub, OWNER/MODEL.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the hub.", show_default="main")
]
TokenOption = Annotated[
    str | None, typer.Option(help="For the hub.", show_default="that of `hf auth login`")
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Take what was fetched before; ask nobody.")
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `pleexport build` wrote.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
# Where help says what an option is by default.
_OWN = "the checkpoint's"
PackedOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep weights packed for this processor in a folder: little memory, quick to load.",
        metavar="DIR",
    ),
]
SpinOption = Annotated[
    bool | None,
    typer.Option(
        "--spin/--no-spin",
        help="Let waiting threads spin: fast alone, slow beside another busy process.",
        show_default="the target's",
    ),
]
CheckOption = Annotated[
    bool, typer.Option(help="Compare what is loaded with its checksums, or trust it.")
]
TextFileOption = Annotated[
    Path | None, typer.Option("--text", help="Text file to measure logits and fidelity on.")
]


AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        help="Merge this adapter of PEFT, all of it or a part; may be repeated.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="Model that the adapter at CKPT was trained on.",
        show_default="what the adapter names",
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Ship language models with per-layer embeddings on devices: Gemma 3n and 4,
    RWKV with DeepEmbed, Embformer.

    Splits a trained checkpoint into a dense graph and a memory-mapped file of all table rows,
    proves that both together compute what the PyTorch original computes, and runs them.

    Example: pleexport build my-gemma-4-E2B --target android
    """
    if version:
        import importlib.metadata

        typer.echo(importlib.metadata.version("pleexport"))
        raise typer.Exit


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    adapters: AdaptersOption = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds and what a bundle of it would weigh; reads no weights.

    Example: pleexport inspect my-gemma-4-E2B
    """
    from pleexport.inspection.inspect import inspect as inspect_checkpoint
    from pleexport.show.inspection import describe_model

    info = inspect_checkpoint(
        checkpoint,
        adapters=adapters,
        base=base,
        revision=revision,
        token=token,
        offline=offline,
        progress=Progress(quiet=as_json),
    )
    _print_json(info) if as_json else typer.echo(escaped(describe_model(info)))


@app.command()
def build(
    context_of: typer.Context,
    checkpoint: CheckpointArgument,
    target: Annotated[
        str, typer.Option(help="Device profile: a name from `pleexport targets`, or a .toml file.")
    ] = "laptop",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the bundle.", show_default="CKPT-TARGET")
    ] = None,
    table_dtype: Annotated[
        str | None,
        typer.Option(
            help="source (bit-exact), fp32, fp16, bf16, int8, int4.", show_default="the target's"
        ),
    ] = None,
    weight_dtype: Annotated[
        str | None,
        typer.Option(
            help="source (a checkpoint's own codes), fp32, fp16, int8, int4.",
            show_default="the target's",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="How many weights may share a scale: 16, 32, 64, 128, 256. "
            "If given, no grid that matrices were trained for is followed.",
            show_default="the target's",
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option(help="One zero point for all blocks, or one for each.")
    ] = True,
    head_dtype: Annotated[
        str | None,
        typer.Option(
            help="Output head: source, fp32, fp16, int8, int4.", show_default="the target's"
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Keys and values of full layers: fp32, fp16, int8; none: look rows up again.",
            show_default="the target's",
        ),
    ] = None,
    activation_rounding: Annotated[
        bool,
        typer.Option(help="Round activations where a quantized checkpoint says so, or nowhere."),
    ] = True,
    context: Annotated[
        int | None,
        typer.Option(help="Largest number of positions.", show_default="the target's"),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="Largest bundle; dtypes that you leave open are chosen for it.",
            metavar="2.2GB",
            show_default="what the store delivers",
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help=f"{', '.join(NAMES)}.", show_default="the target's")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A text file; int8 and int4 weights are rounded for the least error on it.",
            metavar="FILE.txt",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json, or RWKV's vocabulary.", show_default="beside the weights"
        ),
    ] = None,
    adapters: AdaptersOption = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle at the same place.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare with the PyTorch original; keep only what passes.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle: dense graph, blob of rows, tokenizer, parity report.

    Example: pleexport build my-gemma-4-E2B --target android --out phone-bundle
    """
    from pleexport.export.builder import build as build_bundle
    from pleexport.export.options import BuildOptions

    options = cast(
        BuildOptions, {name: context_of.params[name] for name in BuildOptions.__annotations__}
    )
    bundle = build_bundle(checkpoint, out, progress=Progress(quiet=as_json), **options)
    if as_json:
        _print_json({"bundle": str(bundle.path), **msgspec.to_builtins(bundle.manifest)})
        return
    from pleexport.show.bundle import describe_bundle

    typer.echo(escaped(describe_bundle(bundle)))


@app.command()
def verify(
    bundle: BundleArgument,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint it was built from; without it, only files are checked."),
    ] = None,
    adapters: AdaptersOption = None,
    base: BaseOption = None,
    text: TextFileOption = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="What `build --tokenizer` was given.", show_default="beside the weights"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report with plots.", metavar="FILE.html")
    ] = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check that a bundle is undamaged and computes what the PyTorch original computes.

    Exit code 1 when a check fails.

    Example: pleexport verify phone-bundle --checkpoint my-gemma-4-E2B --report parity.html
    """
    from pleexport.parity.report import report_fields
    from pleexport.parity.verify import verify as verify_bundle
    from pleexport.show.html import write_html
    from pleexport.show.parity import describe_parity

    given = {
        "--report": report,
        "--text": text,
        "--tokenizer": tokenizer,
        "--adapter": adapters,
        "--base": base,
    }
    what = next((name for name, value in given.items() if value), None)
    if what and not checkpoint:
        raise errors.PleexportError(
            f"`{what}` is for comparing with the original", hint="add `--checkpoint CKPT`"
        )
    if report:
        _refuse_report(report)
    result = verify_bundle(
        bundle,
        checkpoint=checkpoint,
        adapters=adapters,
        base=base,
        text=text,
        tokenizer=tokenizer,
        revision=revision,
        token=token,
        offline=offline,
        progress=Progress(quiet=as_json),
    )
    if result is None:
        if as_json:
            _print_json({"files": "intact"})
        else:
            typer.echo("Files are intact. Add `--checkpoint CKPT` to compare with the original.")
        return
    if report:
        write_html(result, bundle, report)
    if as_json:
        _print_json(report_fields(result))
    else:
        typer.echo(escaped(describe_parity(result)))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def run(
    bundle: BundleArgument,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; interactive without it.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens.", show_default=_OWN)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default=_OWN)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Keep the k most likely tokens; 0 for all.", show_default=_OWN),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the most likely tokens up to this sum.", show_default=_OWN),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Keep tokens at least this likely, relative to the best.", show_default=_OWN
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1 discourages tokens that the text has already.", show_default=_OWN
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other field of a generation_config.json; may be repeated.",
            metavar="NAME=JSON",
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest tokens, whatever the checkpoint says.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text at this string; may be repeated.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="lookup",
            help="Read ahead what followed when the text had these words before. That is faster "
            "where it repeats itself. Near ties may fall otherwise.",
        ),
    ] = None,
    ids: Annotated[str | None, typer.Option(help="Prompt as token ids, e.g. 2,651,9456.")] = None,
    chat: Annotated[
        bool, typer.Option(help="Use the tokenizer's chat template where it has one.")
    ] = True,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="Tools that the model may call: a list in JSON.", metavar="FILE.json"),
    ] = None,
    template_argument: Annotated[
        list[str] | None,
        typer.Option(
            help="What the chat template may ask for, e.g. enable_thinking=true; may be repeated.",
            metavar="NAME=JSON",
        ),
    ] = None,
    show_thinking: Annotated[
        bool, typer.Option("--show-thinking", help="Show the model's thoughts too.")
    ] = False,
    stats: Annotated[bool, typer.Option(help="Print speed, drafts, memory and lookups.")] = False,
    threads: Annotated[int, typer.Option(help="Threads; 0 for one a core.")] = 0,
    spin: SpinOption = None,
    packed_weights: PackedOption = None,
    verify: CheckOption = True,
) -> None:
    """Generate text with a bundle, streaming.

    Example: pleexport run phone-bundle --prompt "In the beginning" --stats
    """
    from pleexport.runtime.conversation import Conversation
    from pleexport.runtime.runner import Prompt, Runner
    from pleexport.show.stats import describe_stats

    if prompt is not None and ids is not None:
        raise errors.PleexportError(
            "`--prompt` and `--ids` exclude each other", hint="leave one of them out"
        )
    arguments = _template_arguments(template_argument or [], tools)
    runner = Runner(
        bundle, threads=threads, spin=spin, packed_weights=packed_weights, verify=verify
    )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "greedy": greedy,
        "seed": seed,
        "stop": stop or [],
        "draft": draft,
        **_parse_options(option or []),
    }

    has_template = runner.tokenizer is not None and runner.tokenizer.has_chat_template
    as_chat = chat and has_template and ids is None
    if not as_chat and (arguments or system is not None):
        raise errors.PleexportError(
            "`--system`, `--tools` and `--template-argument` are for a chat template, and there is "
            "none in use",
            hint="leave them out" if chat else "leave `--no-chat` out",
        )

    def show(pieces: Iterable[str]) -> None:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stats:
            typer.echo(
                escaped(describe_stats(runner.stats, runner.config, as_chat=as_chat)), err=True
            )

    def text_of(text: Prompt) -> Iterator[str]:
        for token in runner.generate(text, **options):
            yield token.text if runner.tokenizer else f"{token.id} "

    ask: Callable[[str], Iterator[str]] = text_of
    if as_chat:
        ask = Conversation(
            runner,
            system=system,
            template_arguments=arguments,
            show_thinking=show_thinking,
            **options,
        ).ask
    if ids is not None:
        show(text_of(_parse_ids(ids)))
    elif prompt is not None:
        show(ask(prompt))
    else:
        _interactive(
            lambda line: show(ask(line)), what="message" if as_chat else "text to continue"
        )


@app.command()
def bench(
    bundle: BundleArgument,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths to measure, separated by commas.")
    ] = "128,512",
    decode_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option(help="Runs of each; the median is shown.")] = 3,
    cold: Annotated[
        bool, typer.Option(help="Drop the blob from the page cache before each run.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads; 0 for one a core.")] = 0,
    spin: SpinOption = None,
    packed_weights: PackedOption = None,
    verify: CheckOption = True,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill, decode and time to first token of a bundle.

    Example: pleexport bench phone-bundle --prompt-tokens 128,512 --decode-tokens 64
    """
    from pleexport.runtime.bench import bench as bench_bundle
    from pleexport.show.bench import describe_bench

    lengths = _parse_ids(prompt_tokens)
    result = bench_bundle(
        bundle,
        prompt_tokens=lengths,
        decode_tokens=decode_tokens,
        repeat=repeat,
        cold=cold,
        threads=threads,
        spin=spin,
        packed_weights=packed_weights,
        verify=verify,
        progress=Progress(quiet=as_json),
    )
    _print_json(result) if as_json else typer.echo(escaped(describe_bench(result)))


@app.command()
def package(
    bundle: BundleArgument,
    target: Annotated[
        str,
        typer.Option(
            help="Device profile that has packs: a name from `pleexport targets`, or a .toml file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the package.", metavar="DIR")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="For the web: a text like those that users write and read. The rows that it uses "
            "most are what a page fetches first. May be given several times.",
            metavar="FILE",
        ),
    ] = None,
    languages: Annotated[
        str,
        typer.Option(
            help="For the web, without a text: languages whose words are taken, by commas.",
            metavar="CODES",
        ),
    ] = "en",
    sign: Annotated[
        Path | None,
        typer.Option(help="Private key of P-256 to sign the index with.", metavar="KEY.pem"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a package at the same place.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a bundle as a target's store takes it, with an index for a server of your own.

    Example: pleexport package phone-bundle --target android --out phone-package
    """
    from pleexport.export.packaging import package as package_bundle
    from pleexport.show.package import describe_package, package_fields

    made = package_bundle(
        bundle,
        out,
        target=target,
        texts=text or (),
        languages=[code.strip() for code in languages.split(",")],
        sign=sign,
        overwrite=overwrite,
        progress=Progress(quiet=as_json),
    )
    _print_json(package_fields(made)) if as_json else typer.echo(escaped(describe_package(made)))


@app.command(name="targets")
def show_targets(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show one target in full.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the device profiles, or show one.

    Example: pleexport targets android
    """
    from pleexport import targets
    from pleexport.show.targets import describe_target, describe_targets

    chosen = [targets.load(name)] if name else [targets.load(n) for n in targets.names()]
    if as_json:
        _print_json(chosen[0] if name else {"targets": msgspec.to_builtins(chosen)})
    elif name:
        typer.echo(escaped(describe_target(chosen[0])))
    else:
        typer.echo(escaped(describe_targets(chosen)))


_ONLY_RUNS = {"run", "bench", "package"}


class _Interrupted(BaseException):
    """Ctrl-C; not KeyboardInterrupt, which Typer would answer itself."""


def _interrupt(_signal: int, _frame: object) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; every expected failure is one sentence and an exit code."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    with contextlib.suppress(AttributeError):
        # Whatever the locale: what is no UTF-8 is replaced, and a text goes on.
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    try:
        app(standalone_mode=True)
    except BrokenPipeError:
        # The reader of our output went away, as with `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except errors.PleexportError as err:
        typer.echo(f"error: {err.message}", err=True)
        if err.hint:
            typer.echo(f"\nhint: {err.hint}", err=True)
        # A check that fails is a verdict of what checks; what only runs had wrong input.
        raise SystemExit(2 if _ONLY_RUNS & set(sys.argv[1:2]) else err.exit_code) from None
    except OSError as err:
        where = f"`{err.filename}`: " if err.filename else ""
        typer.echo(f"error: {where}{err.strerror or err}", err=True)
        typer.echo("\nhint: check the file or folder, its permissions and its disk", err=True)
        raise SystemExit(2) from None
    except _Interrupted:
        typer.echo("\ninterrupted; nothing half-written was left", err=True)
        raise SystemExit(130) from None


def _interactive(answer: Callable[[str], object], *, what: str) -> None:
    if sys.stdin is None:
        raise errors.PleexportError("standard input is closed", hint="pass `--prompt TEXT`")
    typer.echo(f"Type a {what} and press Enter; end with Ctrl-D.", err=True)
    while True:
        try:
            # A prompt, and editing of the line, for people only.
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            continue
        try:
            answer(line)
        except errors.PleexportError as err:
            typer.echo(f"error: {err.message}", err=True)
            if err.hint:
                typer.echo(f"\nhint: {err.hint}", err=True)


def _refuse_report(report: Path) -> None:
    """Say before the work what would keep a report from being written."""
    from pleexport.staging import followed

    place = followed(report)
    if not place.parent.is_dir():
        problem, hint = f"`{place.parent}` is not a folder", "make it, or choose another place"
    elif place.is_symlink():
        problem, hint = "it is a link to itself", "remove it, or choose another place"
    elif place.is_dir():
        problem, hint = "it is a folder", "name a file in it"
    else:
        return
    raise errors.PleexportError(f"`--report {report}` cannot be written: {problem}", hint=hint)


def _template_arguments(pairs: list[str], tools: Path | None) -> dict[str, Any]:
    """What a chat template may ask for, each given as `NAME=JSON` or `NAME=TEXT`, and tools."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise errors.PleexportError(
                f"`--template-argument` has `{pair}`; expected NAME=VALUE",
                hint="e.g. `--template-argument enable_thinking=true`",
            )
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    if tools is not None:
        found["tools"] = _read_tools(tools)
    return found


def _read_tools(path: Path) -> list[dict[str, Any]]:
    """Tools as JSON schemas, of a file."""
    try:
        tools = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as err:
        raise errors.PleexportError(
            f"`{path}` is not valid JSON ({err})",
            hint="`--tools` takes a list of tools, as JSON schemas",
        ) from err
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise errors.PleexportError(
            f"`{path}` is not a list of objects",
            hint="`--tools` takes a list of tools, as JSON schemas",
        )
    return tools


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.PleexportError(
            f"`--ids` has `{text}`; expected numbers separated by commas",
            hint="e.g. `--ids 2,651,9456`",
        ) from None


def _parse_options(pairs: list[str]) -> dict[str, Any]:
    """Fields of a generation config, each given as `NAME=JSON`."""
    from pleexport.runtime.generation_config import GenerationConfig

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            found[name] = json.loads(value) if equals else None
        except (ValueError, RecursionError):
            found[name] = None
        if found[name] is None:
            raise errors.PleexportError(
                f"`--option` has `{pair}`; expected NAME=VALUE with a value in JSON",
                hint="e.g. `--option no_repeat_ngram_size=3`",
            )
        if name not in GenerationConfig.__struct_fields__:
            raise errors.PleexportError(
                f"`--option` has `{name}`, which is no option of generation",
                hint=f"known are {', '.join(GenerationConfig.__struct_fields__)}",
            )
    return found


def _print_json(value: Any) -> None:
    text = json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False)
    typer.echo(escaped_json(text))


if __name__ == "__main__":
    main()
