"""The report: what `report.json` holds. The published schema is made from these classes (`runtime_tests.schema`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from devices.contract import Execution
from runtime_tests.figure import MOST, Figure, Frozen

Count = Annotated[int, Field(ge=0, le=MOST)]
TokenId = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Place = Literal["attention", "o", "mlp", "down", "head"]


class Tool(Frozen):
    """What made the report, and where."""

    name: Literal["boa-edge"] = "boa-edge"
    version: str
    python: str
    platform: str


class BundleFile(Frozen):
    """A file of the bundle, as its manifest has it."""

    path: str
    bytes: Count
    sha256: Sha256
    role: Literal["runtime", "reference"]


class Placement(Frozen):
    """Operators of the program inside and outside of a backend's delegates: name -> how often they stand there.

    Attributes:
        float_linears: modules whose codes stand dequantized.
    """

    backend: str
    delegates: Count
    delegated: dict[str, Count]
    outside: dict[str, Count]
    float_linears: tuple[str, ...]


class Kernels(Frozen):
    """What ONNX Runtime ran when the bundle was made, on the machine that made it.

    Attributes:
        kernels: operator -> how many nodes of it.
        float_products: names of the nodes that multiply float32 matrices.
    """

    kernels: dict[str, Count]
    float_products: tuple[str, ...]


class Deployed(Frozen):
    """What was put on the device.

    Attributes:
        model: the source model's name, absent where it was not recorded.
        recipe_name: e.g. `w4g32-boa`.
        recipe: the effective recipe, every field.
        runtime: e.g. `onnx`.
        activations: what the bundle asks the runtime to compute with.
        runtime_size: all files that a device needs.
        model_size: the graph and its weights.
        original_size: the parameters of the unquantized model, where it was recorded.
        placement: what runs in delegates, of runtimes that have them.
        kernels: what ran, of runtimes without, where the export tried it.
    """

    bundle: str
    model: str | None = None
    recipe_name: str | None = None
    recipe: dict[str, Any] | None = None
    created_by: dict[str, str]
    runtime: str
    activations: str
    runtime_config: dict[str, Any]
    runtime_size: Figure
    model_size: Figure
    original_size: Figure | None = None
    placement: Placement | None = None
    kernels: Kernels | None = None
    files: tuple[BundleFile, ...]


class DeviceFacts(Frozen):
    """Where it ran: what the device says of itself, and exactly which programs ran.

    Attributes:
        runtime: the runtime and its version, as the runner named them.
        attention: whose attention kernels ran, and for which instruction set, where they are not the runtime's own.
        state: temperatures, clocks and battery `before` the first run and `after` the last, where there are probes.
    """

    name: str
    execution: Execution
    runtime: str | None = None
    attention: str | None = None
    fingerprint: dict[str, Any]
    state: dict[str, dict[str, Any]] | None = None
    programs: dict[str, str]
    commands: tuple[tuple[str, ...], ...]


class Settings(Frozen):
    """The effective settings.

    Attributes:
        workload: what is timed, e.g. `pp128/tg64`: 128 prompt tokens, 64 generated.
        threads: of the runtime, for everything but the sweep.
        sweep: further numbers of threads that the workload was timed with.
        cores: numbers of the CPU cores that everything ran on; empty for any.
        prompt_tokens, new_tokens: of the workload.
        greedy_tokens: of the continuation that is compared with PyTorch's; absent where it was the workload.
    """

    workload: str
    threads: Annotated[int, Field(ge=1)]
    sweep: tuple[Annotated[int, Field(ge=1)], ...] = ()
    cores: tuple[Count, ...] = ()
    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=1)]
    greedy_tokens: Annotated[int, Field(ge=1)] | None = None
    score_tokens: Annotated[int, Field(ge=2)]

    @property
    def greedy(self) -> int:
        """Tokens of the continuation that is compared with PyTorch's."""
        return self.new_tokens if self.greedy_tokens is None else self.greedy_tokens


class Scores(Frozen):
    """One model on the reference text. `quantized` is the PyTorch model with the bundle's weights."""

    perplexity: Figure
    kl_from_original: Figure | None = None
    kl_from_quantized: Figure | None = None
    top1_with_original: Figure | None = None
    top1_with_quantized: Figure | None = None
    max_logit_error_from_quantized: Figure | None = None


