from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen3next_train.data.folders import Collection, collect_folder, collect_glob
from qwen3next_train.errors import DataError


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")


def names(found: Collection) -> list[str]:
    return [file.name for file in found.files]


def passed_over(found: Collection) -> dict[str, tuple[int, int]]:
    return {group.reason: (group.num_files, group.num_bytes) for group in found.passed_over}


def test_order_is_that_of_the_parts_of_names(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/z.txt", "a.txt", "a-1.txt", "a/b/c.txt")
    assert names(collect_folder(tmp_path)) == ["a/b/c.txt", "a/z.txt", "a-1.txt", "a.txt", "b.txt"]


def test_hidden_special_and_broken_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", ".b.txt", ".git/objects/c", ".git/d", "sub/.e")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    found = collect_folder(tmp_path)
    assert names(found) == ["a.txt"]
    assert passed_over(found) == {"hidden files": (4, 16), "broken links": (1, 0), "special files": (1, 0)}


def test_what_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "b.txt", "sub/c.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "b.txt")
    scan = os.scandir

    def no_permission(path: Path) -> object:
        if path.name == "sub":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", no_permission)
    found = collect_folder(tmp_path)
    assert names(found) == ["a.txt"]
    assert passed_over(found) == {"unreadable files": (1, 4), "unreadable folders": (1, 0)}


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/x.txt", "elsewhere/deep/y.txt", "corpus/a.txt")
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "single.txt").write_text("text")
    (tmp_path / "corpus/one.txt").symlink_to(tmp_path / "single.txt")
    found = collect_folder(tmp_path / "corpus")
    assert names(found) == ["a.txt", "linked/deep/y.txt", "linked/x.txt", "one.txt"]
    assert passed_over(found) == {}
    assert names(collect_glob(tmp_path / "corpus", ("**", "*.txt"))) == names(found)
    (tmp_path / "link-to-corpus").symlink_to(tmp_path / "corpus")
    assert names(collect_folder(tmp_path / "link-to-corpus")) == names(found)


def test_what_is_reached_twice_is_read_once_under_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, "z/x.txt", "z/y.txt")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "b.txt").symlink_to(tmp_path / "z/x.txt")
    found = collect_folder(tmp_path)
    found.pass_over_repeated()
    assert names(found) == ["z/x.txt", "z/y.txt"]
    assert passed_over(found) == {
        "links to files that are read already": (1, 4),
        "links to folders that are read already": (1, 0),
    }


def test_a_hard_link_is_read_once_under_its_first_name(tmp_path: Path) -> None:
    write(tmp_path, "m/x.txt", "y.txt")
    (tmp_path / "z.txt").hardlink_to(tmp_path / "m/x.txt")
    (tmp_path / "b.txt").hardlink_to(tmp_path / "m/x.txt")
    (tmp_path / "a.txt").symlink_to("m/x.txt")
    found = collect_folder(tmp_path)
    found.pass_over_repeated()
    assert names(found) == ["b.txt", "y.txt"]
    assert passed_over(found) == {"links to files that are read already": (3, 12)}
    assert found.passed_over[0].example == "a.txt"
    # What is not read under its other name is read under this one.
    found = collect_folder(tmp_path)
    found.pass_over_where(lambda file: "because" if file.name == "b.txt" else None)
    found.pass_over_repeated()
    assert names(found) == ["m/x.txt", "y.txt"]


def test_a_part_that_is_no_match_of_itself_is_a_name_where_there_is_one(tmp_path: Path) -> None:
    write(tmp_path, "data[1]/a[2].txt", "data[1]/a2.txt", "data1/b.txt", "s/data1/c.txt")
    assert names(collect_glob(tmp_path, ("data[1]", "*"))) == ["data[1]/a2.txt", "data[1]/a[2].txt"]
    assert names(collect_glob(tmp_path, ("data[1]", "a[2].txt"))) == ["data[1]/a[2].txt"]
    assert names(collect_glob(tmp_path / "s", ("data[1]", "*"))) == ["data1/c.txt"]
    assert names(collect_glob(tmp_path, ("**", "data[1]", "*"))) == [
        "data[1]/a2.txt",
        "data[1]/a[2].txt",
        "s/data1/c.txt",
    ]


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_cycles_are_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path, "corpus/sub/a.txt")
    (tmp_path / "corpus/sub/loop").symlink_to(target)
    for root in (tmp_path / "corpus", tmp_path):
        with pytest.raises(DataError, match=r"loop\S*: a link to .*, a folder that it lies in; remove the link"):
            collect_folder(root)
        with pytest.raises(DataError, match="remove the link"):
            collect_glob(root, ("**", "*.txt"))
    assert names(collect_glob(tmp_path / "corpus", ("*", "*.txt"))) == ["sub/a.txt"]


def test_two_links_at_each_other_end(tmp_path: Path) -> None:
    write(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a/to-b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to-a").symlink_to(tmp_path / "a")
    (tmp_path / "self.txt").symlink_to("self.txt")
    found = collect_folder(tmp_path)
    assert names(found) == ["a/x.txt", "b/y.txt"]
    assert passed_over(found) == {"broken links": (1, 0), "links to folders that are read already": (2, 0)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (("*.txt",), ["a.txt", "b.txt"]),
        (("[b]*",), ["b.txt"]),
        (("**", "*.txt"), ["a.txt", "b.txt", "s/c.txt", "s/t/d.txt"]),
        (("**",), ["a.txt", "b.txt", "s/c.txt", "s/t/d.txt"]),
        (("s", "**", "?.txt"), ["s/c.txt", "s/t/d.txt"]),
        (("**", "t", "**", "*.txt"), ["s/t/d.txt"]),
        (("*", "c.txt"), ["s/c.txt"]),
        ((".*",), [".e.txt"]),
        (("x*",), []),
    ],
)
def test_patterns_mean_what_a_shell_understands(tmp_path: Path, pattern: tuple[str, ...], expected: list[str]) -> None:
    write(tmp_path, "b.txt", "a.txt", "s/c.txt", "s/t/d.txt", ".e.txt", ".f/g.txt")
    assert [name for name in names(collect_glob(tmp_path, pattern)) if not name.startswith(".f")] == expected


def test_folder_that_a_pattern_names_is_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "sub/b.txt")
    found = collect_glob(tmp_path, ("*",))
    assert (names(found), passed_over(found)) == (["a.txt"], {"folders": (1, 0)})
