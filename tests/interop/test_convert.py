"""Folders of `transformers` in and out: the same numbers, the same names, the same logits, one shard in memory."""

import dataclasses
import functools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, GOLDEN, rows_of
from folders import BFLOAT16, make_folder, read_folder, weights_of
from live import reference_python

from stackwise_jax import convert
from stackwise_jax.config import resolve
from stackwise_jax.data.json_tokenizer import JsonTokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.evaluate import evaluate
from stackwise_jax.fuse import fused_config
from stackwise_jax.generate.texts import continue_texts
from stackwise_jax.interop import huggingface
from stackwise_jax.interop.shards import plan_shards, write_shards
from stackwise_jax.interop.tokenizer_files import sentencepiece_as_json
from stackwise_jax.models.rack import apply_rack, output_table, row_context
from stackwise_jax.schema import ModelConfig
from stackwise_jax.train import loop
from stackwise_jax.train.sources import given_parts
from stackwise_jax.train.trained import Trained, load_trained

SHORT = {"training__embedding_phase": "with_first_stack", "training__phase_budget": "2 steps", "evaluation__rows": 8}
NAMES = ("bert", "bert_untied_tanh", "modernbert", "gpt2", "llama3_grouped")


def run_convert(source: Path, target: Path, **flags: Any) -> None:
    options = convert.make_options()
    given = {"from": source, "to": target, **flags}
    options(["convert", *(f"--{name}={value}" for name, value in given.items())])
    convert.main(options)


def logits_of(trained: Trained, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray, types: Any) -> Any:
    return np.asarray(jitted_logits(trained.rack, tokens, segments, positions, types, trained.model))


@functools.partial(jax.jit, static_argnums=5)
def jitted_logits(rack: Any, tokens: Any, segments: Any, positions: Any, types: Any, model: ModelConfig) -> Any:
    context = row_context(model, segments, positions)
    hidden = apply_rack(rack, tokens, context, model, dtype=jnp.float32, token_types=types)
    return hidden @ output_table(rack["head"], rack["embedding"]).T


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_goes_in_and_comes_out(name: str, tmp_path: Path):
    """In, the logits are those of transformers; out, every array is the one that went in."""
    source = make_folder(tmp_path / "hf", name)
    run_convert(source, tmp_path / "run")
    trained, rows = load_trained(tmp_path / "run"), rows_of(CASES[name])
    assert trained.finished
    ours = logits_of(trained, rows.tokens, rows.segments, rows.positions, rows.token_types)
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        assert np.abs(ours - golden["logits"])[rows.segments > 0].max() < 1e-4
    run_convert(tmp_path / "run", tmp_path / "out")
    before, after = weights_of(name), read_folder(tmp_path / "out")
    if name == "bert_untied_tanh":  # a second name that transformers keeps and never reads
        np.testing.assert_array_equal(after.pop("cls.predictions.bias"), before["cls.predictions.decoder.bias"])
    assert before.keys() == after.keys()
    for weight, array in before.items():
        np.testing.assert_array_equal(after[weight], array, err_msg=weight)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize(("dtype", "trunk"), [(BFLOAT16, "bf16"), (np.float16, "fp16")])
def test_shards_of_16_bits_come_back_bit_for_bit(dtype: Any, trunk: str, tmp_path: Path):
    run_convert(make_folder(tmp_path / "hf", "llama3_grouped", n_shards=3, dtype=dtype), tmp_path / "run")
    assert load_trained(tmp_path / "run").config.precision.trunk == trunk
    run_convert(tmp_path / "run", tmp_path / "out", shard_gb=1.5e-5)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 17_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before, after = weights_of("llama3_grouped", dtype), read_folder(tmp_path / "out")
    assert before.keys() == after.keys() == index["weight_map"].keys()
    for weight, array in before.items():
        assert (after[weight].dtype, after[weight].tobytes()) == (array.dtype, array.tobytes())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == np.dtype(dtype).name


