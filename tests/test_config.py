"""The validator: every refusal names the field, whatever is thrown at it is one line, and what is stored reads back."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax import config as config_lib
from stackwise_jax.checks.text import budget_steps, weighted_sources
from stackwise_jax.config import default, differences, from_json, resolve, to_json
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]


MASKED = {"objective__name": "mlm", "model__attention": "bidirectional"}


def edited(**fields: Any) -> dict[str, Any]:
    """The default config as a nested dict with `a__b=value` written at a.b."""
    entries = copy.deepcopy(dataclasses.asdict(RunConfig()))
    for name, value in fields.items():
        *sections, field = name.split("__")
        section = entries
        for part in sections:
            section = section[part]
        section[field] = value
    return entries


def refusal(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(edited(**fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_resolve_and_fill_in_what_is_derived():
    config = resolve(default())
    assert (config.model.n_kv_heads, config.model.d_head, config.model.max_positions) == (4, 32, 256)
    assert config.training.progressive.new_stack_precision == "fp32"
    assert config == resolve({}) == resolve(dataclasses.asdict(RunConfig()))


def test_resolving_twice_changes_nothing():
    config = resolve(edited(training__progressive__enabled=False, model__n_kv_heads=2))
    assert resolve(dataclasses.asdict(config)) == config


def test_default_is_locked_and_says_what_was_meant():
    config = default()
    with pytest.raises(AttributeError, match="d_model"):
        config.model.d_modle = 3
    with pytest.raises(TypeError):
        config.model.d_model = "wide"
    config.model.n_kv_heads = 2
    assert resolve(config).model.n_kv_heads == 2


def test_progressive_switched_off_is_end_to_end():
    assert resolve(edited(training__progressive__enabled=False)).training.mode == "end_to_end"
    assert not resolve(edited(training__mode="end_to_end")).training.progressive.enabled


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__d_modle": 3}, ["model.d_modle", 'Did you mean "d_model"']),
        ({"modle": {}}, ["modle", 'Did you mean "model"']),
        ({"model": 3}, ["model=3", "section"]),
        ({"model__d_model": "64"}, ["model.d_model='64'", "int"]),
        ({"model__d_model": True}, ["model.d_model=True", "int"]),
        ({"model__d_model": 64.0}, ["model.d_model=64.0", "int"]),
        ({"model__d_model": None}, ["model.d_model=None", "int"]),
        ({"model__use_bias": 1}, ["model.use_bias=1", "bool"]),
        ({"optimizer__learning_rate": math.nan}, ["optimizer.learning_rate=nan", "finite"]),
        ({"optimizer__learning_rate": -1.0}, ["optimizer.learning_rate=-1.0", "at least 0"]),
        ({"model__norm": "rmsnrom"}, ["model.norm='rmsnrom'", 'Did you mean "rmsnorm"']),
        ({"precision__cache": "fp16"}, ["precision.cache='fp16'", "fp32, bf16"]),
        ({"training__progressive__new_stack_precision": "nf4"}, ["new_stack_precision='nf4'", "fp16, fp8"]),
        ({"precision__compute": "fp8"}, ["precision.compute='fp8'", "fp32, bf16, fp16"]),
        ({"precision__trunk": "nf3"}, ["precision.trunk='nf3'", 'Did you mean "nf4"']),
        ({"precision__trunk": "nvfp4", "mesh__fsdp": 2}, ["precision.trunk='nvfp4'", "mesh.fsdp=2", "mesh.fsdp=1"]),
        ({"cache__tier": "disc"}, ["cache.tier='disc'", '"disk"']),
        ({"model__d_model": 130}, ["model.d_model=130", "n_heads=4"]),
        ({"model__n_kv_heads": 3}, ["model.n_heads=4", "n_kv_heads=3"]),
        ({"model__n_kv_heads": 0}, ["model.n_kv_heads=0", "at least 1"]),
        ({"model__d_model": 12}, ["model.d_head=3", "even"]),
        ({"model__positions": "learned", "model__max_positions": 8}, ["model.max_positions=8", "data.seq_len=256"]),
        ({"model__attention": "bidirectional"}, ["objective.name='clm'", "causal"]),
        ({"objective__name": "mlm", "objective__rate_min": 0.0, "objective__rate_max": 0.0}, ["objective.rate_max=0"]),
        ({"objective__rate_min": 0.5}, ["objective.rate_min=0.5", "objective.rate_max=0.15"]),
        ({"objective__rate_max": 1.5}, ["objective.rate_max=1.5", "between 0 and 1"]),
        ({"model__dropout": 1.0}, ["model.dropout=1.0", "below 1"]),
        ({"optimizer__beta2": 1.0}, ["optimizer.beta2=1.0", "below 1"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 2**32}, ["seed=4294967296", "2**32"]),
        ({"training__mode": "blockwise", "training__block_group": 3}, ["training.block_group=3", "4 blocks"]),
        ({"training__accumulation_steps": 3}, ["training.batch_size=16", "accumulation_steps=3"]),
        ({"training__head": "copy"}, ["training.head='copy'", "ties_embedding=True"]),
        ({"precision__weights": "fp16"}, ["precision.weights='fp16'", "fp32, bf16"]),
        ({"precision__optimizer": "int4"}, ["precision.optimizer='int4'", "fp32, bf16, int8"]),
        ({"model__stability__residual_gain": -0.1}, ["model.stability.residual_gain=-0.1", "at least 0"]),
        ({"model__stability__z_loss": -1e-4}, ["model.stability.z_loss=-0.0001", "at least 0"]),
        ({"model__stability__spectral_norm": 0.0}, ["model.stability.spectral_norm=0.0", "above 0", "None"]),
        ({"training__adapters__rank": 0}, ["training.adapters.rank=0", "at least 1"]),
        ({"training__adapters__alpha": -1.0}, ["training.adapters.alpha=-1.0", "at least 0"]),
        ({"training__adapters__ranks": "constnat"}, ["training.adapters.ranks='constnat'", "4,8,8,16"]),
        ({"training__adapters__ranks": "4,0"}, ["training.adapters.ranks='4,0'", "constant, increasing"]),
        ({"training__adapters__ranks": "4,8"}, ["lists 2 rank(s) for 4 stacks"]),
        ({"training__adapters__targets": "query,downn"}, ["training.adapters.targets='downn'", '"down"']),
        ({"training__adapters__targets": "gate", "model__ffn": "gelu"}, ["training.adapters.targets='gate'", "gelu"]),
        ({"training__adapters__targets": "gate", "model__ffn": "gelu_erf"}, ["model.ffn='gelu_erf' has no gate"]),
        ({"model__window": 0}, ["model.window=0", "at least 1"]),
        ({"model__global_every": 3}, ["model.global_every=3", "model.window"]),
        ({"model__rope_theta_local": 5.0, "model__window": 4}, ["model.rope_theta_local=5.0", "model.global_every"]),
        ({"model__rope_scaling__kind": "yarn"}, ["model.rope_scaling.kind='yarn'", "llama3"]),
        ({"model__rope_scaling__factor": 0.5}, ["model.rope_scaling.factor=0.5", "at least 1"]),
        ({"model__rope_scaling__low_frequency_factor": 4.0}, ["low_frequency_factor=4.0", "high_frequency_factor=4.0"]),
        ({"model__rope_scaling__original_positions": 0}, ["original_positions=0"]),
        (
            {"model__first_attention_norm": False, "model__norm_position": "post"},
            ["model.first_attention_norm=False", "model.norm_position='pre'"],
        ),
        ({"model__token_types": -1}, ["model.token_types=-1", "at least 0"]),
        ({"mesh__data": 3}, ["mesh.data=3", "16 rows"]),
        ({"mesh__data": 8, "training__accumulation_steps": 4}, ["mesh.data=8", "4 rows"]),
        ({"mesh__fsdp": 16, "data__seq_len": 40}, ["mesh.fsdp=16", "data.seq_len=40"]),
        ({"mesh__fsdp": 16, "model__d_model": 24}, ["mesh.fsdp=16", "model.d_model=24"]),
        ({"mesh__processes": 2}, ["mesh.processes", "mesh.distributed=True"]),
        ({"mesh__distributed": True, "cache__tier": "disk"}, ["cache.tier='disk'", "'host'"]),
        (
            {"training__head": "copy", "model__ties_embedding": True, "training__mode": "end_to_end"},
            ["training.head='copy'", "mode that grows"],
        ),
        ({"optimizer__warmup_fraction": 0.9}, ["optimizer.warmup_fraction=0.9", "decay_fraction=0.2"]),
        ({"data__validation_fraction": 0.0}, ["data.validation_fraction=0", "validation_source"]),
        ({"data__max_rows": 2**31}, ["data.max_rows=2147483648", "below 2**31"]),
        ({"data__source": " ; "}, ["data.source=' ; '", "names no source"]),
        ({"data__source": "a.txt@0; b.txt@1"}, ["data.source='a.txt@0; b.txt@1'", "'a.txt' by 0", "between"]),
        ({"data__source": "a.txt@nan"}, ["'a.txt' by nan"]),
        ({"data__source": "a.txt@0.5; b.txt"}, ["gives 'b.txt' no weight"]),
        ({"data__validation_source": "a.txt@-1"}, ["data.validation_source='a.txt@-1'"]),
        ({"generation__sampler": "beam"}, ["generation.sampler='beam'", "denoise"]),
        ({"generation__sampler": "blocks"}, ["generation.sampler='blocks'", "it can be read by: autoregressive"]),
        ({"generation__order": "entropi"}, ["generation.order='entropi'", '"entropy"']),
        ({"generation__remask": 0.1}, ["generation.remask=0.1", "leave it at 0.0"]),
        ({"generation__remask": 1.0}, ["generation.remask=1.0", "below 1"]),
        ({"generation__steps": 0}, ["generation.steps=0", "at least 1"]),
        ({"generation__threshold": 1.5}, ["generation.threshold=1.5", "between 0 and 1"]),
        ({"generation__repetition_penalty": 0.0}, ["generation.repetition_penalty=0", "1 is no penalty"]),
        ({"generation__block_length": 0}, ["generation.block_length=0", "at least 1"]),
        (
            {**MASKED, "generation__threshold": 0.9, "generation__remask": 0.1},
            ["generation.threshold=0.9", "'confidence' and 0.1"],
        ),
        ({**MASKED, "generation__sampler": "blocks"}, ["generation.sampler='blocks'", "generation.block_length"]),
        (
            {**MASKED, "model__attention": "causal", "generation__sampler": "blocks"},
            ["generation.sampler='blocks'", "read by: denoise"],
        ),
        ({"training__phase_budget": "many"}, ["training.phase_budget='many'", "200 steps"]),
        ({"training__phase_budget": "0 steps"}, ["training.phase_budget='0 steps'", "at least one step"]),
        ({"training__embedding_budget": "5 M tokens"}, ["training.embedding_budget='5 M tokens'"]),
        ({"training__embedding_budget": "-5 steps"}, ["training.embedding_budget='-5 steps'"]),
    ],
)
def test_refusals_name_field_and_value(fields: dict[str, Any], words: list[str]):
    message = refusal(**fields)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("mixture", "sources"),
    [
        ("embedded", [("embedded", None)]),
        ("a.txt, b/*.txt", [("a.txt, b/*.txt", None)]),
        ("me@home.txt", [("me@home.txt", None)]),
        ("a.txt @ 2", [("a.txt", 2.0)]),
        ("b/*.txt@0.3; tfds:x/y:2.0.0#train[:9%]@.7;", [("b/*.txt", 0.3), ("tfds:x/y:2.0.0#train[:9%]", 0.7)]),
        ("a@b.txt; c.txt", [("a@b.txt", None), ("c.txt", None)]),
    ],
)
def test_mixtures_are_taken_apart(mixture: str, sources: list[tuple[str, float | None]]):
    assert weighted_sources(mixture) == sources


def test_a_tied_table_may_be_copied_when_the_embedding_freezes():
    assert resolve(edited(training__head="copy", model__ties_embedding=True)).training.head == "copy"


def test_head_width_is_free_of_the_model_width_when_it_is_named():
    config = resolve(edited(model__d_model=30, model__n_heads=4, model__d_head=8))
    assert config.model.d_head == 8


@pytest.mark.parametrize(
    ("budget", "steps"),
    [("200 steps", 200), ("1_500 steps", 1500), ("1 step", 1), ("2k steps", 2000), ("1 token", 1), ("1M tokens", 245)],
)
def test_budgets_count_updates_rounding_tokens_up(budget: str, steps: int):
    assert budget_steps(budget, 4096) == steps


def test_1200_million_tokens_are_1_2_billion():
    assert budget_steps("1.2B tokens", 1) == budget_steps("1200M tokens", 1) == 1_200_000_000


# What a person, a sweep or a damaged file may put anywhere.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**63, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(
        ["bf16", "mlm", "count", "layernorm", "post", "learned", "end_to_end", "copy", "9" * 400 + " steps"]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def _paths(entries: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    nested = [_paths(value, (*prefix, name)) for name, value in entries.items() if isinstance(value, dict)]
    return [*((*prefix, name) for name in entries), *(path for paths in nested for path in paths)]


PATHS = _paths(dataclasses.asdict(RunConfig()))
HOSTILE = (None, True, -1, 0, 2**63, 10**400, math.nan, math.inf, -1.5, 1e308, "", "9" * 400 + " steps", "a\nb", [], {})


def outcome(entries: dict[str, Any]) -> RunConfig | str:
    """The resolved config, or what its refusal says; any other exception is the validator's fault."""
    try:
        return resolve(entries)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_each_field_takes_a_value_or_refuses_it_in_one_line(path: tuple[str, ...]):
    for value in HOSTILE:
        result = outcome(edited(**{"__".join(path): value}))
        if isinstance(result, str):
            assert "\n" not in result
            assert path[-1] in result


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES, st.booleans()), min_size=1, max_size=4))
def test_any_edit_resolves_or_is_one_line(edits: list[tuple[tuple[str, ...], Any, bool]]):
    entries = dataclasses.asdict(RunConfig())
    for path, value, misspelt in edits:
        section: Any = entries
        for part in path[:-1]:
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[path[-1][::-1] if misspelt else path[-1]] = value
    result = outcome(entries)
    if isinstance(result, str):
        assert result
        assert "\n" not in result
    else:
        assert resolve(json.loads(to_json(result))) == result


