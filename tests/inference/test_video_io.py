"""Reading conditioning frames and writing results, with real files."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_mcore.data.encode import encode_mp4
from cosmos_mcore.inference.video_io import cover, frame_rate, read_conditioning, to_frames, write_mp4
from tests.conftest import GOLDEN


def smooth_video(frames=5, height=48, width=64):
    """[3, T, H, W] in [-1, 1], a gradient that brightens with time: H.264 keeps it well."""
    t, y, x = (torch.linspace(-0.5, 0.5, n) for n in (frames, height, width))
    ramp = t[:, None, None] + 0.3 * y[:, None] + 0.2 * x
    return torch.stack((ramp, 0.5 * ramp, -0.5 * ramp))


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate)
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), facts


def test_cover_is_the_original_inference_transform():
    for case in torch.load(GOLDEN / "clip_transform.pt", weights_only=True)["cases"]:
        pixels = case["input"].float() / 255 * 2 - 1
        result = cover(pixels, *case["target"])
        assert torch.allclose(result, case["inference_output"], rtol=0, atol=3e-5)


def test_mp4_holds_the_frames(tmp_path):
    video = smooth_video()
    path = write_mp4(tmp_path / "made" / "video.mp4", video, 12.5)
    frames, facts = decode(path)
    assert facts == ("h264", "yuv420p", 12.5)
    assert frames.shape == (5, 48, 64, 3)
    assert np.abs(frames.astype(int) - to_frames(video).astype(int)).mean() < 2
    assert [p.name for p in path.parent.iterdir()] == ["video.mp4"]


def test_values_are_rounded_and_clamped():
    video = torch.tensor([-9.0, -1, 0.5 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 9]).expand(3, 1, 1, 6)
    assert to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    frames = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    assert np.array_equal(to_frames(frames), frames.numpy())


@pytest.mark.parametrize(
    "video", [torch.zeros(1, 3, 2, 16, 16), torch.zeros(4, 2, 16, 16), torch.zeros(3, 2, 16, 16).int()]
)
def test_other_shapes_are_refused(video):
    with pytest.raises(ValueError, match="a video must be"):
        to_frames(video)


def test_odd_sizes_are_refused_and_the_old_file_stays(tmp_path):
    path = write_mp4(tmp_path / "video.mp4", smooth_video(), 24)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="even height and width"):
        write_mp4(path, smooth_video(height=47), 24)
    bad = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)]
    with pytest.raises(ValueError, match="must be uint8"):
        encode_mp4(path, bad, 24)
    with pytest.raises(ValueError, match="no frames"):
        encode_mp4(path, [], 24)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


def test_the_last_frames_of_a_video_are_read(tmp_path):
    path = write_mp4(tmp_path / "video.mp4", smooth_video(30), 24)
    every_frame, _ = decode(path)
    result = read_conditioning(path, 9, 48, 64)
    assert result.shape == (1, 3, 9, 48, 64)
    expected = torch.from_numpy(every_frame[-9:]).permute(3, 0, 1, 2).float() / 255 * 2 - 1
    assert torch.allclose(result[0], expected, atol=1e-6)


def test_frames_are_taken_in_the_training_stride(tmp_path):
    path = write_mp4(tmp_path / "video.mp4", smooth_video(30), 24)
    every_frame = read_conditioning(path, 30, 48, 64)
    assert torch.equal(read_conditioning(path, 9, 48, 64, frame_stride=3), every_frame[:, :, 5::3])
    assert frame_rate(path, 3) == 8


def test_a_video_is_resized_to_cover_and_cut(tmp_path):
    path = write_mp4(tmp_path / "video.mp4", smooth_video(9), 24)
    result = read_conditioning(path, 1, 32, 32)
    assert result.shape == (1, 3, 1, 32, 32)
    assert result.dtype == torch.float32


def test_the_rate_of_a_file_whose_tags_are_not_text(tmp_path):
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        container.metadata["title"] = "XXXXX"
        stream = container.add_stream("libx264", rate=12, width=32, height=32)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "video.mp4").read_bytes()
    (tmp_path / "latin.mp4").write_bytes(content.replace(b"XXXXX", b"caf\xe9s"))
    assert content.count(b"XXXXX") == 1 and frame_rate(tmp_path / "latin.mp4") == 12


@pytest.mark.parametrize("suffix", ["mkv", "gif"])
def test_a_file_without_an_index_of_its_frames_is_refused(tmp_path, suffix):
    codec, pixels = {"mkv": ("libx264", "yuv420p"), "gif": ("gif", "rgb8")}[suffix]
    with av.open(str(tmp_path / f"video.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=12, width=32, height=32, pix_fmt=pixels)
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=f"video.{suffix} is no MP4 file but .*; convert it to MP4"):
        read_conditioning(tmp_path / f"video.{suffix}", 1, 32, 32)


def test_a_short_video_is_refused(tmp_path):
    path = write_mp4(tmp_path / "video.mp4", smooth_video(5), 24)
    with pytest.raises(ValueError, match="has 5 frames, but 9 are needed"):
        read_conditioning(path, 9, 48, 64)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".png", mode) for mode in ("RGB", "L", "LA", "RGBA", "P", "1")]
    + [(".jpg", "RGB"), (".jpeg", "L"), (".JPG", "CMYK"), (".webp", "RGB"), (".webp", "RGBA")],
)
def test_images_of_any_mode_give_one_frame(tmp_path, suffix, mode):
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (64, 48), "white").convert(mode).save(path)
    result = read_conditioning(path, 9, 48, 64)
    assert result.shape == (1, 3, 1, 48, 64)
    assert result.min() > 0.97


def test_sixteen_bit_images_are_scaled(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((16, 16), 128 * 256, np.uint16)).save(path)
    assert abs(read_conditioning(path, 1, 16, 16).mean().item()) < 0.01


def test_a_photo_taken_sideways_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right: the left half comes to the top
    picture.save(tmp_path / "photo.png", exif=exif)
    result = read_conditioning(tmp_path / "photo.png", 1, 64, 32)[0, 0, 0]
    assert result[:28].mean() > 0.9
    assert result[36:].mean() < -0.9


def test_an_image_far_from_the_shape_costs_no_memory(tmp_path):
    Image.new("RGB", (1, 10000)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="frames of 10000x1 are too long and narrow to cut 640x1024 out of"):
        read_conditioning(tmp_path / "line.png", 1, 640, 1024)
    Image.new("RGB", (800, 20)).save(tmp_path / "panorama.png")
    assert read_conditioning(tmp_path / "panorama.png", 1, 64, 128).shape == (1, 3, 1, 64, 128)


@pytest.mark.parametrize("name", ["image.png", "video.mp4"])
def test_missing_and_damaged_files_are_one_clear_error(tmp_path, name):
    with pytest.raises(ValueError, match=f"there is no file .*{name}"):
        read_conditioning(tmp_path / name, 1, 16, 16)
    if name == "image.png":
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    else:
        write_mp4(tmp_path / name, smooth_video(20), 24)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        read_conditioning(tmp_path / name, 1, 16, 16)
    (tmp_path / name).write_bytes(b"neither image nor video" * 50)
    with pytest.raises(ValueError, match=name):
        read_conditioning(tmp_path / name, 1, 16, 16)
