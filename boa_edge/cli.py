"""The `boa-edge` command: each stage by its name, and `run` for all of them.

Progress and tables go to stderr; the last line of stdout is one compact JSON document. Exit codes: 0 done, 1 the work
failed, 2 the request is wrong, 3 a comparison found a regression, 128 + N ended by signal N.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from boa_edge import __version__, device_commands
from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.output import finish as _finish
from boa_edge.quiet import quiet_libraries, quiet_transformers
from boa_edge.ranks import launched_rank
from boa_edge.signals import Signalled, as_interrupts
from boa_edge.visible import one_line

_METHODS = "rtn, gptq, boa, turboboa, aespa, edge"  # written out: `--help` imports no stage; a test compares


class _InterruptedError(BoaEdgeError):
    """Ctrl-C, which typer would end the program at without a word, or a signal that is taken as such."""

    def __init__(self, interrupt: KeyboardInterrupt, *, fix: str | None = None) -> None:
        self.exit_code = interrupt.exit_code if isinstance(interrupt, Signalled) else 130
        super().__init__(f"interrupted by {interrupt}" if isinstance(interrupt, Signalled) else "interrupted", fix=fix)


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            kept = "Finished blocks are kept, and the same command goes on from there"
            raise _InterruptedError(interrupt, fix=kept if ctx.invoked_subcommand in _RESUMED else None) from None


app = typer.Typer(
    name="boa-edge",
    cls=_Commands,
    help="Quantize a language model with BoA, lower it bit for bit to a phone runtime, measure what was deployed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="`default`, a Hugging Face directory, a hub id, or a .gguf file."),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="A YAML file, or a name: w<bits>[g<group>][asym][a8[t|r|s|u]][kv8[t]]-<method>[-<transform>...]; "
        "wmix<MB>mb fits a budget.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration", help="A text file, a data set (wikitext2, c4, c4-new), or `self`: text the model writes."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output directory that boa-edge has made before.")
]
CompareOption = Annotated[
    str,
    typer.Option("--compare", help=f"Other methods to run beside it for the report ({_METHODS}), or none."),
]
StreamOption = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Leave the blocks on disk until they are worked on (large models do)."),
]
SpillOption = Annotated[
    Path | None, typer.Option("--spill", help="A directory for activations; without it they stay in memory.")
]
AcceleratorOption = Annotated[
    str | None,
    typer.Option("--accelerator", help="Where blocks are worked on: cpu (default), cuda, cuda:1, xpu."),
]
RuntimeOption = Annotated[str, typer.Option("--runtime", help="The runtime to lower to: onnx or executorch.")]
Activations = Literal["int8", "float32"]
ActivationsOption = Annotated[
    Activations | None,
    typer.Option("--activations", help="How the runtime computes with activations: int8 (default, fast) or float32."),
]
FormOption = Annotated[
    str | None,
    typer.Option(
        "--form", help="onnx: qdq (default, standard operators), fused (ONNX Runtime's own) or fused-int8 (no groups)."
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", help="executorch: tokens that the cache holds (default 2048, or the model's if fewer)."),
]
PrefillOption = Annotated[
    int | None, typer.Option("--prefill", help="executorch: tokens of one call at most (default 128).")
]
DeviceOption = Annotated[str, typer.Option("--device", help="A device's name (`boa-edge devices`) or profile file.")]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="The directory to write.")]


_REGRESSION = 3
_RESUMED = ("quantize", "run")


app.add_typer(device_commands.app, name="devices")


@app.command()
def quantize(
    model: ModelArgument,
    output: OutputOption,
    recipe: RecipeOption = "w4g32a8-edge-smooth",
    calibration: CalibrationOption = None,
    compare: CompareOption = "none",
    overwrite: OverwriteOption = False,
    stream: StreamOption = None,
    spill: SpillOption = None,
    accelerator: AcceleratorOption = None,
) -> None:
    """Model in, quantized checkpoint out."""
    from toolchain.quantize import quantize as stage

    quiet_transformers()
    result = stage(
        model,
        output,
        recipe=recipe,
        calibration=calibration,
        compare=_names(compare),
        overwrite=overwrite,
        stream=stream,
        spill=spill,
        accelerator=accelerator,
    )
    _finish(result.as_dict())


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A quantized checkpoint directory.")],
    output: OutputOption,
    runtime: RuntimeOption = "onnx",
    activations: ActivationsOption = None,
    form: FormOption = None,
    context: ContextOption = None,
    prefill: PrefillOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Quantized checkpoint in, a bundle that the runtime loads out."""
    from exporters import export as stage

    quiet_transformers()
    result = stage(
        checkpoint,
        runtime,
        output,
        activations=activations,
        form=form,
        context_length=context,
        prefill_length=prefill,
        overwrite=overwrite,
    )
    _finish(result.as_dict())


