"""Model cards and uploads, against a stand-in of the hub that keeps files where huggingface_hub caches downloads."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import write_checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from tiny_models import TOKENS, VARIANTS

import convert
import fireq_jax
from fireq_jax import cli


class StandIn:
    """Repositories as snapshots in a download cache; a commit is the upload's number."""

    cache: Path

    def __init__(self, token=None, library_name=None):
        assert library_name == "fireq-jax"

    def _folder(self, repo_id):
        return self.cache / f"models--{repo_id.replace('/', '--')}"

    def create_repo(self, repo_id, *, private, exist_ok):
        (self._folder(repo_id) / "refs").mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id, *, branch, exist_ok):
        head = self._folder(repo_id) / "refs" / "main"
        (self._folder(repo_id) / "refs" / branch).write_text(head.read_text() if head.exists() else "")

    def upload_folder(
        self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message, revision, create_pr
    ):
        ref = self._folder(repo_id) / "refs" / (revision or "main")
        snapshots = self._folder(repo_id) / "snapshots"
        files = {}
        if ref.exists() and ref.read_text():
            old = {p.name: p.read_bytes() for p in (snapshots / ref.read_text()).iterdir()}
            dropped = set(filter_repo_objects(old, allow_patterns=delete_patterns))
            files = {name: data for name, data in old.items() if name not in dropped}
        new = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        files |= {
            n: (Path(folder_path) / n).read_bytes() for n in filter_repo_objects(new, allow_patterns=allow_patterns)
        }
        commit = f"{len(list(snapshots.glob('*'))):040d}"
        (snapshots / commit).mkdir(parents=True)
        for name, data in files.items():
            (snapshots / commit / name).write_bytes(data)
        ref.write_text(commit)
        assert commit_message
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/{commit}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub
    import huggingface_hub.constants as constants

    monkeypatch.setattr(StandIn, "cache", tmp_path / "hub", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_every_revision_of_a_pushed_checkpoint_can_be_loaded(tmp_path, tiny, hub, monkeypatch):
    import convert.shards as shards

    model, params = tiny
    first, second = fireq_jax.quantize(params, "rtn"), fireq_jax.quantize(params)
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    convert.save(tmp_path / "out", model, first)
    (tmp_path / "out" / "notes.bin").write_bytes(b"not for the hub")
    address = convert.push_to_hub(tmp_path / "out", "org/tiny", private=True)
    assert address == f"hub/org/tiny/commit/{0:040d}"
    monkeypatch.setattr(shards, "SHARD_BYTES", 10**9)
    convert.save(tmp_path / "out", model, second, overwrite=True)
    convert.push_to_hub(tmp_path / "out", "org/tiny", revision="searched")
    assert_same(convert.load("org/tiny")[1], first)
    assert_same(convert.load("org/tiny", revision="searched")[1], second)
    assert_same(convert.load("org/tiny", revision=f"{0:040d}")[1], first)
    snapshot = hub / "models--org--tiny" / "snapshots" / f"{1:040d}"
    assert [p.name for p in snapshot.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (snapshot / "notes.bin").exists()


def test_the_card_has_the_measured_numbers_of_its_checkpoint(tmp_path, tiny):
    model, params = tiny
    quantized = fireq_jax.quantize(params)
    convert.save(tmp_path / "out", model, quantized)
    score = fireq_jax.evaluate(model, quantized, TOKENS.reshape(-1), reference=params, window=11)
    measured = score.to_dict() | {"checkpoint_id": convert.checkpoint_id(tmp_path / "out")}
    path = convert.write_model_card(
        tmp_path / "out", "org/tiny", evaluations={"tokens": measured}, base_model="org/base", license="apache-2.0"
    )
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "fireq-jax",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["jax", "int4", "fp8", "quantized", "fireq"],
    }
    text = " ".join(card.text.split())
    assert f"| tokens | 20 | 11 | {score.perplexity:.3f} | {score.reference_perplexity:.3f} | {score.kl:.4f} |" in text
    assert f"{(tmp_path / 'out' / 'model.safetensors').stat().st_size:,} bytes in 1 safetensors file" in text
    assert "| rounding | search |" in text
    assert "self_attn.q_proj: 64" in text
    assert 'convert.load("org/tiny")' in text

    convert.save(tmp_path / "other", model, fireq_jax.quantize(params, "rtn"))
    with pytest.raises(ValueError, match="the evaluation on 'tokens' is one of checkpoint"):
        convert.write_model_card(tmp_path / "other", "org/tiny", evaluations={"tokens": measured})
    unmeasured = convert.write_model_card(tmp_path / "other", "org/tiny")
    assert "Not measured yet" in unmeasured.read_text()


def test_only_whole_checkpoints_are_uploaded(tmp_path, tiny, hub):
    model, params = tiny
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        convert.push_to_hub(tmp_path / "nowhere", "org/tiny")
    with pytest.raises(ValueError, match="is no checkpoint of fireq-jax; quantise it first"):
        convert.push_to_hub(write_checkpoint(tmp_path / "in", VARIANTS["llama3"]), "org/tiny")
    convert.save(tmp_path / "out", model, fireq_jax.quantize(params, "rtn"))
    other = tmp_path / "other"
    convert.save(other, model, fireq_jax.quantize(params, "rtn"))
    (other / "model.safetensors").replace(tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="files of two checkpoints are mixed"):
        convert.push_to_hub(tmp_path / "out", "org/tiny")
    assert not hub.exists()


@pytest.mark.smollm2
def test_quantize_evaluate_export_and_push_at_the_shell(tmp_path, hub, monkeypatch, capsys, smollm2_tokenizer):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fireq-jax", *map(str, arguments)])
        with contextlib.suppress(SystemExit):  # of code 0; an error says so on standard error
            cli.main()
        captured = capsys.readouterr()
        assert "error:" not in captured.err
        return captured.out

    config = VARIANTS["llama3"] | {"vocab_size": 49152, "max_position_embeddings": 512}
    source = write_checkpoint(tmp_path / "float", config)
    smollm2_tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 12)
    run("quantize", source, tmp_path / "int4", "--recipe", "data_free")
    score = tmp_path / "score.json"
    text = ("--text", tmp_path / "text.txt", "--window", 64)
    run("evaluate", "--model", tmp_path / "int4", "--reference", source, *text, "--json", score)
    assert json.loads(score.read_text())["kl"] > 0
    address = run("push", tmp_path / "int4", "org/tiny", "--evaluation", score, "--license", "mit")
    assert address.strip() == f"hub/org/tiny/commit/{0:040d}"
    card = (hub / "models--org--tiny" / "snapshots" / f"{0:040d}" / "README.md").read_text()
    assert "| text.txt |" in card
    out = run("generate", "--model", "org/tiny", "--revision", "main", "--prompt", "Once", "--max-new-tokens", 3)
    assert out.strip()
    run("export", tmp_path / "int4", tmp_path / "packed", "--activations", "none")
    assert convert.load(tmp_path / "packed")[0].config.vocab_size == 49152