class Fidelity(Frozen):
    """The three models on the same tokens, teacher-forced.

    Attributes:
        kl_by_position: of the deployed one from the original, in nats: what a comparison of two reports takes the noise
            of their means from.
    """

    positions: Count
    kl_by_position: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    original: Scores
    quantized: Scores
    deployed: Scores


class Continuation(Frozen):
    """What one model made of the prompt."""

    tokens: tuple[TokenId, ...]
    text: str | None = None


class GreedyMatch(Frozen):
    """Two greedy continuations, token by token.

    Attributes:
        compared: tokens that both have.
        matching: of them, equal at the same place.
        first_divergence: the place (from 0) of the first difference, absent where there is none.
    """

    compared: Count
    matching: Count
    first_divergence: Count | None = None


class GreedyGeneration(Frozen):
    """Greedy continuations of one prompt.

    Attributes:
        repeatable: every run on the device gave the same tokens; None for a single run.
        divergence_margin: at the first divergence from the quantized model, by how much the device's logit of its own
            token exceeds that of the token it should have chosen.
    """

    prompt: Continuation
    original: Continuation
    quantized: Continuation
    deployed: Continuation
    against_original: GreedyMatch
    against_quantized: GreedyMatch
    repeatable: bool | None = None
    divergence_margin: Figure | None = None


class Speed(Frozen):
    """Times and speeds, warm-ups left out. Percentiles are nearest-rank; the tokens after the first count.

    Attributes:
        load_time: cold: of processes that had nothing loaded before (the files may be in the system's cache).
        first_inference: time to the first token of the first run of a process, a warm-up where there are some.
    """

    load_time: Figure
    first_inference: Figure | None = None
    time_to_first_token: Figure
    prefill_speed: Figure
    decode_speed: Figure
    token_time_p50: Figure
    token_time_p90: Figure | None = None
    token_time_p95: Figure
    token_time_p99: Figure | None = None


class ThreadRow(Frozen):
    """The workload with another number of threads."""

    threads: Annotated[int, Field(ge=1)]
    time_to_first_token: Figure
    prefill_speed: Figure
    decode_speed: Figure
    peak_rss: Figure


class Memory(Frozen):
    """Of the process that generated, read when everything timed was over.

    Attributes:
        pss: resident memory, what is shared with others counted in parts.
        pss_file: of it, pages of files: mapped weights, libraries. The system can drop and read them again.
        pss_anon: of it, what the process wrote: unpacked weights, cache, buffers.
    """

    peak_rss: Figure
    rss: Figure
    pss: Figure | None = None
    pss_file: Figure | None = None
    pss_anon: Figure | None = None


class Cost(Frozen):
    """What does not depend on how busy the machine was: medians over the counted runs and their tokens.

    Attributes:
        prompt_tokens, new_tokens: of the generation in which they were counted: the workload, or the greedy
            continuation where that alone was counted, as in reports without these two.
        instructions_prompt: from the load, or the run before, to the first token.
        instructions_per_token: of each token after the first.
    """

    prompt_tokens: Count | None = None
    new_tokens: Count | None = None
    instructions_prompt: Figure
    instructions_per_token: Figure


class Energy(Frozen):
    """By the battery's own gauge.

    Attributes:
        power: mean, while the workload ran.
        per_token: that power for the mean time of a generated token.
        reason: why neither was measured.
    """

    power: Figure | None = None
    per_token: Figure | None = None
    reason: str | None = None


class RunSamples(Frozen):
    """One generation run: nanoseconds of the prompt with the first token, and of each token after it."""

    run: Count
    warmup: bool
    prefill_ns: Count
    token_ns: tuple[Count, ...]
    tokens: tuple[TokenId, ...]


class Samples(Frozen):
    """The raw samples behind every time, all in nanoseconds, warm-ups among them."""

    unit: Literal["ns"] = "ns"
    execution: Execution
    load_ns: tuple[Count, ...]
    score_ns: Count | None = None
    runs: tuple[RunSamples, ...]