def test_stored_configs_read_back(tmp_path: Path):
    config = resolve(edited(name="\u00e9t\u00e9", model__n_kv_heads=2, optimizer__learning_rate=1 / 3))
    path = tmp_path / "config.json"
    path.write_text(to_json(config), encoding="utf-8")
    assert from_json(path) == config


@pytest.mark.parametrize(
    "text", ["", "[1]", "3", "{", '{"modle": {}}', '{"seed": NaN}', '{"model": {"d_model": 1e400}}']
)
def test_damaged_stored_configs_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError):
        from_json(path)


def test_stored_configs_that_are_missing_or_binary_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a run folder"):
        from_json(tmp_path / "config.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        from_json(tmp_path / "binary.json")


def test_differences_name_what_forbids_continuing():
    old = resolve({})
    assert differences(old, old) == []
    new = resolve(edited(optimizer__learning_rate=0.5, model__architecture__n_stacks=2))
    assert differences(old, new) == [
        "model.architecture.n_stacks=4 (now 2)",
        "optimizer.learning_rate=0.001 (now 0.5)",
    ]


def test_free_fields_may_differ():
    new = resolve(edited(logging__every_steps=3, generation__samples=2, checkpoint__keep=5))
    assert differences(resolve({}), new) == []
    new = resolve(edited(data__prepared="elsewhere", data__cache_dir="there", data__tfds_dir="anywhere"))
    assert differences(resolve({}), new) == []
    new = resolve(edited(cache__tier="disk", cache__folder="fast", cache__on_mismatch="stop"))
    assert differences(resolve({}), new) == []
    new = resolve(edited(mesh__data=4, mesh__fsdp=2))
    assert differences(resolve({}), new) == []
    free = ("checkpoint", "logging", "generation", "mesh", "data.prepared", "data.cache_dir", "data.tfds_dir")
    assert {*free, "cache.tier", "cache.folder", "cache.on_mismatch"} == {*config_lib.FREE_FIELDS}


def run_main(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stackwise_jax.main", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=configs/quickstart.py", "--config.model.d_modle=3"], ["d_modle", "d_model"]),
        (["--config=configs/quickstat.py"], ["no such file", "quickstart.py"]),
        (["--config=configs/quickstart.py", "--config.model.n_kv_heads=3"], ["model.n_heads=4", "n_kv_heads=3"]),
        (["--config=configs/gpt2_small.py:layerwize"], ["layerwize", 'Did you mean "layerwise"']),
    ],
    ids=["unknown field", "missing file", "impossible shape", "unknown argument"],
)
def test_bad_command_lines_end_with_2_and_one_line(argv: list[str], words: list[str]):
    done = run_main(*argv, "--print_config")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_the_printed_config_is_the_resolved_one():
    done = run_main("--config=configs/quickstart.py", "--config.model.n_kv_heads=2", "--print_config")
    assert done.returncode == 0, done.stderr
    assert resolve(json.loads(done.stdout)).model.n_kv_heads == 2
