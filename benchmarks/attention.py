"""Which kernels suit the diffusion decoder's largest parts? bfloat16, 33 frames at 640x1024, about 20 seconds on a GPU.

    python benchmarks/attention.py

One line per way: milliseconds, TFLOP/s or GB/s, and how far its result is from the first way's. Ways take turns, so
that all run at the clock that a warm GPU keeps. Those of packages that are not installed say so.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos_mcore.inference.diffusion import kernels
from cosmos_mcore.inference.diffusion.rotary import rotary_table

ROWS, HEADS, POSITIONS, SIZE = 2, 32, 20480, 128
WIDTH, HIDDEN = HEADS * SIZE, 4 * HEADS * SIZE
ROUNDS, CALLS = 4, 4

Way = Callable[[], Tensor]


def attention_ways() -> Iterator[tuple[str, Callable[[], Way]]]:
    """Names and what makes each way; their results are [B, S, heads, head_dim]."""
    q, k, v = (torch.randn(ROWS, POSITIONS, HEADS, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, **options)

    def of_views(backend: SDPBackend, **options: float) -> Way:
        parts = [part.transpose(1, 2) for part in (q, k, v)]
        return lambda: sdpa(backend, *parts, **options).transpose(1, 2)

    def of_heads_first() -> Way:
        parts = [part.transpose(1, 2).contiguous() for part in (q, k, v)]
        return lambda: sdpa(SDPBackend.CUDNN_ATTENTION, *parts).transpose(1, 2)

    def of_heads_as_rows() -> Way:
        parts = [part.transpose(1, 2).contiguous().view(ROWS * HEADS, 1, POSITIONS, SIZE) for part in (q, k, v)]
        shape = (ROWS, HEADS, POSITIONS, SIZE)
        return lambda: sdpa(SDPBackend.CUDNN_ATTENTION, *parts).view(shape).transpose(1, 2)

    def of_one_product() -> Way:
        joined = torch.stack([q, k, v], dim=2)
        parts = [part.transpose(1, 2) for part in joined.unbind(2)]
        return lambda: sdpa(SDPBackend.CUDNN_ATTENTION, *parts).transpose(1, 2)

    def row_by_row() -> Way:
        rows = [[part[row : row + 1].transpose(1, 2) for part in (q, k, v)] for row in range(ROWS)]
        return lambda: [sdpa(SDPBackend.CUDNN_ATTENTION, *row).transpose(1, 2) for row in rows][0]

    def with_sums() -> Way:
        parts = [part.transpose(1, 2).detach().requires_grad_() for part in (q, k, v)]

        def call() -> Tensor:
            with torch.enable_grad():
                return sdpa(SDPBackend.CUDNN_ATTENTION, *parts).detach().transpose(1, 2)

        return call

    def transformer_engine() -> Way:
        os.environ["NVTE_FLASH_ATTN"] = "0"
        from transformer_engine.pytorch import DotProductAttention

        layer = DotProductAttention(HEADS, SIZE, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="no_mask")
        layer = layer.cuda().eval()
        return lambda: layer(q, k, v).view(q.shape)

    def flash_attention_4() -> Way:
        from flash_attn.cute import flash_attn_func

        return lambda: flash_attn_func(q, k, v)[0]

    yield "cuDNN, [B, S, H, D] views (the network's)", lambda: of_views(SDPBackend.CUDNN_ATTENTION)
    yield "cuDNN, the scale given", lambda: of_views(SDPBackend.CUDNN_ATTENTION, scale=SIZE**-0.5)
    yield "cuDNN, [B, H, S, D] contiguous", of_heads_first
    yield "cuDNN, [B H, 1, S, D] contiguous", of_heads_as_rows
    yield "cuDNN, views of one product", of_one_product
    yield "cuDNN, row by row", row_by_row
    yield "cuDNN, with log-sum-exp", with_sums
    yield "torch's FlashAttention", lambda: of_views(SDPBackend.FLASH_ATTENTION)
    yield "Transformer Engine's choice of cuDNN", transformer_engine
    yield "flash-attn-4", flash_attention_4
    for plan in range(4):
        yield f"cuDNN's frontend, plan {plan}", lambda plan=plan: _cudnn_plan(q, k, v, plan)


def _cudnn_plan(q: Tensor, k: Tensor, v: Tensor, plan: int) -> Way:
    import cudnn

    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kinds.BFLOAT16,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=handle,
    )
    parts = [part.transpose(1, 2) for part in (q, k, v)]
    out = torch.empty_like(q)
    inputs = [graph.tensor_like(part) for part in parts]
    result, _ = graph.sdpa(*inputs, attn_scale=SIZE**-0.5, generate_stats=False, use_causal_mask=False)
    view = out.transpose(1, 2)
    result.set_output(True).set_dim(list(view.shape)).set_stride(list(view.stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans(cudnn.build_plan_policy.ALL)
    if plan >= graph.get_execution_plan_count():
        raise ValueError(f"there are {graph.get_execution_plan_count()} plans")
    print(f"plan {plan}: {graph.get_plan_name_at_index(plan)}")
    workspace = torch.empty(graph.get_workspace_size_plan_at_index(plan), device="cuda", dtype=torch.uint8)
    tensors = dict(zip([*inputs, result], [*parts, view], strict=True))

    def call() -> Tensor:
        graph.execute_plan_at_index(tensors, workspace, plan, handle=handle)
        return out

    return call


def product_ways() -> Iterator[tuple[str, Callable[[], Way]]]:
    """The MLP's first product with GELU, results [B S, hidden]."""
    x = torch.randn(ROWS * POSITIONS, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(HIDDEN, WIDTH, device="cuda", dtype=torch.bfloat16) * WIDTH**-0.5
    out = x.new_empty(len(x), HIDDEN)
    gelu = torch._addmm_activation

    def in_parts(count: int) -> Way:
        pairs = list(zip(x.chunk(count), out.chunk(count), strict=True))

        def call() -> Tensor:
            for part, place in pairs:
                gelu(x.new_zeros(HIDDEN), part, weight.t(), use_gelu=True, out=place)
            return out

        return call

    yield "GELU inside (the network's)", lambda: lambda: gelu(x.new_zeros(HIDDEN), x, weight.t(), use_gelu=True)
    yield "GELU inside, channels first", lambda: lambda: gelu(x.new_zeros(len(x)), weight, x.t(), use_gelu=True).t()
    yield "GELU inside, 2 parts", lambda: in_parts(2)
    yield "GELU inside, 8 parts", lambda: in_parts(8)
    yield "GELU after, in place", lambda: lambda: torch.ops.aten.gelu_(F.linear(x, weight), approximate="tanh")
    yield "no GELU", lambda: lambda: F.linear(x, weight)


def mlp_ways() -> Iterator[tuple[str, Callable[[], Way]]]:
    """Both products of the MLP, the second onto the residual, results [B S, channels]."""
    x = torch.randn(ROWS * POSITIONS, WIDTH, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(HIDDEN, WIDTH, device="cuda", dtype=torch.bfloat16) * WIDTH**-0.5
    down = torch.randn(WIDTH, HIDDEN, device="cuda", dtype=torch.bfloat16) * HIDDEN**-0.5
    residual = torch.randn_like(x)

    def through(hidden: Way) -> Way:
        rows = residual.clone()
        return lambda: torch.addmm(rows, hidden(), down.t(), out=rows)

    gelu = torch._addmm_activation
    yield "MLP (the network's)", lambda: through(lambda: gelu(x.new_zeros(HIDDEN), x, up.t(), use_gelu=True))
    yield "MLP, channels first", lambda: through(lambda: gelu(x.new_zeros(len(x)), up, x.t(), use_gelu=True).t())


def memory_ways() -> Iterator[tuple[str, float, Callable[[], Way]]]:
    """Name, bytes read and written, what makes it."""
    x = torch.randn(ROWS, POSITIONS, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight, row = x[0].view(-1, HIDDEN)[:WIDTH], torch.randn(3, WIDTH, device="cuda", dtype=torch.bfloat16)
    table = rotary_table((8, 40, 64), SIZE, 24.0, x.device)
    heads = x.clone().view(ROWS, POSITIONS, HEADS, SIZE)
    twice = 2 * x.nbytes
    yield "layer norm, torch", twice, lambda: lambda: F.layer_norm(x, (WIDTH,), 1 + row[0], row[1], 1e-6)
    yield "layer norm, ours", twice, lambda: lambda: kernels.modulated_norm(x, row[1], row[0], 1e-6)
    yield "heads, ours", twice, lambda: lambda: kernels.norm_heads(heads, row[2, :SIZE], table, 1e-6)
    yield "gate in the matrix, torch", 2 * weight.nbytes, lambda: lambda: weight * row[0][:, None]
    yield "gate in the matrix, ours", 2 * weight.nbytes, lambda: lambda: kernels.scale_rows(weight, row[0])


def compare(ways: list[tuple[str, float, Callable[[], Way]]], unit: str) -> None:
    """Times the ways, whose numbers are operations or bytes, in turns; prints their rates in ``unit`` per second."""
    ready: dict[str, tuple[float, Way, Tensor]] = {}
    for name, work, make in ways:
        try:
            way = make()
            sample = way().flatten()[::100003].float()
            torch.cuda.synchronize()
        except Exception as error:  # one that is missing or refuses must not stop the others
            print(f"{name:42} {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
        else:
            ready[name] = (work, way, sample)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, (_, way, _) in ready.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                way()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    first = next(iter(ready.values()))[2] if ready else None
    for name, (work, _, sample) in ready.items():
        milliseconds = statistics.median(times[name][1:])
        error = (sample - first).norm() / first.norm() if first is not None and sample.shape == first.shape else None
        rate = work / milliseconds / (1e9 if unit == "TFLOP" else 1e6)
        print(f"{name:42} {milliseconds:8.3f} ms {rate:7.0f} {unit}/s  off by {error}", flush=True)


@torch.no_grad()
def main() -> None:
    """Prints all lines."""
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    operations = 4.0 * ROWS * HEADS * POSITIONS**2 * SIZE
    compare([(name, operations, make) for name, make in attention_ways()], "TFLOP")
    operations = 2.0 * ROWS * POSITIONS * WIDTH * HIDDEN
    compare([(name, operations, make) for name, make in product_ways()], "TFLOP")
    compare([(name, 2 * operations, make) for name, make in mlp_ways()], "TFLOP")
    passes = list(memory_ways())
    for group in (passes[:2], passes[2:3], passes[3:]):
        compare(group, "GB")


if __name__ == "__main__":
    main()