@app.command()
def measure(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="A bundle directory; several of one model side by side.")
    ],
    output: OutputOption,
    device: DeviceOption = "arm64",
    threads: Annotated[
        str, typer.Option(help="Threads of the runtime; speeds also with each further number, such as 1,2,4.")
    ] = "1",
    cores: Annotated[str | None, typer.Option(help="CPU cores to run on, such as 4,5,6,7 (default: any).")] = None,
    workload: Annotated[
        str | None, typer.Option(help="What is timed: pp<prompt>/tg<generated> tokens; pp128/tg64 on real devices.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Runs that are not counted.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Counted runs.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to compare with PyTorch's (32).")] = None,
    score_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to score for the accuracy figures.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also time every operator, once.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Run a bundle on a device: report.json, report.html and report.md."""
    from runtime_tests import Wishes, measure_together, print_summary

    quiet_transformers()
    pinned = () if cores is None else _counts(cores, "--cores")
    wishes = Wishes(_counts(threads, "--threads"), warmup, repeats, new_tokens, score_tokens, workload, pinned)
    reports = measure_together(bundles, device, output, wishes, profile=profile, overwrite=overwrite)
    for report in reports:
        print_summary(report)
    _finish(reports[0].summary())


@app.command()
def evaluate(
    subject: Annotated[str, typer.Argument(metavar="MODEL|CKPT|BUNDLE", help="Any stage's output.")],
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file that calibrated nobody.")],
    reference: Annotated[str | None, typer.Option("--reference", help="A model to measure the KL against.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to read at most.")] = 24576,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
) -> None:
    """Perplexity, mean KL to the reference, top-1 agreement."""
    from runtime_tests.evaluate import evaluate as stage

    quiet_transformers()
    _finish(stage(subject, text, reference=reference, tokens=tokens, sequence_length=seq_len).as_dict())


@app.command("lm-eval")
def lm_eval(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Names of lm-eval's tasks, such as arc_easy,piqa.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at most.")] = None,
    shots: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question.")] = None,
    include: Annotated[
        Path | None, typer.Option("--include", help="A directory with tasks of your own (YAML).")
    ] = None,
) -> None:
    """Tasks of lm-eval, answered by the bundle's program on this machine (needs the package lm-eval)."""
    from runtime_tests.tasks import evaluate_tasks

    quiet_transformers()
    _finish(evaluate_tasks(bundle, _names(tasks), limit=limit, shots=shots, include=include).as_dict())


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="The earlier report: a directory or its report.json.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The later report.")],
    fail_on: Annotated[
        str, typer.Option("--fail-on", help="Regressions, such as 'decode_tok_s<-5%,kl>+10%': exit code 3.")
    ] = "",
) -> None:
    """Two reports side by side, with the noise of both."""
    from runtime_tests.comparison import compare as stage
    from runtime_tests.comparison import print_comparison

    found = stage(before, after, fail_on=fail_on)
    print_comparison(found)
    _finish(found.as_dict())
    if found.failed:
        raise typer.Exit(_REGRESSION)


