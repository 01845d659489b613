"""How many bytes a training attempt takes at its peak, by component, before it starts.

Covers the formula for `patchtst.PatchTST` under `trainer.Trainer`, and the largest micro-batch that fits a limit. Pure
arithmetic in microseconds: no torch, no I/O, so that the driver sizes a whole grid at once. The correction by observed
peaks is not here: see scheduler/core/reservation.py.

The formula (B micro-batch, T patches, d d_model, f d_ff, h heads, L layers, P parameters, N = B T rows), in fp32:

    peak = runtime + data + weights 4P + gradients 4P + optimizer_state 8P + activations + workspace + heap

and under another recipe (training/recipe.py), whose bytes of the first three `recipe.held` has exactly:

activations  what comes out of a product takes 2 bytes where products are bf16, the stream between the layers 4 always;
             fp32 weights are then cast, and what is cast is kept like an activation (2 (4 d d + 2 d f) a layer). Where
             layers run again, each keeps its input and the random generator's state, and one keeps all.
workspace    a new weight gradient has the type of the products, and a copy in fp32 where the weights are.
step         what the optimizer needs, at its step, beyond what backward has freed.
runtime      where products are bf16 their kernels' code and buffers on top.

weights, gradients, optimizer_state  all allocated before the first step (AdamW says why the gradients are); the fused
             kernel needs nothing more. So accumulation changes nothing.
activations  what a layer keeps for backward, in the order of `EncoderLayer.forward`, each 4 N d bytes unless noted:
             norm1, q, k, v, attended, x after attention, norm2, up (4 N f), gelu (4 N f), x after feed-forward: 8 N d +
             2 N f floats; one-byte masks of the three dropouts, N (2 d + f); mean and 1/deviation of two norms, 16 N;
             torch's own attention's log-sum-exp, 4 N h. Where products are bf16, floats of 2 bytes: then the stream is
             one tensor for all layers. Around the layers: the gathered windows, the patches cut from them, the
             embedding and its mask, the last norm.
workspace    the top of backward, at the last layer's `down`: the gradient of the stream, its scaled copy and that of
             the hidden units beside a new weight gradient (4 d f), less the stream and mask already freed.
heap         what the allocator adds under glibc-stack (training/runtime.py), fitted on real trials (FIT_SEEDS and
             WIDE in tests/benchmarks/footprint_cases.py): the last layer's blocks are freed out of order, which costs
             up to two thirds of a layer once more; a weight gradient too large for what is freed goes on top, which
             wastes up to 2.35 layers in all; each layer's small objects (nodes of the graph, tensor headers); of
             the activations 3.0 and of all other tensors 1.0 percent for what no term names (alignment, holes that
             come with depth). A layer whose matrices are stored in bf16 is made in fp32 first, and its biases and norms
             stay in what that leaves: CAST_HOLES. Other heaps: HEAP_SHARE.
runtime      interpreter, torch, the indicator library: what a trial process holds when it is ready, which each says
             of itself (context["runtime_bytes"]: 225 MiB with the CPU build of torch, 510 with the CUDA build), and
             what the first step adds to that (kernels' code and buffers, 11 to 23 MiB with either build).
few_rows     below 16 rows the kernels lay the weights out anew: once more the largest of them.
unmeasured   where the environment is none of MEASURED_IN.
data         the days of the file as float32 features, labels and order of the windows, and holes that loading leaves;
             with a Parquet file pyarrow, too.
loading      what reading the file takes beyond all of the above, before there is a model: it is given back to the heap,
             and training takes it from there. The file's numbers as float64 beside the features, and the indicators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training import runtime
from training.arch_grid import param_count, token_count
from training.attention_choice import Attention, attention_for
from training.context import Context
from training.recipe import FP32_ADAMW, Recipe, counted, held, named
from training.table import is_parquet

MIB = 2**20
# On Apple's unified memory the only observation there is (d=1024, L=256, batch 128: 115 GB) is about twice the
# formula. Until a study has observed peaks of its own on that device, twice the formula is the prior.
MPS_FACTOR = 2.0
FIRST_STEP_BYTES = 25 * MIB
BF16_KERNELS_BYTES = 22 * MIB  # on top, where products are in bf16: 13 after 3 steps, 22 after 20, shorter batches too
PIECES_BYTES = 6 * MIB  # of 8-bit Adam: temporaries for one piece of a matrix
ADAFACTOR_BYTES = 2 * MIB
ADAFACTOR_COPIES = 3  # of the largest matrix in fp32: weights, gradient, second moment
THREAD_BYTES = int(1.35 * MIB)  # each thread after the first: stack and packing buffers in use
DATA_BYTES = 4 * MIB
ROW_BYTES = 16  # of data for each row beside its features: label, order, date
LOADED_BYTES = 5 * MIB  # while loading
LOADED_ROW_BYTES = 310  # for each row beside its numbers: 20 indicators, bars, dates
LOADING_HOLES = 0.05  # of what loading gives back and training does not fit into
PARQUET_BYTES = 48 * MIB  # pyarrow, imported and used: 42 to 48
SAMPLE_ROWS, SAMPLE_COLUMNS, BUILT_IN_FEATURES = 5031, 7, 25
LAYER_OBJECTS_BYTES = int(0.135 * MIB)
# Bytes for each number of a matrix stored in bf16: see `heap`. 0.044 at d=2048, 0.031 at 1024, 0.015 at 512.
CAST_HOLES = 0.045
HOLES = 0.65  # of one layer's activations
WEIGHT_HOLES = 1.1  # of the largest weight gradient, where that is small beside a layer's activations
MOST_HOLES = 2.35  # layers' activations
UNNAMED = 0.01  # of all tensors
UNNAMED_ACTIVATIONS = 0.02  # of the activations, once more; fitted 0.015 left 0.1 % at 202M parameters, batch 256
# Heaps that keep and fragment (glibc's defaults: 6 to 14 % over the bytes in use, more at worst): a wider prior, which
# observed peaks then narrow.
HEAP_SHARE = {runtime.STACK: 0.0, "glibc": 0.15, "system": 0.15}
FEW_ROWS = 16
# Where the constants were measured (runtime.in_force). Without a margin preloaded heaps lie -2.2 to +21.6 MiB from them
# (eight trials, the smallest lacks most), retuned ones were under by up to 1.1 %: some MiB, and a share.
MEASURED_IN = frozenset(f"torch-2.13.0+{build}/{runtime.STACK}" for build in ("cpu", "cu130")) | {
    f"torch-2.13.0+cpu/{runtime.STACK}{runtime.FORKED}"
}
UNMEASURED_BYTES, UNMEASURED = 4 * MIB, 0.01  # the share is of all above the ready process
RANDOM_STATE_BYTES = 5056  # of torch's generator on CPU: kept for each layer that runs again
# A forked process finds what was imported in memory, but maps the libraries' code only as it runs it: 15 to 18 MiB more
# above what it holds when it is ready, on eleven trials of 0.02M to 38M parameters and all recipes (CPU build).
FORKED_BYTES = 18 * MIB
CUDA_CONTEXT_BYTES = 600 * MIB  # the driver's own, on the device, and about as much on the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers a footprint depends on, read from a trial's parameters and its study's context."""

    d: int
    f: int
    heads: int
    layers: int
    batch: int
    features: int
    length: int
    patch: int
    stride: int
    dropout: bool
    threads: int
    days: int
    columns: int
    is_parquet: bool
    recipe: Recipe
    device: str

    @classmethod
    def of(cls, params: Mapping[str, Any], context: Context) -> Shape:
        return cls(
            d=int(params["d_model"]),
            f=int(params["d_ff"]),
            heads=int(params.get("n_heads", 8)),
            layers=int(params["n_layers"]),
            batch=int(params.get("micro_batch", 1)),
            features=context.n_features,
            length=context.context_length,
            patch=context.patch_length,
            stride=context.stride,
            dropout=float(params.get("dropout", 0.1)) > 0,
            threads=context.threads,
            days=context.n_rows or SAMPLE_ROWS,
            columns=context.n_columns or SAMPLE_COLUMNS,
            is_parquet=is_parquet(context.data or ""),
            recipe=named(context.recipe),
            device=context.device,
        )

    @property
    def rows(self) -> int:
        return self.batch * token_count(self.length, self.patch, self.stride)

    @property
    def product(self) -> int:
        """Bytes of a number that comes out of a matrix product."""
        return 2 if self.recipe.compute == "bf16" else 4

    @property
    def params(self) -> int:
        return param_count(self.d, self.layers, self.f, self.features, self.length, self.patch, self.stride)


