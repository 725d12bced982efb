"""Ids to frames: files, chunks, offloading, and the errors of wrong files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.inference.diffusion.decoder import CHUNK, DiffusionDecoder, chunk_starts, join, reflected
from cosmos_mcore.inference.diffusion.weights import NETWORK_FOLDER, TOKENIZER_FOLDER, missing_files
from tests.inference.diffusion.small import SMALL, random_network, write_network, write_released

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


def some_ids(frames):
    return torch.randint(SMALL.vocab_size, (frames, 2, 3), generator=torch.Generator().manual_seed(frames))


def test_the_size_is_read_from_the_file(folder):
    assert DiffusionDecoder.from_folder(folder, CPU).network.size == SMALL


def test_frames(folder):
    decoder = DiffusionDecoder.from_folder(folder, CPU)
    video = decoder.decode(some_ids(5), seed=1)
    assert (video.shape, video.dtype) == ((3, 33, 32, 48), torch.float32)
    assert -1 <= video.min() < -0.2 and 0.2 < video.max() <= 1
    assert torch.equal(video, decoder.decode(some_ids(5).int(), seed=1))
    assert not torch.equal(video, decoder.decode(some_ids(5), seed=2))
    text = torch.randn(1, 3, SMALL.text_channels)
    assert not torch.equal(video, decoder.decode(some_ids(5), text, seed=1))
    assert decoder.decode(some_ids(1)).shape == (3, 1, 32, 48)


def test_frames_are_those_of_the_whole_chunk(folder):
    """The original decodes 8 latent frames and throws away what belongs to the reflected ones."""
    decoder = DiffusionDecoder.from_folder(folder, CPU)
    ids = some_ids(5)
    whole = decoder.decode(ids[reflected(5, CHUNK)], seed=1)
    torch.testing.assert_close(decoder.decode(ids, seed=1), whole[:, :33], atol=1e-4, rtol=0)


def test_offloading_changes_nothing(folder):
    parked = DiffusionDecoder.from_folder(folder, CPU, offload=True)
    expected = DiffusionDecoder.from_folder(folder, CPU).decode(some_ids(3), seed=1)
    for _ in range(2):
        assert torch.equal(parked.decode(some_ids(3), seed=1), expected)
        assert all(not parameter.untyped_storage().nbytes() for parameter in parked.network.parameters())


def test_long_clips_start_and_end_like_their_chunks(folder):
    decoder = DiffusionDecoder.from_folder(folder, CPU)
    ids = some_ids(14)
    video = decoder.decode(ids, seed=1)
    assert video.shape == (3, 105, 32, 48)
    assert torch.equal(video[:, :49], decoder.decode(ids[:8], seed=1)[:, :49])
    assert video.isfinite().all()


@given(st.integers(1, 60))
def test_chunks_cover_a_clip_and_overlap(frames):
    starts = chunk_starts(frames)
    assert starts[0] == 0 and starts[-1] == max(frames - CHUNK, 0)
    assert all(0 < b - a <= CHUNK - 2 for a, b in zip(starts, starts[1:], strict=False))


@given(st.integers(1, 60), st.integers(1, 60))
def test_reflection(frames, length):
    found = reflected(frames, length).tolist()
    there_and_back = list(range(frames)) + list(range(frames - 2, 0, -1))
    assert found == [there_and_back[step % len(there_and_back)] for step in range(length)]


def test_reflection_is_the_originals(shared_dir):
    golden = torch.load(shared_dir / "golden" / "diffusion_decoder.pt", weights_only=True)["reflect"]
    assert reflected(5, 8).tolist() == golden["frame_order_of_5_padded_to_8"]
    tokens = golden["tokens_in"][0, 0]
    assert torch.equal(tokens[reflected(len(tokens), 4)], golden["tokens_padded"][0, 0])


@given(st.integers(0, 7), st.sampled_from([9, 17, 49]), st.integers(1, 20))
def test_joined_pictures_are_of_the_same_moment(before, shared, after):
    """Chunks cut from one video join to this video, whatever the sizes."""
    whole = torch.rand(3, before + shared + after, 2, 2)
    joined = join(whole[:, : before + shared], whole[:, before:], before)
    torch.testing.assert_close(joined, whole)
    faded = join(torch.zeros_like(whole[:, : before + shared]), torch.ones_like(whole[:, before:]), before)[0, :, 0, 0]
    steps = torch.arange(9) / 8
    torch.testing.assert_close(faded, torch.cat([torch.zeros(before + shared - 9), steps, torch.ones(after)]))


def test_wrong_arguments(folder):
    decoder = DiffusionDecoder.from_folder(folder, CPU)
    with pytest.raises(ValueError, match=r"ids must be \[T, h, w\] and not empty, got \[1, 5, 2, 3\]"):
        decoder.decode(some_ids(5)[None])
    with pytest.raises(ValueError, match=r"ids go from 50 to 50; the diffusion decoder knows 0 to 49"):
        decoder.decode(torch.full((1, 2, 3), 50))
    with pytest.raises(ValueError, match=r"a text embedding must be \[1, M, 16\], got \[1, 3, 1024\]"):
        decoder.decode(some_ids(1), torch.zeros(1, 3, 1024))


@pytest.mark.parametrize(
    "name",
    [
        f"{NETWORK_FOLDER}/model.pt",
        f"{NETWORK_FOLDER}/aux_vars.pt",
        f"{TOKENIZER_FOLDER}/decoder.jit",
        f"{TOKENIZER_FOLDER}/mean_std.pt",
    ],
)
def test_missing_and_damaged_files(tmp_path, name):
    folder = write_released(tmp_path)
    assert not missing_files(folder)
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{path.name} is (truncated|damaged)"):
        DiffusionDecoder.from_folder(folder, CPU)
    path.unlink()
    assert missing_files(folder) == [path]
    with pytest.raises(ValueError, match=rf"the diffusion decoder needs \S+{path.name}, which is not there; get it"):
        DiffusionDecoder.from_folder(folder, CPU)
    (folder / NETWORK_FOLDER / "aux_vars.pt").unlink(missing_ok=True)
    (folder / TOKENIZER_FOLDER / "mean_std.pt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"which are not there; .*--disable_diffusion_decoder") as error:
        DiffusionDecoder.from_folder(folder, CPU)
    assert all(str(file) in str(error.value) for file in missing_files(folder))


def test_files_of_something_else(tmp_path):
    folder = write_released(tmp_path)
    text = torch.zeros(1, 2, SMALL.text_channels)
    state = {f"net.{name}": tensor.bfloat16() for name, tensor in random_network().state_dict().items()}
    write_network(folder, {**state, "net.more": torch.zeros(1)}, text)
    with pytest.raises(ValueError, match=r"has a tensor more that the diffusion decoder does not know"):
        DiffusionDecoder.from_folder(folder, CPU)
    state["net.final_layer.linear.weight"] = torch.zeros(3, 48)
    write_network(folder, state, text)
    with pytest.raises(ValueError, match=r"final_layer\.linear\.weight has the shape \[3, 48\], not \[64, 48\]"):
        DiffusionDecoder.from_folder(folder, CPU)
    write_network(folder, {"tok_embeddings.weight": torch.zeros(3, 3)}, text)
    with pytest.raises(ValueError, match=r"has no tensor net\.x_embedder\.proj\.1\.weight; it is not the file"):
        DiffusionDecoder.from_folder(folder, CPU)
    write_network(folder, state, text[0])
    torch.save({"iteration": 3}, folder / NETWORK_FOLDER / "model.pt")
    with pytest.raises(ValueError, match="holds more than named tensors"):
        DiffusionDecoder.from_folder(folder, CPU)


def test_three_processes_are_refused(folder):
    class Group:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="8 latent frames cannot be shared by 3 processes; start 1, 2, 4 or 8"):
        DiffusionDecoder.from_folder(folder, CPU, Group())