@app.command()
def report(
    history: Annotated[Path, typer.Option("--history", help="A directory; every report.json below it is drawn.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("history.html"),
) -> None:
    """The figures of many reports over time, as one page."""
    from runtime_tests.history import history as stage

    _finish({"page": str(output), **stage(history, output).as_dict()})


bundle_app = typer.Typer(help="Check a bundle, or sign it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bundle_app, name="bundle")
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory.")]


@bundle_app.command("verify")
def bundle_verify(
    bundle: BundleArgument,
    key: Annotated[
        Path | None, typer.Option("--key", help="The signer's Ed25519 public key (PEM): the signature must be there.")
    ] = None,
) -> None:
    """Every file against the manifest, and the signature where there is one."""
    from exporters.signing import verify as stage

    _finish(stage(bundle, key).as_dict())


@bundle_app.command("sign")
def bundle_sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option("--key", help="An Ed25519 private key (PEM, PKCS #8, not encrypted).")],
) -> None:
    """Sign the manifest, and with it every file it lists."""
    from exporters.signing import sign as stage

    _finish(stage(bundle, key).as_dict())


@app.command()
def run(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", "--out", help="Default: out/<model>-<recipe>.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="As for `quantize`.")] = "default",
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="As for `quantize`. Default: activations as the runtime has them."),
    ] = None,
    runtime: Annotated[str, typer.Option("--runtime", help="As for `export`, or all: one report on both.")] = "onnx",
    device: DeviceOption = "arm64",
    calibration: CalibrationOption = None,
    compare: CompareOption = "rtn,gptq",
    activations: ActivationsOption = None,
    form: FormOption = None,
    context: ContextOption = None,
    prefill: PrefillOption = None,
    accelerator: AcceleratorOption = None,
) -> None:
    """All stages: OUTPUT/checkpoint, OUTPUT/bundle, OUTPUT/report. Finished stages of the same request are kept."""
    from boa_edge.pipeline import default_recipe, run_all

    quiet_transformers()
    recipe = recipe or default_recipe(runtime)
    _finish(
        run_all(
            output or Path("out") / f"{Path(model).name.removesuffix('.gguf')}-{Path(recipe).stem}",
            model=model,
            recipe=recipe,
            runtime=runtime,
            device=device,
            calibration=calibration,
            compare=_names(compare),
            activations=activations,
            form=form,
            context_length=context,
            prefill_length=prefill,
            accelerator=accelerator,
        )
    )


def _names(value: str) -> tuple[str, ...]:
    parts = () if value == "none" else (part.strip() for part in value.split(","))
    return tuple(dict.fromkeys(filter(None, parts)))


def _counts(value: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise UsageError(f"{value!r} is no number, nor several", where=flag, fix="Write them like 1 or 1,2,4") from None


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    _state["debug"] = debug


def _refuse_empty(arguments: list[str]) -> None:
    """Nothing asks for an empty argument; as a path, a model or a condition it would say something nobody meant."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = argument.removesuffix("=") if argument.startswith("--") and argument.endswith("=") else before
        if not argument.strip() or option != before:
            where = option if option.startswith("-") else None
            raise UsageError("an argument is empty", where=where, fix="Is a variable not set? Give a value")


_state = {"debug": False}
_LONGEST = 4000


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    quiet_libraries()
    try:
        # Said once and in words where torchrun's variables are wrong. It ends its processes itself, at once.
        with as_interrupts() if launched_rank() is None else nullcontext():
            _refuse_empty(sys.argv[1:])
            app()
    except BoaEdgeError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt as interrupt:
        early = _InterruptedError(interrupt)
        _fail(str(early), early.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except MemoryError:
        _fail("out of memory. Use a smaller model, or fewer or shorter calibration sequences", 1)
    except Exception as error:  # noqa: BLE001 (nobody should have to read a traceback; --debug shows it)
        reason = " ".join(str(error).split())[:300]
        _fail(f"a defect of boa-edge: {type(error).__name__}: {reason}. Run `boa-edge --debug ...` and report it", 1)


def _fail(message: str, code: int) -> None:
    if _state["debug"]:
        traceback.print_exc()
    if _is_alone() or _is_first_to_fail():
        # In one write, as `say`; to a terminal that is gone, nobody reads it.
        with suppress(OSError):
            print(f"error: {one_line(message, _LONGEST)}\n", end="", file=sys.stderr, flush=True)
    sys.exit(code)


def _is_alone() -> bool:
    try:
        return launched_rank() is None
    except UsageError:
        return True


def _is_first_to_fail() -> bool:
    from toolchain.distributed import first_to_fail

    return first_to_fail()


if __name__ == "__main__":
    main()