def layer_bytes(s: Shape) -> int:
    """Return what one encoder layer keeps for backward."""
    masks = s.rows * (2 * s.d + s.f) if s.dropout else 0
    kept = s.product * s.rows * (8 * s.d + 2 * s.f)
    way = attention_for(s.d // s.heads, s.batch, is_bf16=s.recipe.compute == "bf16", device=s.device)
    log_sums = 4 * s.rows * s.heads if way is Attention.FUSED else 0
    return kept + cast_bytes(s) + masks + 16 * s.rows + log_sums


def cast_bytes(s: Shape) -> int:
    """Return what of them are a layer's weights, cast for its products."""
    is_cast = s.recipe.compute == "bf16" and s.recipe.weights == "fp32"
    return 2 * (4 * s.d * s.d + 2 * s.d * s.f) if is_cast else 0


def kept_bytes(s: Shape) -> int:
    """Return what all layers keep at the most: where layers run again, their inputs and one of them whole."""
    if not s.recipe.recompute:
        return s.layers * layer_bytes(s)
    return s.layers * (4 * s.rows * s.d + RANDOM_STATE_BYTES) + layer_bytes(s)


def input_bytes(s: Shape) -> int:
    """Return what is kept before the first layer: windows, patches, the embedding and its mask."""
    windows = 4 * s.batch * s.length * s.features
    patches = 4 * s.rows * s.patch * s.features
    return windows + patches + 4 * s.rows * s.d + (s.rows * s.d if s.dropout else 0)


def workspace_bytes(s: Shape) -> int:
    """Return what backward needs at its top, beside all activations: see `workspace` above."""
    stream, hidden, weight = 4 * s.rows * s.d, s.product * s.rows * s.f, s.product * s.d * s.f
    if cast_bytes(s):
        weight += 4 * s.d * s.f
    freed = s.rows * s.d if s.dropout else 0
    return stream + hidden + weight - freed


def first_step_bytes(s: Shape) -> int:
    """Return what a process holds more once it has trained: code and buffers of the kernels."""
    return FIRST_STEP_BYTES + (BF16_KERNELS_BYTES if s.recipe.compute == "bf16" else 0)


def step_bytes(s: Shape, freed: int) -> int:
    """Return what the optimizer's step needs beside what it keeps, and beyond what backward has just freed."""
    match s.recipe.optimizer:
        case "adafactor":
            # What is freed lies in pieces: as long as it is no more than the copies, these go on top of it.
            copies = ADAFACTOR_COPIES * 4 * s.d * s.f
            return max(0, copies + min(freed, copies) - freed) + ADAFACTOR_BYTES
        case "adam8bit":
            return max(0, PIECES_BYTES - freed)
    return 0


def loading_bytes(s: Shape) -> int:
    """Return the most that is held while the file is read and made into features, the reader's own code aside."""
    own = s.features > BUILT_IN_FEATURES  # only then is the file's own array held to the end
    return LOADED_BYTES + s.days * (4 * s.features + (8 * s.columns if own else 0) + LOADED_ROW_BYTES)


def data_bytes(s: Shape) -> int:
    """Return what is left of the data when training begins, the reader's own code aside."""
    held = s.days * (4 * s.features + ROW_BYTES)
    return DATA_BYTES + held + int(LOADING_HOLES * max(0, loading_bytes(s) - held))


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes of one attempt.

    params: d_model, n_layers, n_heads, d_ff, micro_batch (1 when absent), dropout. context: the study's; what it lacks
    is taken from the defaults of the published model, n_rows and n_columns of the data file from the built-in sample.
    Of where it will run: runtime_bytes (of a ready trial process; default: what one of the installed torch holds where
    it was measured) and environments (names of `runtime.in_force`; default: one that was measured). Returns host_bytes,
    device_bytes, runtime_bytes (the part of host_bytes that is the ready process), components (name -> bytes, their sum
    is all the trial takes, wherever) and family (what shares one correction, within one environment).
    """
    known = Context.of(context)
    s = Shape.of(params, known)
    device, heap = known.device, runtime.allocator(context)
    ready_bytes = known.runtime_bytes or runtime.ready_bytes()
    is_measured = MEASURED_IN.issuperset(known.environments)
    reader = PARQUET_BYTES if s.is_parquet else 0
    components = {
        "runtime": ready_bytes + first_step_bytes(s) + THREAD_BYTES * (s.threads - 1),
        "data": data_bytes(s) + reader,
        **held(s.recipe, s.d, s.layers, s.f, s.params),
        "activations": input_bytes(s) + kept_bytes(s),
        "workspace": workspace_bytes(s),
    }
    if step := step_bytes(s, components["activations"] + components["workspace"]):
        components["step"] = step
    if any(name.endswith(runtime.FORKED) for name in known.environments):
        components["runtime"] += FORKED_BYTES
    if s.rows < FEW_ROWS:
        components["few_rows"] = 4 * s.d * s.f
    live = sum(components.values()) - components["runtime"] - components["data"]
    # A device's tensors are not in the C library's heap; what Metal keeps beside them is in its factor.
    share = UNNAMED + (HEAP_SHARE[heap] if device == "cpu" else 0.0)
    layer = layer_bytes(s) - cast_bytes(s)
    most = MOST_HOLES * (layer if s.recipe.recompute else layer_bytes(s))  # a layer's casts are among what is freed
    holes = min(HOLES * layer + WEIGHT_HOLES * 4 * s.d * s.f, most)
    holes += UNNAMED_ACTIVATIONS * components["activations"]
    if s.recipe.weights == "bf16":
        holes += CAST_HOLES * counted(s.d, s.layers, s.f, s.params).matrices
    components["heap"] = int(holes + LAYER_OBJECTS_BYTES * s.layers + share * live)
    # Before there is a model; on a device of its own it leaves no room here.
    before = components["data"] if device == "cuda" else sum(components.values()) - components["runtime"]
    if (loading := loading_bytes(s) + reader - before) > 0:
        components["loading"] = loading
    if device == "cpu" and heap == runtime.STACK and not is_measured:
        above = sum(components.values()) - ready_bytes
        components["unmeasured"] = UNMEASURED_BYTES + int(UNMEASURED * above)
    host, on_device = _pools(components, device, s)
    return {
        "host_bytes": host,
        "device_bytes": on_device,
        "runtime_bytes": ready_bytes,
        "components": components,
        "family": f"patchtst/{device}/{heap}"
        + ("" if s.recipe is FP32_ADAMW else f"/{s.recipe.name}")
        + ("/unmeasured" if "unmeasured" in components else ""),
    }


def _pools(components: dict[str, int], device: str, s: Shape) -> tuple[int, int]:
    """Host and device bytes; adds what a device itself costs to the components.

    One pool on CPU. Unified on MPS: every byte is the host's and counts against Metal's cap too. Apart on CUDA.
    """
    total = sum(components.values())
    if device == "mps":
        components["metal"] = int(total * (MPS_FACTOR - 1))
        return total + components["metal"], total + components["metal"]
    if device == "cuda":
        components["cuda_context"] = CUDA_CONTEXT_BYTES
        components["data_on_device"] = s.days * (4 * s.features + ROW_BYTES)
        host = components["runtime"] + components["data"] + components.get("loading", 0)
        components["cuda_host"] = CUDA_CONTEXT_BYTES
        return host + CUDA_CONTEXT_BYTES, total - host + components["data_on_device"] + CUDA_CONTEXT_BYTES
    return total, 0
