"""Conversion from files to files: the same result as in memory, whatever happens on the way."""

import os
import signal
import subprocess
import sys
from collections import namedtuple

import jax
import numpy as np
import pytest
from conftest import write_checkpoint
from filelock import FileLock
from tiny_models import VARIANTS, state_dict

import convert
import fireq_jax
from convert.folder import staging_path

CALIBRATION = np.random.default_rng(5).integers(0, 131, 200)
HEADS = [
    fireq_jax.Recipe(lm_head="int4", group_size=32),
    fireq_jax.Recipe(lm_head="fp8"),
    fireq_jax.Recipe(lm_head="int8"),
]
RECIPES = ["rtn", "kv4", "data_free", "fireq", "best", *HEADS]


def in_memory(source, recipe):
    model, params = convert.load(source)
    calibration = None
    if fireq_jax.config.resolve_recipe(recipe).needs_calibration:
        calibration = fireq_jax.calibrate(model, params, CALIBRATION)
    return model, fireq_jax.quantize(params, recipe, calibration=calibration)


def assert_holds(folder, model, params):
    """The folder loads as this model, and nothing but the folder is left."""
    found, restored = convert.load(folder)
    assert found == model
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
    assert all(path.suffix in (".safetensors", ".json") and not path.name.startswith(".") for path in folder.iterdir())


@pytest.mark.parametrize("variant", ["llama3", "smollm2"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_result_is_that_of_quantize(tmp_path, variant, recipe):
    source = write_checkpoint(tmp_path / "in", VARIANTS[variant])
    seen = []
    sizes = convert.quantize_checkpoint(
        source, tmp_path / "out", recipe, tokens=CALIBRATION, progress=lambda *shards: seen.append(shards)
    )
    model, params = in_memory(source, recipe)
    assert_holds(tmp_path / "out", model, params)
    assert seen == [(i, 4) for i in range(5)]
    assert sizes == (fireq_jax.parameter_bytes(convert.load(source)[1]), fireq_jax.parameter_bytes(params))


class InterruptionError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("recipe", ["data_free", "best"])
@pytest.mark.parametrize("shards", [0, 1, 2, 3, 4])
def test_an_interrupted_conversion_goes_on(tmp_path, recipe, shards):
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])

    def interrupt(done, _):
        if done == shards:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        convert.quantize_checkpoint(source, tmp_path / "out", recipe, tokens=CALIBRATION, progress=interrupt)
    assert not (tmp_path / "out").exists()
    written = {p.name: p.stat().st_ino for p in staging_path(tmp_path / "out").glob("model-*.safetensors")}
    assert len(written) == shards
    convert.quantize_checkpoint(source, tmp_path / "out", recipe, tokens=CALIBRATION)
    assert_holds(tmp_path / "out", *in_memory(source, recipe))
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("model-*.safetensors")}
    # The last shard has no successor to tell that it is whole, so it is made again.
    assert all(kept[name] == inode for name, inode in written.items() if not name.startswith("model-00004"))


def test_a_crash_between_a_block_and_its_hidden_states_repeats_the_block(tmp_path, monkeypatch):
    import convert.streaming as module

    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])
    write = module.write_file

    def crash(path, arrays, metadata):
        if metadata == {"blocks": "2"}:
            raise InterruptionError
        write(path, arrays, metadata)

    monkeypatch.setattr(module, "write_file", crash)
    with pytest.raises(InterruptionError):
        convert.quantize_checkpoint(source, tmp_path / "out", "best", tokens=CALIBRATION)
    monkeypatch.undo()
    convert.quantize_checkpoint(source, tmp_path / "out", "best", tokens=CALIBRATION)
    assert_holds(tmp_path / "out", *in_memory(source, "best"))


def test_a_killed_process_leaves_the_old_checkpoint_and_can_be_gone_on_with(tmp_path):
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])
    convert.quantize_checkpoint(source, tmp_path / "out", "rtn")
    script = (
        "import convert, os, signal\n"
        "def kill(done, _):\n"
        "    if done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert.quantize_checkpoint({str(source)!r}, {str(tmp_path / 'out')!r}, overwrite=True, progress=kill)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert fireq_jax.recipe_of(convert.load(tmp_path / "out")[1]).name == "rtn"
    first = staging_path(tmp_path / "out") / "model-00001-of-00004.safetensors"
    inode = first.stat().st_ino
    convert.quantize_checkpoint(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / first.name).stat().st_ino == inode
    assert_holds(tmp_path / "out", *in_memory(source, "data_free"))


def test_an_interrupted_conversion_with_other_arguments_is_not_mixed_in(tmp_path):
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])

    def interrupt(done, _):
        if done == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        convert.quantize_checkpoint(source, tmp_path / "out", "rtn", progress=interrupt)
    with pytest.raises(
        ValueError, match="unfinished conversion with another recipe; finish it .* or pass restart=True"
    ):
        convert.quantize_checkpoint(source, tmp_path / "out", "data_free")
    other = state_dict(VARIANTS["llama3"], seed=1)
    write_checkpoint(source, VARIANTS["llama3"], other)  # another model under the same name
    with pytest.raises(ValueError, match="unfinished conversion with another source"):
        convert.quantize_checkpoint(source, tmp_path / "out", "rtn")
    convert.quantize_checkpoint(source, tmp_path / "out", "data_free", restart=True)
    assert_holds(tmp_path / "out", *in_memory(source, "data_free"))