class SourceFacts(Frozen):
    """The unquantized model's files, with their SHA-256."""

    model: str | None = None
    files: dict[str, Sha256]


class TextFacts(Frozen):
    """A text that was used: its name, and how much of it."""

    source: str | None = None
    tokens: Count | None = None
    sequences: Count | None = None
    sequence_length: Count | None = None
    seed: int | None = None
    sha256: Sha256 | None = None


class LayerError(Frozen):
    """One quantized linear layer, by its name in the model."""

    name: str
    method: str | None = None
    bits: Count | None = None
    group_size: Count | None = None
    loss: Figure | None = None
    relative_loss: Figure | None = None
    seconds: Figure | None = None


class MethodRow(Frozen):
    """One method of quantization, evaluated in PyTorch on the evaluation text."""

    method: str
    recipe: str | None = None
    perplexity: Figure | None = None
    kl: Figure | None = None
    top1: Figure | None = None
    payload_size: Figure | None = None
    seconds: Figure | None = None
    peak_memory: Figure | None = None


class TransformFacts(Frozen):
    """What was done to the model before it was quantized, in order; the notes say what was left out and why."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


class LinearCost(Frozen):
    """By how much the int8 activations of one linear alone change what the quantized model says."""

    name: str
    kl: Figure | None = None


class ActivationFacts(Frozen):
    """Quantized activations, evaluated in PyTorch on held-out text as KL from the original.

    Attributes:
        scheme: how they are quantized, a name of `toolchain.activations`; absent where the recipe does not say.
        weights_kl: of the quantized weights alone.
        all_int8_kl: with int8 activations at every quantized linear.
        kl: with int8 activations but for the linears in `kept`.
        kept: linears whose inputs stay in floating point.
        costs: of each linear's int8 activations alone, as KL from the model with quantized weights, the largest first;
            empty where int8 everywhere was within the recipe's budget.
    """

    scheme: str | None = None
    weights_kl: Figure | None = None
    all_int8_kl: Figure | None = None
    kl: Figure | None = None
    kept: tuple[str, ...]
    costs: tuple[LinearCost, ...]


class Outlier(Frozen):
    """What the linears at one place of a decoder block take in, on calibration text.

    Attributes:
        layer: the decoder block; -1 for the head, which comes after all.
        place: what reads it: q, k and v (`attention`), `o`, gate and up (`mlp`), `down`, or the head.
        maximum: largest magnitude.
        typical: root of the mean square.
        kurtosis: E[(x - m)^4] / var^2; 3 for a normal distribution.
    """

    layer: Annotated[int, Field(ge=-1)]
    place: Place
    maximum: Annotated[float, Field(ge=0)] | None = None
    typical: Annotated[float, Field(ge=0)] | None = None
    kurtosis: Annotated[float, Field(ge=0)] | None = None


class OutlierFacts(Frozen):
    """Inputs of the linears, in the original model and in the one that was quantized."""

    execution: Execution
    before: tuple[Outlier, ...]
    after: tuple[Outlier, ...]


class Quantization(Frozen):
    """How the weights came to be. Whatever is absent was not recorded."""

    method: str | None = None
    seed: int | None = None
    seconds: Figure | None = None
    peak_memory: Figure | None = None
    versions: dict[str, str]
    source: SourceFacts
    calibration: TextFacts
    evaluation: TextFacts
    evaluation_overlaps_calibration: bool | None = None
    comparison: tuple[MethodRow, ...]
    layers: tuple[LayerError, ...]
    transforms: TransformFacts | None = None
    activations: ActivationFacts | None = None
    outliers: OutlierFacts | None = None


class OperatorTime(Frozen):
    """All calls of one operator. `delegated`: the runtime's backend ran it."""

    name: str
    delegated: bool
    calls: Count
    ns: Count


class OperatorProfile(Frozen):
    """One generation, recorded in a run of its own: recording slows it down.

    Attributes:
        file: the runtime's own record, beside the report.
        rest_ns: what no operator accounts for.
    """

    file: str
    execution: Execution
    total_ns: Count
    rest_ns: Count
    operators: tuple[OperatorTime, ...]


