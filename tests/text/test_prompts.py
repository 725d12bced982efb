"""Where prompts are looked for, which videos have none, and the errors for a wrong file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.text.prompts import find_prompts


def test_a_text_file_beside_each_video(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.b.txt").write_text(" A robot\nlifts a box. \n")
    (tmp_path / "below" / "c.txt").write_text("Grüße", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    paths = {name: str(tmp_path / name) for name in ("a.b.mp4", "below/c.MP4", "d.mp4", "empty.mp4", "binary.mp4")}
    found = find_prompts(list(paths.values()), None)
    assert found.by_path == {paths["a.b.mp4"]: "A robot\nlifts a box.", paths["below/c.MP4"]: "Grüße"}
    assert found.missing == {
        paths["d.mp4"]: f"has no prompt ({tmp_path / 'd.txt'} does not exist)",
        paths["empty.mp4"]: f"has an empty prompt ({tmp_path / 'empty.txt'})",
        paths["binary.mp4"]: f"has no prompt ({tmp_path / 'binary.txt'} is not UTF-8 text)",
    }
    with pytest.raises(ValueError, match=r"none of the 2 videos has a prompt; the first, .*d\.mp4, has no prompt \("):
        find_prompts([paths["d.mp4"], paths["empty.mp4"]], None)


@given(
    prompts=st.dictionaries(
        st.text("abc /._", min_size=1, max_size=6).filter(lambda name: name.strip("/. ")),
        st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
        min_size=1,
        max_size=5,
    )
)
def test_one_file_for_all(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "lists").mkdir()
    by_path = {str((folder / "lists" / name.lstrip("/")).absolute()): text for name, text in prompts.items()}
    lines = [json.dumps({"visual_input": path, "prompt": text, "more": 1}) for path, text in by_path.items()]
    (folder / "lists" / "all.jsonl").write_text("\n\n".join(lines) + "\n")
    try:
        found = find_prompts([*by_path, str(folder / "other.mp4")], str(folder / "lists" / "all.jsonl"))
    except ValueError as error:  # two spellings of one path
        assert "has a prompt already; keep one line of it" in str(error)
        return
    assert found.by_path == {path: text.strip() for path, text in by_path.items()}
    assert found.missing == {str(folder / "other.mp4"): f"has no prompt in {folder / 'lists' / 'all.jsonl'}"}


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.jsonl").write_text('{"visual_input": "../videos/a.mp4", "prompt": "rain"}\n')
    assert find_prompts(["videos/a.mp4"], "lists/all.jsonl").by_path == {"videos/a.mp4": "rain"}
    with pytest.raises(ValueError, match=r"the first, a\.mp4, has no prompt in lists"):
        find_prompts(["a.mp4"], "lists/all.jsonl")


WRONG = (
    "rain",
    '{"visual_input": "b.mp4"}',
    '{"visual_input": 1, "prompt": "rain"}',
    "[]",
    '{"visual_input": "b.mp4", "prompt": "\\ud800"}',
)


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_named(tmp_path, line):
    (tmp_path / "all.jsonl").write_text('{"visual_input": "a.mp4", "prompt": "rain"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r'all\.jsonl, line 2: must be {"visual_input": PATH, "prompt": TEXT}, not '):
        find_prompts(["a.mp4"], str(tmp_path / "all.jsonl"))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"data\.prompts=.*nowhere cannot be read \(No such file or directory\)"):
        find_prompts(["a.mp4"], str(tmp_path / "nowhere"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        find_prompts(["a.mp4"], str(tmp_path / "binary"))


def test_folders_may_be_links(tmp_path):
    (tmp_path / "disk" / "videos").mkdir(parents=True)
    (tmp_path / "datasets").symlink_to("disk")
    (tmp_path / "disk" / "all.jsonl").write_text('{"visual_input": "videos/a.mp4", "prompt": "rain"}\n')
    path = str(tmp_path / "datasets" / "videos" / "a.mp4")
    assert find_prompts([path], str(tmp_path / "disk" / "all.jsonl")).by_path == {path: "rain"}


def test_an_empty_prompt_in_a_file_is_said(tmp_path):
    lines = [{"visual_input": "a.mp4", "prompt": "rain"}, {"visual_input": "b.mp4", "prompt": " "}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    a, b, c = (str(tmp_path / f"{name}.mp4") for name in "abc")
    assert find_prompts([a, b, c], str(tmp_path / "all.jsonl")).missing == {
        b: f"has an empty prompt in {tmp_path / 'all.jsonl'}",
        c: f"has no prompt in {tmp_path / 'all.jsonl'}",
    }
