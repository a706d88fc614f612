"""What runs: each contender is one line of CONTENDERS."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers.table import Peer

NATIVE = "native"  # the driver of our runners


@dataclass(frozen=True)
class Contender:
    """One program on one runtime.

    Attributes:
        program: a name of `programs.PROGRAMS`.
        driver: NATIVE, or a script `drive_NAME` beside this file.
        environment: of the driver; None: this project's own.
        beside: the label of ours that its figures are compared with; None for ours.
        same_program: the label of the contender that ran the same file, whose KL is not measured again.
        score_rows: how many sequences of the text it is scored on at most, where a token takes long; None: all.
        note: how it was made.
    """

    label: str
    program: str
    driver: str
    environment: Peer | None = None
    beside: str | None = None
    same_program: str | None = None
    score_rows: int | None = None
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.beside is None


OPTIMUM = Peer(
    "", "", "optimum_executorch", ("optimum-executorch==1.1.0", "executorch==1.5.1", "torch==2.13.0"), lambda _: None
)
LLAMA = Peer("", "", "llamacpp", ("xllamacpp==2026.10.11549", "numpy==2.4.6"), lambda _: None)

QDQ, FUSED, PROGRAM = "boa-edge ONNX qdq", "boa-edge ONNX fused", "boa-edge ExecuTorch"
FUSED_GENAI = "boa-edge ONNX fused, by onnxruntime-genai"
PYTHON = "boa-edge ExecuTorch, by its Python runtime"
_SERVER = "through its server's own times; llama.cpp's defaults otherwise"

CONTENDERS: tuple[Contender, ...] = (
    Contender(QDQ, "onnx-qdq", NATIVE),
    Contender(FUSED, "onnx-fused", NATIVE),
    Contender(FUSED_GENAI, "onnx-fused", "genai", same_program=FUSED, note="KL is that of the same file above"),
    Contender(PROGRAM, "executorch", NATIVE),
    Contender(
        "onnxruntime-genai builder, int4",
        "genai-int4",
        "genai",
        beside=FUSED_GENAI,
        note="`-p int4 -e cpu`, all else by default: round to nearest, groups of 32, a tied 4-bit table",
    ),
    Contender("onnxruntime-genai builder, float32", "genai-fp32", "genai", beside=FUSED_GENAI, note="`-p fp32 -e cpu`"),
    Contender(PYTHON, "executorch", "executorch", same_program=PROGRAM, note="KL is that of the same file above"),
    Contender(
        "ExecuTorch's Llama exporter, 8da4w",
        "executorch-llama",
        "executorch",
        beside=PYTHON,
        note=(
            "groups of 32 by HQQ (its default), head among them, embedding 8 bits per row; it takes one token less at "
            "once than its get_max_seq_len says, which our native runner refuses"
        ),
    ),
    Contender(
        "optimum-executorch, 8da4w",
        "executorch-optimum",
        "optimum",
        OPTIMUM,
        PYTHON,
        note=(
            "as its README exports: custom attention and cache, groups of 32 by HQQ (its default), head among them; "
            "embedding 8 bits per row; it computes the logits of all positions of a prompt"
        ),
    ),
    Contender(
        "llama.cpp Q4_1",
        "gguf-q4_1",
        "llama",
        LLAMA,
        FUSED,
        score_rows=1,
        note=f"the file that the source model was read from: its weights are the original's; {_SERVER}",
    ),
    Contender(
        "llama.cpp Q4_0",
        "gguf-q4_0",
        "llama",
        LLAMA,
        FUSED,
        score_rows=1,
        note="linears quantized again by gguf-py from the source model's float32, embedding and head Q8_0",
    ),
)
