"""The command line, `lora-speech`: results on standard output, progress and messages on error.

Anything wrong with what was given ends in one message on standard error and exit status 2.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from lora_speech.bench.settings import BenchSettings
from lora_speech.cli.export import export
from lora_speech.cli.finetune import finetune
from lora_speech.cli.options import (
    Base,
    BatchSize,
    BeamSize,
    Device,
    Format,
    Int8,
    Language,
    LengthPenalty,
    Normalizer,
    Suite,
    choose_adapters,
    named_folders,
)
from lora_speech.errors import SpeechError

app = typer.Typer(
    name="lora-speech",
    help="Adapt speech recognition to a voice, accent or domain with LoRA, and transcribe with "
    "many adapters on one INT8 base. Start with: lora-speech demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command()(finetune)


@app.command()
def evaluate(
    data: Annotated[
        str, typer.Option(help="Recordings with transcripts: JSONL, saved data set or hub name.")
    ],
    base: Base = "shipped",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter folder, or NAME=FOLDER, repeatable. One adapter is used for every "
            "recording; of several, each recording uses the one its manifest line names.",
            metavar="[NAME=]FOLDER",
        ),
    ] = None,
    int8: Int8 = False,
    device: Device = "auto",
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write the totals (wer, cer, ...) and the settings here."),
    ] = None,
    utterances: Annotated[
        Path | None, typer.Option(help="Write every utterance with its errors here, as JSONL.")
    ] = None,
    normalizer: Annotated[
        Normalizer,
        typer.Option(
            help="How texts are evened out before counting. auto: Whisper's rules, digit strings "
            "counted digit by digit; whisper: exactly Whisper's; basic: case and punctuation; "
            "none: as they are."
        ),
    ] = Normalizer.auto,
    language: Language = None,
    beam_size: BeamSize = 1,
    length_penalty: LengthPenalty = None,
    batch_size: BatchSize = 8,
) -> None:
    """Measure word and character error rates.

    Example: lora-speech evaluate --adapter adapters/me --data test.jsonl --json result.json
    """
    from lora_speech.data.manifest import load_utterances
    from lora_speech.devices import choose_device
    from lora_speech.evaluation import evaluate as run
    from lora_speech.evaluation import write_evaluation
    from lora_speech.models.loading import load_for_serving
    from lora_speech.progress import counter, progress_bars
    from lora_speech.transcription import checked_length_penalty

    checked_length_penalty(beam_size, length_penalty)  # before the model takes its time to load
    where = choose_device(device)
    folders = named_folders(adapter)
    listed = load_utterances(data)
    model = load_for_serving(base, folders, int8=int8, device=where)
    only = next(iter(folders)) if len(folders) == 1 else None
    with progress_bars() as bars:
        result = run(
            model,
            listed,
            adapter=only,
            language=language,
            normalization=normalizer.value,
            beam_size=beam_size,
            length_penalty=length_penalty,
            batch_size=batch_size,
            progress=counter(bars, "evaluate", len(listed)),
        )
    if json_path is not None:
        write_evaluation(result, json_path, utterances)
    elif utterances is not None:
        from lora_speech.files import write_jsonl

        write_jsonl(utterances, (vars(item) for item in result.utterances))
    rates = result.rates
    typer.echo(f"WER {rates.wer:.2%}   CER {rates.cer:.2%}   ({rates.words} words)")
    typer.echo(f"raw WER {rates.wer_raw:.2%}   raw CER {rates.cer_raw:.2%}")


@app.command()
def transcribe(
    files: Annotated[
        list[Path], typer.Argument(help="Audio files: wav, flac, ogg or mp3.", metavar="FILE...")
    ],
    base: Base = "shipped",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Load an adapter under a name; repeatable.", metavar="NAME=FOLDER"),
    ] = None,
    use: Annotated[
        list[str] | None,
        typer.Option(
            help="Which adapter: once for all files, or once per file in their order; 'base' means "
            "none. Not needed with a single adapter.",
            metavar="NAME",
        ),
    ] = None,
    int8: Int8 = False,
    device: Device = "auto",
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.text,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Write one file per recording here instead of printing."),
    ] = None,
    language: Language = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate (into English).")] = (
        "transcribe"
    ),
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Let the model write times within a window.")
    ] = False,
    beam_size: BeamSize = 1,
    length_penalty: LengthPenalty = None,
    batch_size: BatchSize = 8,
) -> None:
    """Turn recordings into text or subtitles.

    Example: lora-speech transcribe --adapter me=adapters/me --int8 talk.mp3 --format srt
    """
    from lora_speech.data.audio import check_audio_file
    from lora_speech.devices import choose_device
    from lora_speech.formats import render
    from lora_speech.models.loading import load_for_serving
    from lora_speech.transcription import checked_length_penalty, transcribe_many

    checked_length_penalty(beam_size, length_penalty)
    where = choose_device(device)
    folders = named_folders(adapter)
    chosen = choose_adapters(list(folders), use or [], len(files))
    for file in files:  # before the model takes its time to load
        check_audio_file(file)
    stems = [file.stem for file in files]
    if output_dir is not None and (twice := {stem for stem in stems if stems.count(stem) > 1}):
        raise SpeechError(
            f"--output-dir: expected files of different names, got {', '.join(sorted(twice))} "
            "more than once, and one result would overwrite the other; transcribe them in turns"
        )
    model = load_for_serving(base, folders, int8=int8, device=where)
    results = transcribe_many(
        model,
        list(files),
        adapters=chosen,
        language=language,
        task=task,
        timestamps=timestamps,
        beam_size=beam_size,
        length_penalty=length_penalty,
        batch_size=batch_size,
    )
    texts = [render(segments, info, format.value) for segments, info in results]
    if output_dir is not None:
        from lora_speech.files import write_text

        suffix = "txt" if format is Format.text else format.value
        for file, text in zip(files, texts, strict=True):
            typer.echo(write_text(output_dir / f"{file.stem}.{suffix}", text))
        return
    if format is Format.json and len(texts) > 1:
        typer.echo("[\n" + ",\n".join(text.rstrip() for text in texts) + "\n]")
        return
    for file, text in zip(files, texts, strict=True):
        if len(texts) > 1:
            typer.echo(f"{file}" + (": " if format is Format.text else "\n"), nl=False)
        typer.echo(text, nl=False)


@app.command()
def demo(
    base: Base = "shipped",
    output: Annotated[
        Path, typer.Option(help="Folder for demo_report.json and demo_report.html.")
    ] = Path(),
    seed: Annotated[int, typer.Option(help="Seed of voices, sentences and training.")] = 0,
) -> None:
    """Watch a model learn an accent, become INT8 and mix adapters, in a few minutes."""
    from lora_speech.demo.run import DemoSettings, run_demo
    from lora_speech.demo.terminal import TerminalProgress, print_table
    from lora_speech.progress import progress_bars

    with progress_bars() as bars:
        report = run_demo(base, output, DemoSettings(seed=seed), TerminalProgress(bars))
    print_table(report)
    typer.echo(f"report: {output / 'demo_report.html'} and {output / 'demo_report.json'}")


@app.command()
def bench(
    suite: Annotated[Suite, typer.Option(help="What is measured.")] = Suite.cpu,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures here, and plots beside it as .html."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Some of tiny, base, small (released shapes, random weights), shipped, and "
            "folders of Whispers; by default the four.",
            metavar="NAME,...",
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(help="Numbers of threads; by default 1 and 2.", metavar="N,..."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Time for one comparison; each contestant gets 3 turns at least.")
    ] = BenchSettings.seconds,
    only: Annotated[
        str | None,
        typer.Option(
            help="Some of decode, batch, beam, encoder, linear, train.", metavar="SECTION,..."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="4 tokens and 3 turns: does it run, not how fast.")
    ] = False,
) -> None:
    """Measure this machine: ours beside transformers, CTranslate2, OpenVINO and torch's INT8.

    Example: lora-speech bench --models tiny,base --json bench.json
    """
    from lora_speech.bench.plots import plots_path, render_plots
    from lora_speech.bench.record import TerminalProgress
    from lora_speech.bench.suite import run_bench
    from lora_speech.bench.tables import print_tables
    from lora_speech.files import write_text
    from lora_speech.progress import progress_bars

    settings = BenchSettings.parse(models, threads, seconds, only, quick)
    page = None if json_path is None else plots_path(json_path)
    with progress_bars() as bars:
        data = run_bench(settings, json_path, TerminalProgress(bars))
    print_tables(data)
    if page is not None:
        write_text(page, render_plots(data))
        typer.echo(f"figures: {json_path}, plots: {page}")


app.command()(export)


@app.command()
def doctor() -> None:
    """Show what is installed, which kernels this machine runs, and why."""
    from lora_speech.cli.doctor import report

    typer.echo(report())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the entry point `lora-speech`."""
    # Bars of libraries underneath would run into ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    try:
        app(args=arguments, standalone_mode=True)
    except (ValueError, ImportError) as error:
        if not isinstance(error, _expected_errors()):
            raise
        typer.echo(f"lora-speech: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("lora-speech: interrupted (finetune continues with --resume)", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (e.g. `| head`): nothing more to say, and nobody to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose text is meant for the user, as far as their modules are loaded at all."""
    kernels = sys.modules.get("lora_kernels.errors")
    return (SpeechError, kernels.LoraKernelsError) if kernels else (SpeechError,)


if __name__ == "__main__":
    main()
