"""The ``fireq-jax`` command. The top of the stack: it may import everything, nothing imports it."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()
notes = Console(stderr=True)

Model = Annotated[
    str | None,
    typer.Option("--model", help="Folder, .gguf file or hub id. Default: the embedded SmolLM2-135M-Instruct."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Preset used if the model is not quantised yet.")]
LmHead = Annotated[str, typer.Option(help="Output projection: float, int8, fp8 or int4.")]
Float = Annotated[bool, typer.Option("--float", help="Run the model as it is, without quantising it.")]
JsonFile = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Also write the results to this file.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")]
Seed = Annotated[int, typer.Option(help="Of the random draws.")]


@contextmanager
def _stage(name: str) -> Iterator[None]:
    with notes.status(f"{name} ..."):
        yield


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _source(model: str | None) -> str:
    import convert

    return str(convert.embedded_model()) if model is None else model


def _load(
    model: str | None, recipe: str, keep_float: bool, revision: str | None
) -> tuple[Any, dict[str, Any], dict[str, Any] | None, Any]:
    """Model, the parameters to run, the float ones if they were there, and the tokenizer."""
    import convert
    import fireq_jax
    from fireq_jax.demo import calibrated, compute_dtype

    source = _source(model)
    with _stage(f"loading {source}"):
        network, params = convert.load(source, revision=revision)
        tokenizer = convert.load_tokenizer(source, revision)
        network = network.clone(dtype=compute_dtype())
    if fireq_jax.recipe_of(params) is not None:
        if keep_float:
            raise ValueError(f"{source} holds quantised weights; --float needs the model they came from")
        return network, params, None, tokenizer
    if keep_float:
        return network, params, params, tokenizer
    return network, calibrated(network, params, tokenizer, recipe, _progress), params, tokenizer


@app.command()
def demo(
    model: Model = None,
    recipe: RecipeName = "best",
    max_new_tokens: MaxNewTokens = 64,
    json_file: JsonFile = None,
) -> None:
    """Load a model, quantise it, and compare size, perplexity and an answer before and after."""
    from convert.folder import write_json
    from fireq_jax.demo import run_demo

    result = run_demo(Path(_source(model)), recipe, max_new_tokens, _stage, _progress)
    table = Table(title=f"{Path(_source(model)).name} on {result['device']}, recipe {recipe}")
    for column in ("", "float (bf16 weights)", "INT4/FP8"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("parameters", f"{result['bytes_float']:,} bytes", f"{result['bytes_quantized']:,} bytes")
    cache = "cache_bytes_per_token"
    table.add_row("cache per token", f"{result[f'{cache}_float']:,} bytes", f"{result[f'{cache}_quantized']:,} bytes")
    table.add_row(
        f"perplexity ({result['scored_tokens']} tokens)",
        f"{result['perplexity_float']:.2f}",
        f"{result['perplexity_quantized']:.2f}",
    )
    console.print(table)
    console.print(f"[bold]{escape(result['question'])}[/bold]")
    console.print(f"[cyan]float:[/cyan] {escape(result['text_float'])}")
    console.print(f"[green]INT4/FP8:[/green] {escape(result['text_quantized'])}")
    console.print(f"{result['seconds']:.0f} s in all")
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id of a float model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: RecipeName = "best",
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="UTF-8 text to calibrate on. Default: CPython's help topics."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=512, help="Tokens of that text to use.")] = 8192,
    lm_head: LmHead = "float",
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    restart: Annotated[bool, typer.Option(help="Drop an interrupted conversion with other settings.")] = False,
) -> None:
    """Quantise a model and save it, one decoder block at a time; go on with it if it was interrupted."""
    import convert
    import fireq_jax
    from fireq_jax.calibration_text import calibration_tokens as pick_tokens
    from fireq_jax.calibration_text import default_calibration_text
    from fireq_jax.config import resolve_recipe
    from fireq_jax.demo import calibrated

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists already; pass --overwrite to replace it")
    settings = replace(resolve_recipe(recipe), lm_head=cast(Any, lm_head))
    text = None if calibration is None else calibration.read_text("utf-8")
    if settings.differentiates:  # through the whole model
        with _stage(f"loading {source}"):
            network, params = convert.load(source, revision=revision)
            tokenizer = convert.load_tokenizer(source, revision)
        quantized = calibrated(network, params, tokenizer, settings, _progress, text, calibration_tokens)
        with _stage(f"writing {out}"):
            convert.save(out, network, quantized, tokenizer=tokenizer, overwrite=overwrite)
        before, after = fireq_jax.parameter_bytes(params), fireq_jax.parameter_bytes(quantized)
    else:
        tokens = None
        if settings.needs_calibration:
            tokenizer = convert.load_tokenizer(source, revision)
            tokens = pick_tokens(tokenizer, default_calibration_text() if text is None else text, calibration_tokens)
        with _progress("quantising") as report:
            before, after = convert.quantize_checkpoint(
                source, out, settings, tokens=tokens, revision=revision, overwrite=overwrite, restart=restart,
                progress=report,
            )  # fmt: skip
    console.print(f"{before:,} bytes of parameters became {after:,}; saved in {out}", highlight=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads standard input.")],
    model: Model = None,
    recipe: RecipeName = "best",
    keep_float: Float = False,
    revision: Revision = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Continue a text."""
    import fireq_jax

    sampling = fireq_jax.Sampling(temperature, top_k, top_p)
    network, params, _, tokenizer = _load(model, recipe, keep_float, revision)
    text = sys.stdin.read() if prompt == "-" else prompt
    _stream(network, params, tokenizer, tokenizer(text)["input_ids"], max_new_tokens, sampling, seed)