def test_published_names_are_understood(tmp_path: Path):
    """BERT with gamma, beta, the pooler and the other task; GPT-2 without its prefix, with its masks."""
    bert = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): a for name, a in weights_of("bert").items()}
    bert |= {"bert.pooler.dense.weight": np.ones((32, 32), np.float32), "cls.seq_relationship.bias": np.ones(2)}
    bert["cls.predictions.decoder.weight"] = bert["bert.embeddings.word_embeddings.weight"]
    gpt2 = {name.removeprefix("transformer."): array for name, array in weights_of("gpt2").items()}
    gpt2["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.float32)
    for name, weights in (("bert", bert), ("gpt2", gpt2)):
        said: list[str] = []
        source = make_folder(tmp_path / name, name, weights=weights)
        huggingface.import_folder(source, tmp_path / f"{name}_run", said.append)
        assert sum("left out" in line for line in said) == (2 if name == "bert" else 0)
        plain = make_folder(tmp_path / f"{name}_plain", name)
        huggingface.import_folder(plain, tmp_path / f"{name}_plain_run", said.append)
        one, other = ((tmp_path / f"{name}{kind}_run" / "stacks") for kind in ("", "_plain"))
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}  # names hold digests


def test_an_imported_run_is_read_by_the_programs(tmp_path: Path):
    run_convert(make_folder(tmp_path / "hf", "gpt2"), tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    (tmp_path / "text.txt").write_text("the cat and the dogs " * 20)
    measured = evaluate(trained, source=str(tmp_path / "text.txt"), rows=4)
    assert measured["tokens"] > 50
    assert np.isfinite(measured["bits_per_byte"])
    generation = dataclasses.replace(trained.config.generation, tokens=4, temperature=0.0)
    config = dataclasses.replace(trained.config, generation=generation)
    samples = continue_texts(trained.rack, config, trained.tokenizer, ["the cat "], seed=0)
    assert samples.rows[0].text.startswith("the cat ")


@pytest.fixture(scope="module")
def our_run(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA shape, trained by us with our SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    loop.run(tiny(training__mode="layerwise", **SHORT), tiny_corpus, folder, say=lambda _: None)
    return folder


def test_what_we_trained_goes_out_and_comes_in(our_run: Path, tmp_path: Path):
    run_convert(our_run, tmp_path / "out")
    run_convert(tmp_path / "out", tmp_path / "back")
    ours, back = load_trained(our_run), load_trained(tmp_path / "back")
    names = [{path.name for path in (run / "stacks").iterdir()} for run in (our_run, tmp_path / "back")]
    assert names[1] <= names[0]  # the parts, by digest, but for the taps
    assert back.tokenizer.digest == ours.tokenizer.digest
    model = dataclasses.replace(back.model, attention_implementation=ours.model.attention_implementation)
    assert model == ours.model


def without_adapters(run: Path) -> Iterator[Any]:
    finished = huggingface.open_finished(run)
    assert finished.references["adapters"]
    return (jax.tree.map(jnp.asarray, finished.read("stacks", name)) for name in finished.references["stacks"])


def test_quantised_stacks_adapters_and_a_head_that_was_untied_go_out(tiny: Any, tiny_corpus: Any, tmp_path: Path):
    """Two blocks a stack, in nf4 and the first with an adapter; they come back as what they stood for, one a stack."""
    fields = {"model__architecture__n_stacks": 2, "model__architecture__blocks_per_stack": 2, "precision__trunk": "nf4"}
    fields |= {"training__mode": "progressive", "training__progressive__trunk_strategy": "qlora"}
    fields |= SHORT
    config = tiny(model__ties_embedding=True, training__head="copy", optimizer__learning_rate=1e-2, **fields)
    loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    run_convert(tmp_path / "run", tmp_path / "out", dtype="float32")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    run_convert(tmp_path / "out", tmp_path / "back")
    tokens = np.random.default_rng(1).integers(7, 320, (2, 32)).astype(np.int32)
    rows = (np.ones_like(tokens), np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape), np.zeros_like(tokens))
    trained = load_trained(tmp_path / "run")
    ours, back = (logits_of(own, tokens, *rows) for own in (trained, load_trained(tmp_path / "back")))
    np.testing.assert_allclose(ours, back, rtol=1e-4, atol=1e-5)
    plain = dataclasses.replace(trained, rack={**trained.rack, "stacks": list(without_adapters(tmp_path / "run"))})
    assert np.abs(logits_of(plain, tokens, *rows) - back).max() > 1e-3


def test_a_tokenizer_of_ours_is_written_as_json(our_run: Path, tiny_text: Path):
    own = load_trained(our_run).tokenizer
    other = JsonTokenizer(sentencepiece_as_json(own))
    texts = [path.read_text() for path in sorted(tiny_text.iterdir())[:3]]
    for text in [*texts, " \n\n  two  spaces\ttab\r\n 12 caf\u00e9 \u6f22\U0001f642 x\x00y [MASK] </s>"]:
        assert other.encode(text).tolist() == own.encode(text).tolist()
        assert other.decode(other.encode(text)) == text
    assert other.named == {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}


@pytest.mark.parametrize("name", [*NAMES, "ours"])
def test_transformers_loads_what_we_write(name: str, our_run: Path, tmp_path: Path):
    python = reference_python()
    if name == "ours":
        run = our_run
    else:
        run = tmp_path / "run"
        run_convert(make_folder(tmp_path / "hf", name), run)
        (run / "tokenizer_files" / "tokenizer_config.json").unlink()  # so that the one we would write is read
    run_convert(run, tmp_path / "out")
    trained, text = load_trained(run), "the cats and the dog\n"
    tokens = np.random.default_rng(1).integers(5, min(96, trained.model.vocab_size), (2, 24)).astype(np.int32)
    np.savez(tmp_path / "in.npz", tokens=tokens, text=np.array(text))
    script = Path(__file__).with_name("load_folder.py")
    command = [python, str(script), str(tmp_path / "out"), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, capture_output=True)
    places = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    ours = logits_of(trained, tokens, np.ones_like(tokens), places, np.zeros_like(tokens))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as theirs:
        assert json.loads(str(theirs["faults"])) == {}
        assert np.abs(ours - theirs["logits"]).max() < 1e-4
        assert theirs["ids"].tolist() == trained.tokenizer.encode(text).tolist()
        assert theirs["special"].tolist() == [trained.tokenizer.bos_id, trained.tokenizer.eos_id]


def test_one_shard_is_held_at_a_time(tmp_path: Path):
    """An array is asked for when every shard before its own is on the disk."""
    sizes = [(f"w{i}", 400) for i in range(7)]
    written: list[int] = []

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, _ in sizes:
            written.append(len(list(tmp_path.glob("*.safetensors"))))
            yield name, np.ones(100, np.float32)

    assert len(write_shards(tmp_path, arrays(), sizes, 900)) == 4
    assert written == [0, 0, 1, 1, 2, 2, 3]
    assert plan_shards(sizes[:3], 100) == [["w0"], ["w1"], ["w2"]]
    with pytest.raises(ValueError, match="w0 of 400 bytes came where w1"):
        write_shards(tmp_path, arrays(), sizes[1:], 900)


# --- refusals ---


def refusal(source: Path, target: Path, **flags: Any) -> str:
    with pytest.raises(UserError) as caught:
        run_convert(source, target, **flags)
    message = str(caught.value)
    assert "\n" not in message
    assert not (target / "config.json").exists() or target.name == "taken"
    return message


def test_pickles_are_refused(tmp_path: Path):
    source = make_folder(tmp_path / "hf", "gpt2")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    message = refusal(source, tmp_path / "run")
    assert "pytorch_model.bin is a pickle" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", 3])
def test_an_index_may_name_files_beside_it_alone(file: Any, tmp_path: Path):
    source = make_folder(tmp_path / "hf", "gpt2", n_shards=2)
    index = {"weight_map": {"transformer.wte.weight": file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no safetensors file beside it" in refusal(source, tmp_path / "run")


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    weights = weights_of("gpt2")
    fewer = {name: array for name, array in weights.items() if name != "transformer.h.1.ln_2.bias"}
    more = {**weights, "transformer.h.2.ln_1.bias": np.ones(32, np.float32)}
    other = {**weights, "transformer.wpe.weight": np.ones((23, 32), np.float32)}
    untied = {**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1}
    expected = {
        "fewer": (fewer, "lack transformer.h.1.ln_2.bias"),
        "more": (more, "no place for: transformer.h.2.ln_1.bias"),
        "other": (other, "transformer.wpe.weight has shape [23, 32]"),
        "untied": (untied, "lm_head.weight differs from transformer.wte.weight"),
    }
    for name, (arrays, words) in expected.items():
        source = make_folder(tmp_path / name, "gpt2", weights=arrays)
        assert words in refusal(source, tmp_path / "run")
    integers = {**weights, "transformer.h.0.ln_1.bias": np.ones(32, np.int64)}
    assert "is I64" in refusal(make_folder(tmp_path / "integers", "gpt2", weights=integers), tmp_path / "run")


def test_damaged_files_are_refused(tmp_path: Path):
    source = make_folder(tmp_path / "hf", "gpt2")
    content = (source / "model.safetensors").read_bytes()
    for damaged in (b"", content[:100], b"\xff" * 8 + content[8:], content[:-10]):
        (source / "model.safetensors").write_bytes(damaged)
        assert "not a sound safetensors file" in refusal(source, tmp_path / "run")
    (source / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(source, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "entries", "words"),
    [
        ("gpt2", {"model_type": "t5"}, "model_type='t5'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"activation_function": "relu"}, "activation 'relu'"),
        ("llama2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ("llama2", {"mlp_bias": True}, "attention_bias and mlp_bias"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("modernbert", {"layer_types": ["sliding_attention"] * 4 + ["full_attention"]}, "layer_types"),
        ("modernbert", {"vocab_size": 20}, "36 pieces"),
        ("llama2", {"rope_theta": "far"}, "of another type"),
        ("llama2", {"rope_scaling": "yarn"}, "of another type"),
        ("llama2", {"max_position_embeddings": None}, "None positions"),
        ("llama2", {"hidden_size": "wide"}, "model.d_model='wide'"),
    ],
)
def test_configs_that_we_lack_are_refused(name: str, entries: dict[str, Any], words: str, tmp_path: Path):
    source = make_folder(tmp_path / "hf", name)
    (source / "config.json").write_text(json.dumps({**CASES[name].config, **entries}))
    assert words in refusal(source, tmp_path / "run")


def test_folders_that_are_not_what_they_should_be(our_run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal(tmp_path / "empty", tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    assert "exists" in refusal(our_run, tmp_path / "taken")
    source = make_folder(tmp_path / "hf", "gpt2")
    (source / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(source, tmp_path / "run")


def test_a_model_without_a_family_is_refused(our_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = huggingface.open_finished(our_run)
    model = dataclasses.replace(opened.config.model, ffn="geglu", positions="none")
    other = dataclasses.replace(opened, config=dataclasses.replace(opened.config, model=model))
    monkeypatch.setattr(huggingface, "open_finished", lambda _: other)
    message = refusal(our_run, tmp_path / "out")
    assert "nearest is llama, which needs model.ffn='swiglu', not 'geglu', model.positions='rotary'" in message


def test_a_converted_folder_is_a_source_of_stacks_and_of_a_table(tmp_path: Path):
    """Its blocks follow one another as a fused rack's stacks, and its token table alone is another run's start."""
    source = make_folder(tmp_path / "hf", "llama3_grouped")
    run_convert(source, tmp_path / "run")
    run, trained = str(tmp_path / "run"), load_trained(tmp_path / "run", merged=False)
    config, tokenizer = fused_config([run], "all", "", [], name="fused"), trained.tokenizer
    parts = {(kind, name): tree for kind, name, tree in given_parts(config, tokenizer, lambda _: None)}
    for number, stack in enumerate(trained.rack["stacks"]):
        jax.tree.map(np.testing.assert_array_equal, parts["stacks", str(number)], stack)
    model = {"vocab_size": config.model.vocab_size, "d_model": config.model.d_model, "n_heads": 2}
    other = resolve({"model": model, "training": {"embedding_from": run, "embedding_phase": "given"}})
    (kind, _, embedding), *rest = given_parts(other, tokenizer, lambda _: None)
    assert (kind, rest) == ("embedding", [])
    np.testing.assert_array_equal(embedding["tokens"], weights_of("llama3_grouped")["model.embed_tokens.weight"])
    theirs = dataclasses.replace(other, training=dataclasses.replace(other.training, embedding_from=str(source)))
    with pytest.raises(UserError, match=r"stackwise_jax\.convert --from="):
        list(given_parts(theirs, tokenizer, lambda _: None))
