"""What Megatron-Core asks of CUDA, asked of CPU mode."""

import torch
from torch._dynamo import trace_rules

from cosmos_mcore.parallel import cpu_mode
from tests.processes import run_ranks


def test_in_a_process_of_its_own():
    run_ranks("tests.parallel.test_cpu_mode", 1)  # it changes torch for the rest of the process


def devices():
    x = torch.ones(2, device="cuda")
    for moved in (
        x,
        x.cuda(),
        x.to("cuda"),
        x.to(torch.device("cuda", 0)),
        x.to("cuda:0", torch.float64),
        x.to(device=0),
    ):
        assert moved.device.type == "cpu"
    assert x.to("cuda:0", torch.float64).dtype == torch.float64
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.float64).dtype == torch.float64
    assert torch.tensor(True).device.type == "cpu" and torch.ones(3, dtype=torch.int64).sum(0).item() == 3


def streams():
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        event.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert event.query() and event.elapsed_time(torch.cuda.Event()) == 0


def random_state():
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def compiling():
    trace_rules.get_torch_obj_rule_map.cache_clear()  # made anew, as where nothing was compiled before
    doubled = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    assert doubled(torch.ones(2)).tolist() == [2, 2]


if __name__ == "__main__":
    if torch.cuda.is_available():
        raise SystemExit  # CPU mode is only for machines without CUDA
    cpu_mode.enable()
    cpu_mode.enable()
    for check in (devices, streams, random_state, compiling):
        check()