@app.command()
def chat(
    model: Model = None,
    recipe: RecipeName = "best",
    keep_float: Float = False,
    revision: Revision = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk with the model; an empty line or the end of input ends it."""
    import fireq_jax
    from fireq_jax.demo import chat_prompt

    sampling = fireq_jax.Sampling(temperature, top_k, top_p)
    network, params, _, tokenizer = _load(model, recipe, keep_float, revision)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            question = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        prompt = chat_prompt(tokenizer, messages)
        answer = _stream(network, params, tokenizer, prompt, max_new_tokens, sampling, seed + len(messages))
        messages.append({"role": "assistant", "content": answer})


def _stream(
    network: Any,
    params: dict[str, Any],
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Any,
    seed: int,
) -> str:
    """Prints tokens as they come and returns the whole text."""
    import jax

    import fireq_jax

    stream = fireq_jax.generate_stream(
        network, params, prompt, max_new_tokens=max_new_tokens, sampling=sampling, key=jax.random.key(seed)
    )
    tokens: list[int] = []
    shown = ""
    with _stage("compiling and reading the prompt"):
        step = next(stream, None)
    while step is not None:
        tokens.append(int(step[0]))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character of several tokens decodes to U+FFFD until the last of them is there.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        step = next(stream, None)
    print()
    return shown


@app.command()
def evaluate(
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to score.")],
    model: Model = None,
    recipe: RecipeName = "best",
    keep_float: Float = False,
    revision: Revision = None,
    window: Annotated[int, typer.Option(help="Tokens per window; each starts without context.")] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens between window starts. Default: the window.")] = None,
    through: Annotated[str, typer.Option(help="'cache' (as decoding sees it) or 'prefill'.")] = "cache",
    reference_model: Annotated[
        str | None, typer.Option("--reference", help="Float model to compare with, if --model holds a quantised one.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Perplexity of a text, and how far the quantised model is from the float one."""
    import convert
    import fireq_jax
    from convert.folder import write_json

    path: Literal["cache", "prefill"] = "prefill" if through == "prefill" else "cache"
    if through != path:
        raise ValueError(f"--through {through!r} must be 'cache' or 'prefill'")
    network, params, reference, tokenizer = _load(model, recipe, keep_float, revision)
    if reference_model is not None:
        if reference is not None:
            raise ValueError(f"--reference goes with a quantised --model; {_source(model)} is compared with itself")
        with _stage(f"loading {reference_model}"):
            original, reference = convert.load(reference_model)
        if fireq_jax.recipe_of(reference) is not None or original.config.vocab_size != network.config.vocab_size:
            raise ValueError(f"--reference {reference_model} is not the float model that {_source(model)} came from")
    tokens = tokenizer(text.read_text("utf-8"))["input_ids"]
    with _progress("scoring") as report:
        score = fireq_jax.evaluate(
            network, params, tokens, reference=None if params is reference else reference,
            window=window, stride=stride, through=path, progress=report,
        )  # fmt: skip
    table = Table(title=f"{score.scored_tokens} tokens in {score.windows} windows of {score.window}, "
                  f"stride {score.stride}; keys and values: {score.keys_values}")  # fmt: skip
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("perplexity per token", f"{score.perplexity:.4f}")
    if score.reference_perplexity is not None:
        table.add_row("perplexity of the float model", f"{score.reference_perplexity:.4f}")
        table.add_row("KL(float || quantised), nats per token", f"{score.kl:.4f}")
        table.add_row("top-1 agreement with float", f"{score.top1_agreement:.2%}")
    console.print(table)
    if json_file is not None:
        used = fireq_jax.recipe_of(params)
        identity = {
            "text": str(text),
            "recipe": used.name if used else None,
            "checkpoint_id": convert.checkpoint_id(_source(model), revision),
        }
        write_json(json_file, score.to_dict() | identity)


@app.command()
def bench(
    sizes: Annotated[
        str, typer.Option(help="llama-2-7b, llama-2-13b, llama-3-8b, llama-3.2-1b, llama-3.2-3b or toy.")
    ] = "llama-3-8b",
    recipe: Annotated[str, typer.Option(help="Preset that needs no calibration.")] = "rtn",
    lm_head: LmHead = "float",
    feed_forward: Annotated[str, typer.Option(help="Numbers of tokens, such as 1,16,1024.")] = "1,4,16,16384",
    prefill: Annotated[
        str, typer.Option(help="Batch sizes and prompt lengths, such as 1x2048,16x1024.")
    ] = "16x1024,16x2048,16x4096,1x2048",
    decode: Annotated[str, typer.Option(help="Batch sizes and context lengths.")] = "1x1024,16x1024,64x1024",
    generate: Annotated[
        str, typer.Option(help="Batch sizes and prompt lengths, to be continued in one call with sampling.")
    ] = "1x1024,16x1024",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per sequence when decoding.")] = 64,
    operators: Annotated[str, typer.Option(help="Cases profiled kernel by kernel: first, all or none.")] = "first",
    fp8: Annotated[bool, typer.Option(help="Also time the block in fp8 by XLA.")] = False,
    torch: Annotated[bool, typer.Option(help="Also time transformers' Llama in torch, if it is installed.")] = False,
    commit: Annotated[str | None, typer.Option(help="Recorded beside the results.")] = None,
    smoke: Annotated[bool, typer.Option(help="A toy on any device, to see the command work.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Time a Llama with random weights, quantised and in bf16, on this machine."""
    from convert.folder import write_json
    from fireq_jax.benchmark import run_benchmark
    from fireq_jax.benchmark_table import benchmark_table

    if smoke:
        sizes, feed_forward, prefill, decode, new_tokens = "toy", "1,8", "1x32,2x16", "1x16,2x16", 32
        generate = "2x16"
    if operators not in ("first", "all", "none"):
        raise ValueError(f"--operators {operators!r} must be first, all or none")
    tokens = [count for (count,) in _numbers("--feed-forward", feed_forward, 1)]
    prompts, contexts = _numbers("--prefill", prefill, 2), _numbers("--decode", decode, 2)
    continued = _numbers("--generate", generate, 2)
    command = f"fireq-jax bench --sizes {sizes} --recipe {recipe} --lm-head {lm_head}"
    command += f" --feed-forward {feed_forward} --prefill {prefill}"
    command += f" --decode {decode} --generate {generate} --new-tokens {new_tokens} --operators {operators}"
    command += f"{' --fp8' * fp8}{' --torch' * torch}"

    def save(result: dict[str, Any]) -> None:
        """A run that is cut off leaves what it has."""
        if json_file is not None:
            write_json(json_file, result | {"command": command, "commit": commit})

    with notes.status("starting ...") as status:
        result = run_benchmark(
            sizes, recipe=recipe, lm_head=cast(Any, lm_head), feed_forward=tokens, prefill=prompts, decode=contexts,
            generate=continued, new_tokens=new_tokens, operators=cast(Any, operators), fp8=fp8, with_torch=torch,
            save=save,
            progress=lambda what: status.update(f"{what} ..."),
        )  # fmt: skip
    console.print(benchmark_table(result))
    save(result)


def _numbers(option: str, text: str, count: int) -> list[Any]:
    """``1x2,3x4`` as tuples of ``count`` positive numbers."""
    try:
        groups = [tuple(int(number) for number in group.split("x")) for group in text.split(",") if group]
    except ValueError:
        groups = [()]
    if any(len(group) != count or min(group) < 1 for group in groups):
        example = "x".join(["16", "1024"][:count])
        raise ValueError(f"{option} {text!r}: positive numbers like {example} are expected, with commas between them")
    return groups


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A quantised checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    activations: Annotated[
        str | None, typer.Option(help="'fp8' (W4A8) or 'none' (W4A16). Default: what the checkpoint was made for.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint for vLLM and transformers, in the compressed-tensors format."""
    import convert

    chosen: Literal["fp8", "none"] | None = None
    if activations is not None:
        chosen = "none" if activations == "none" else "fp8"
        if activations != chosen:
            raise ValueError(f"--activations {activations!r} must be 'fp8' or 'none'")
    with _stage(f"writing {out}"):
        network, params = convert.load(folder)
        tokenizer = convert.load_tokenizer(folder)
        convert.export_compressed_tensors(
            out, network, params, activations=chosen, tokenizer=tokenizer, overwrite=overwrite
        )
    console.print(f"saved in {out}", highlight=False)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A quantised checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, org/name; made if it does not exist.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="What `evaluate --json` wrote for this checkpoint, for the model card.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the float model.")] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="Licence as the hub spells it.")] = None,
    private: Annotated[bool, typer.Option(help="Make the repository private if it is made.")] = False,
    revision: Revision = None,
) -> None:
    """Write a model card and upload a checkpoint to the Hugging Face hub."""
    import convert
    from convert.source import read_json

    evaluations = {}
    for path in evaluation or []:
        score = read_json(path)
        evaluations[Path(score.get("text", path.name)).name] = score
    convert.write_model_card(folder, repo_id, evaluations=evaluations, base_model=base_model, license=license_name)
    with _stage(f"uploading {folder}"):
        address = convert.push_to_hub(folder, repo_id, private=private or None, revision=revision)
    console.print(address, highlight=False)


def main() -> None:
    """Entry point: what a user can mend is one line, not a traceback."""
    # transformers says at every start that torch is not there; nothing here needs it.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, OSError, NotImplementedError, ModuleNotFoundError) as error:
        notes.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2)
