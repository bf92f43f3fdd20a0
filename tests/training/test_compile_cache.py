"""Where compiled programs are kept between processes, and where they are not."""

import os
import subprocess
import sys

import jax
import pytest
from jax._src.compilation_cache import decompress_executable

from tests import tiny_run
from tghmoe_jax.training import compile_cache

CODE = """
import jax
from tghmoe_jax.training import compile_cache
compile_cache.keep()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: x @ x + 3)(jax.numpy.ones((8, 8))).block_until_ready()
"""


def compiled(home, **environment) -> list[str]:
    """Names of the programs that a process keeps below `home`; it must not warn of any."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    own = {key: value for key, value in os.environ.items() if key not in unset}
    own |= {"HOME": str(home), "PYTHONPATH": str(tiny_run.ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", CODE], env=own, capture_output=True, text=True)
    assert done.returncode == 0 and "compilation cache" not in done.stderr, done.stderr
    return sorted(path.name for path in home.rglob("*-cache"))


def test_programs_are_kept_for_the_next_process_in_a_folder_of_the_user_alone(tmp_path):
    kept = compiled(tmp_path)
    assert kept and compiled(tmp_path) == kept, "the second process compiles nothing new"
    (folder,) = (tmp_path / ".cache" / "tghmoe_jax").iterdir()
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["elsewhere", ""])
def test_a_folder_that_the_environment_names_goes_first_and_an_empty_name_keeps_nothing(tmp_path, name):
    compiled(tmp_path, JAX_COMPILATION_CACHE_DIR=name and str(tmp_path / name))
    assert not (tmp_path / ".cache").exists()
    assert (tmp_path / "elsewhere").exists() == bool(name)


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert compiled(tmp_path) == []


def test_programs_that_were_cut_short_are_replaced(tmp_path):
    """By the next process, without a warning: cut, emptied, zeroed, or killed before jax noted the time of use."""
    kept = compiled(tmp_path)
    files = sorted(tmp_path.rglob("*-cache"))
    whole = [file.read_bytes() for file in files]
    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b))):
        for file, content in zip(files, whole, strict=True):
            file.write_bytes(damage(content))
        assert compiled(tmp_path) == kept
        assert all(len(decompress_executable(file.read_bytes())) > 4 for file in files)
    for file in tmp_path.rglob("*-atime"):
        file.unlink()
    assert compiled(tmp_path) == kept and len(list(tmp_path.rglob("*-atime"))) == len(kept)
    before = {file: file.stat().st_mtime_ns for file in files}
    assert compiled(tmp_path) == kept and before == {file: file.stat().st_mtime_ns for file in files}


def test_what_was_made_once_is_recalled_under_its_name_and_for_the_same_code(kept_programs, monkeypatch):
    made = iter([b"one", b"two", b"three"])
    for name, code, expected in (("a", "x", b"one"), ("a", "x", b"one"), ("b", "x", b"two"), ("a", "y", b"three")):
        monkeypatch.setattr(compile_cache, "_code", lambda code=code: code)
        assert compile_cache.recall(name, lambda: next(made)) == expected
    assert len(list(kept_programs.iterdir())) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: bytes(len(b)), lambda b: b + b"more"])
def test_what_is_damaged_is_made_again(kept_programs, damage):
    compile_cache.recall("a", lambda: b"first")
    (file,) = kept_programs.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compile_cache.recall("a", lambda: b"second") == compile_cache.recall("a", lambda: b"third") == b"second"


def test_what_was_used_longest_ago_makes_room(kept_programs, monkeypatch):
    monkeypatch.setattr(compile_cache, "_MOST_RECALLED", 2)
    for name in ("a", "b", "c"):
        compile_cache.recall(name, name.encode)
        for file in kept_programs.iterdir():  # each was written a minute after the one before
            os.utime(file, (os.stat(file).st_mtime - 60,) * 2)
    assert compile_cache.recall("c", lambda: b"new") == b"c" and compile_cache.recall("b", lambda: b"new") == b"b"
    assert compile_cache.recall("a", lambda: b"new") == b"new"


@pytest.mark.parametrize("place", [None, "", "gs://bucket/programs", "{file}/programs"])
def test_without_a_folder_everything_is_made_anew(kept_programs, tmp_path, place):
    (tmp_path / "file").write_text("no folder")
    jax.config.update("jax_compilation_cache_dir", place and place.format(file=tmp_path / "file"))
    assert [compile_cache.recall("a", lambda made=made: made) for made in (b"1", b"2")] == [b"1", b"2"]
