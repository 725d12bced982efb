"""The original's training checkpoints: read, written, and carried through our distributed format."""

import pytest
import torch

from cosmos_mcore.checkpoint.convert import convert
from cosmos_mcore.checkpoint.reader import EXP_AVG, EXP_AVG_SQ, WEIGHT
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.checkpoint.training_files import SCHEDULER, trained_parameters, write_original

ARCH = reduced("5b-video2world")


def assert_holds(path, truth, step=3.0):
    checkpoint = open_checkpoint(path)
    for state, tensors in truth.items():
        for name, tensor in tensors.items():
            found = checkpoint.read(name, state)
            assert torch.equal(found.to(tensor.dtype), tensor), (state, name)
    assert checkpoint.training.iteration == 3 and checkpoint.training.step == step
    return checkpoint


@pytest.mark.parametrize("size", [1, 2, 4])
def test_reading(tmp_path, size):
    truth = write_original(tmp_path / "checkpoints", ARCH, size)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "iter_000000003.pt"):
        checkpoint = assert_holds(path, truth)
        assert checkpoint.layout == "training"
        assert checkpoint.training.scheduler == SCHEDULER
        assert checkpoint.training.param_group["betas"] == (0.9, 0.98)


@pytest.mark.parametrize(("size", "other"), [(1, 4), (4, 1), (2, 8)])
def test_through_the_distributed_format_to_another_size(tmp_path, size, other):
    truth = write_original(tmp_path / "run", ARCH, size)
    convert(
        tmp_path / "run", tmp_path / "iter_000000003", "distributed", tensor_parallel_size=2, pipeline_parallel_size=2
    )
    distributed = assert_holds(tmp_path / "iter_000000003", truth)
    assert distributed.dtype("norm.weight", EXP_AVG) is torch.float32
    convert(tmp_path / "iter_000000003", tmp_path / "back", "training", tensor_parallel_size=other)
    back = assert_holds(tmp_path / "back", truth)
    assert back.dtype("norm.weight", EXP_AVG_SQ) is torch.bfloat16
    assert back.tensor_parallel_size == other


def test_the_original_can_resume_from_what_is_written(tmp_path):
    truth = write_original(tmp_path / "run", ARCH, 2)
    convert(tmp_path / "run", tmp_path / "out", "training")
    assert (tmp_path / "out" / "latest_checkpoint.txt").read_text() == "iter_000000003.pt\n"
    content = torch.load(tmp_path / "out" / "iter_000000003.pt", weights_only=True)
    assert set(content) == {"model", "optimizer", "scheduler", "grad_scaler", "iteration"}
    assert content["iteration"] == 3 and content["grad_scaler"] == {}
    assert list(content["model"]) == ["model." + name for name in truth["weight"]]
    assert content["scheduler"] == SCHEDULER
    parameters, trained = trained_parameters(ARCH)
    fresh = torch.optim.AdamW([torch.nn.Parameter(tensor) for tensor in content["model"].values()])
    fresh.load_state_dict(content["optimizer"])
    for optimizer, values in ((trained, parameters), (fresh, fresh.param_groups[0]["params"])):
        for value in values:
            value.grad = torch.ones_like(value)
        optimizer.step()
    assert all(map(torch.equal, parameters, fresh.param_groups[0]["params"]))


def test_files_of_a_tensor_parallel_run(tmp_path):
    write_original(tmp_path / "run", ARCH)
    convert(tmp_path / "run", tmp_path / "out", "training", tensor_parallel_size=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "iter_000000003.pt",
        "iter_000000003_model_mp_0.pt",
        "iter_000000003_model_mp_1.pt",
        "iter_000000003_optim_mp_0.pt",
        "iter_000000003_optim_mp_1.pt",
        "iter_000000003_scheduler_mp_0.pt",
        "iter_000000003_scheduler_mp_1.pt",
        "latest_checkpoint.txt",
    ]
    assert torch.load(tmp_path / "out" / "iter_000000003.pt", weights_only=True) == {"grad_scaler": {}, "iteration": 3}


def test_norms_that_drifted_apart_are_averaged(tmp_path, caplog):
    truth = write_original(tmp_path / "run", ARCH, 2)
    path = tmp_path / "run" / "iter_000000003_model_mp_1.pt"
    content = torch.load(path, weights_only=True)
    name = "layers.1.attention.q_norm.weight"
    content["model." + name] = content["model." + name] + 0.0625
    torch.save(content, path)
    merged = open_checkpoint(tmp_path / "run").read(name)
    assert torch.equal(merged, (truth[WEIGHT][name].float() + 0.03125).bfloat16())
    assert f"{name} differs between the shards" in caplog.text
    content["model." + name] = content["model." + name] + 1
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"{name} should be the same in all 2 shards"):
        open_checkpoint(tmp_path / "run").read(name)


def test_weights_alone_are_no_training_checkpoint(tmp_path):
    model = save_model(tmp_path / "model.pt", random_weights(ARCH))
    with pytest.raises(ValueError, match="model.pt holds no optimizer state"):
        convert(model, tmp_path / "out", "training")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["state"].pop(5), "holds optimizer state of"),
        (lambda o: o["state"][1].pop("exp_avg"), "exp_avg of layers.0.attention.wq.weight is missing"),
        (
            lambda o: o["state"][1].update(exp_avg_sq=torch.ones(3)),
            r"exp_avg_sq of .*wq.weight is \[3\], not \[256, 256\]",
        ),
        (lambda o: o["state"][1].update(step=torch.tensor(9.0)), r"step counts differ: \[3.0, 9.0\]"),
        (lambda o: o["param_groups"].append({}), "does not hold the state of one AdamW optimizer"),
    ],
)
def test_a_damaged_optimizer_is_named_in_one_line(tmp_path, change, message):
    write_original(tmp_path / "run", ARCH)
    path = tmp_path / "run" / "iter_000000003.pt"
    content = torch.load(path, weights_only=True)
    change(content["optimizer"])
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_step_count_is_noticed(tmp_path):
    write_original(tmp_path / "run", ARCH)
    path = tmp_path / "run" / "iter_000000003.pt"
    data = path.read_bytes()
    one, other = (torch.tensor(step).numpy().tobytes() + b"PK" for step in (3.0, 4.0))  # and the next record's header
    assert data.count(one) == len(random_weights(ARCH))
    path.write_bytes(data.replace(one, other))
    with pytest.raises(ValueError, match="step does not match its checksum"):
        open_checkpoint(path)


def test_missing_files_of_a_run(tmp_path):
    write_original(tmp_path / "run", ARCH, 2)
    (tmp_path / "run" / "iter_000000003_optim_mp_1.pt").unlink()
    with pytest.raises(ValueError, match="iter_000000003_optim_mp_1.pt cannot be read: No such file"):
        open_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "iter_000000003.pt").unlink()
    with pytest.raises(ValueError, match="latest_checkpoint.txt names 'iter_000000003.pt', which is not beside it"):
        open_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "latest_checkpoint.txt").write_bytes(b"iter_0\xb0\xff\n")
    with pytest.raises(ValueError, match="latest_checkpoint.txt names 'iter_0.+', which is not beside it"):
        open_checkpoint(tmp_path / "run")