def test_two_processes_do_not_write_the_same_folder(tmp_path, tiny):
    staging = staging_path(tmp_path / "out")
    staging.mkdir()
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])
    with FileLock(staging / ".lock"):
        with pytest.raises(BlockingIOError, match="another process is writing .*out"):
            convert.quantize_checkpoint(source, tmp_path / "out")
        with pytest.raises(BlockingIOError, match="another process is writing .*out"):
            convert.save(tmp_path / "out", *tiny)
    convert.save(tmp_path / "out", *tiny)


def test_what_an_interrupted_exchange_left_is_put_back(tmp_path, tiny):
    convert.save(tmp_path / "out", *tiny)
    (tmp_path / "out").rename(tmp_path / ".out.old")  # where a crash between two renames leaves it
    with pytest.raises(FileExistsError):
        convert.save(tmp_path / "out", *tiny)
    assert_holds(tmp_path / "out", *tiny)


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(OSError, match=r"has 1,000 bytes free, the checkpoint needs [\d,]+ more"):
        convert.quantize_checkpoint(source, tmp_path / "out")


def test_gguf_files_are_converted(tmp_path, monkeypatch):
    from test_convert import write_gguf

    import convert.streaming as module

    write_gguf(tmp_path / "tiny.gguf", VARIANTS["llama3"])
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model=None is not supported"):
        convert.quantize_checkpoint(tmp_path / "tiny.gguf", tmp_path / "out")
    monkeypatch.setattr(module, "copy_tokenizer", lambda *_: None)  # this file has none
    convert.quantize_checkpoint(tmp_path / "tiny.gguf", tmp_path / "out")
    assert_holds(tmp_path / "out", *in_memory(tmp_path / "tiny.gguf", "data_free"))


def test_tokenizer_files_are_copied_as_they_are(tmp_path, smollm2_tokenizer):
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])
    smollm2_tokenizer.save_pretrained(source)
    convert.quantize_checkpoint(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    text = "The quick brown fox"
    assert convert.load_tokenizer(tmp_path / "out")(text)["input_ids"] == smollm2_tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("learned", {"tokens": CALIBRATION}, "'learned' differentiates the whole model"),
        ("best", {}, "'best' needs tokens to calibrate on"),
        ("best", {"tokens": CALIBRATION, "window": 65}, "window=65 must be between 1 and the model's 64 positions"),
        (fireq_jax.Recipe(group_size=128), {}, r"k=64 is not divisible by group_size=128; it is by 64"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path, recipe, arguments, message):
    source = write_checkpoint(tmp_path / "in", VARIANTS["llama3"])
    with pytest.raises(ValueError, match=message):
        convert.quantize_checkpoint(source, tmp_path / "out", recipe, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_quantised_sources_are_refused(tmp_path, tiny):
    convert.save(tmp_path / "int4", tiny[0], fireq_jax.quantize(tiny[1], "rtn"))
    with pytest.raises(ValueError, match="int4 is quantised already; quantise the float model"):
        convert.quantize_checkpoint(tmp_path / "int4", tmp_path / "out")


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """The peak of a process that converts 12 blocks of 24 MB is that of one that converts 2."""
    conversion = "convert.quantize_checkpoint(sys.argv[1], sys.argv[1] + '-int4')"
    peaks = [peak(conversion, write_blocks(tmp_path / f"in{blocks}", blocks)) for blocks in (2, 12)]
    # The allocator keeps some freed memory; ten blocks that were not freed would be 240 MB and more.
    assert peaks[1] - peaks[0] < 2 * BLOCK


def test_a_loaded_model_is_in_memory_once(tmp_path):
    """Twelve blocks more take the memory of twelve blocks: no second copy, and no file pages that stay."""
    loading = "model = convert.load(sys.argv[1])"
    peaks = [peak(loading, write_blocks(tmp_path / f"in{blocks}", blocks)) for blocks in (2, 14)]
    assert 11.5 * BLOCK < peaks[1] - peaks[0] < 12.5 * BLOCK


BLOCK = 24_121_344


def write_blocks(folder, blocks):
    sizes = {"vocab_size": 256, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8}
    config = VARIANTS["llama3"] | sizes | {"num_hidden_layers": blocks}
    weights = {name: x.astype(np.float16) for name, x in state_dict(config).items()}
    assert sum(x.nbytes for name, x in weights.items() if "layers.0." in name) == BLOCK
    return write_checkpoint(folder, config, weights)


def peak(statement, *arguments):
    """Bytes of memory that a process which runs a statement holds at most."""
    # ru_maxrss would be that of this process, which started it, if it was larger.
    script = (
        f"import convert, re, sys\n{statement}\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    # One arena: how much freed memory glibc keeps in those of XLA's threads is chance, up to two blocks here.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(command, capture_output=True, check=True, env=environment)
    return 1024 * int(ran.stdout)