class Estimate(Frozen):
    """What memory bandwidth allows a device that was not there; no measurement, and never put among them.

    Attributes:
        bytes_per_token: weights that a generated token reads.
        decode_speed, decode_speed_low, decode_speed_high: at the usual, a low and a high share of the peak bandwidth.
        basis: the published figures that these shares are from.
    """

    device: str
    chip: str
    peak_bandwidth: Figure
    bytes_per_token: Figure
    decode_speed: Figure
    decode_speed_low: Figure
    decode_speed_high: Figure
    basis: str


class Variant(Frozen):
    """One of several bundles of the same model that were measured together: one device, text, prompt and settings.

    Attributes:
        name: unique among them, e.g. `onnx fused`.
        report: its own report, relative to this one; absent for the bundle that this report is about.
    """

    name: str
    recipe_name: str | None = None
    runtime: str
    form: str | None = None
    activations: str
    report: str | None = None
    runtime_size: Figure
    perplexity: Figure
    kl_from_original: Figure | None = None
    kl_from_quantized: Figure | None = None
    top1_with_original: Figure | None = None
    load_time: Figure
    prefill_speed: Figure
    decode_speed: Figure
    peak_rss: Figure


class Report(Frozen):
    """A measured bundle. `as_dict` is `report.json`."""

    schema_version: Literal[1] = 1
    created: str
    tool: Tool
    deployed: Deployed
    device: DeviceFacts
    settings: Settings
    fidelity: Fidelity
    generation: GreedyGeneration
    speed: Speed
    sweep: tuple[ThreadRow, ...] = ()
    memory: Memory
    cost: Cost | None = None
    energy: Energy | None = None
    samples: Samples
    quantization: Quantization
    variants: tuple[Variant, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    profile: OperatorProfile | None = None
    reproduce: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def counted(self) -> str | None:
        """The generation in which instructions were counted, as a workload is written; None where none were."""
        if self.cost is None:
            return None
        prompt, new = self.cost.prompt_tokens, self.cost.new_tokens
        if prompt is None or new is None:
            prompt, new = len(self.generation.prompt.tokens), self.settings.greedy
        return f"pp{prompt}/tg{new}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; what was not recorded is absent."""
        return self.model_dump(mode="json", exclude_none=True)

    def summary(self) -> dict[str, Any]:
        """The main figures, flat and JSON-ready: one line on a terminal."""
        scores = self.fidelity.deployed
        figures = {
            "size": self.deployed.runtime_size,
            "perplexity": scores.perplexity,
            "kl": scores.kl_from_original,
            "top1": scores.top1_with_original,
            "kl_from_quantized": scores.kl_from_quantized,
            "top1_with_quantized": scores.top1_with_quantized,
            "max_logit_error": scores.max_logit_error_from_quantized,
            "load_time": self.speed.load_time,
            "time_to_first_token": self.speed.time_to_first_token,
            "prefill_speed": self.speed.prefill_speed,
            "decode_speed": self.speed.decode_speed,
            "token_time_p50": self.speed.token_time_p50,
            "token_time_p95": self.speed.token_time_p95,
            "peak_rss": self.memory.peak_rss,
            "instructions_per_token": self.cost.instructions_per_token if self.cost else None,
        }
        match = self.generation.against_quantized
        return {
            "model": self.deployed.model,
            "recipe": self.deployed.recipe_name,
            "runtime": self.deployed.runtime,
            "device": self.device.name,
            "execution": self.device.execution,
            "workload": self.settings.workload,
            "greedy_matching": {"matching": match.matching, "compared": match.compared},
            **self._others(),
            **{
                name: entry.model_dump(mode="json", exclude={"note"}, exclude_none=True)
                for name, entry in figures.items()
                if entry is not None
            },
        }

    def _others(self) -> dict[str, Any]:
        """The variants' figures by name, where there are several."""
        if not self.variants:
            return {}
        names = ("runtime_size", "kl_from_original", "perplexity", "prefill_speed", "decode_speed", "peak_rss")
        return {
            "variants": {
                one.name: {name: found.value for name in names if (found := getattr(one, name)) is not None}
                for one in self.variants
            }
        }
