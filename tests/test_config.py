from __future__ import annotations

import pytest

from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.config import Config, ConfigError, flatten, load


def test_file_overrides_and_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: some/model\ntrainer:\n  steps: 7\n  lr: 1e-4\nrollout: {stop_token_ids: [5, 6]}\n")
    config = load(path, ["trainer.steps=9", "run_dir=runs/x", "prompts.limit=null", "eval.temperature=1", "model=12"])
    assert (config.trainer.steps, config.trainer.lr, config.run_dir, config.prompts.limit) == (9, 1e-4, "runs/x", None)
    assert config.rollout.stop_token_ids == [5, 6]
    assert isinstance(config.eval.temperature, float)
    assert load(None, ["log.live=off"]).log.live == "off"
    assert config.model == "12"  # text is wanted, whatever YAML makes of it


def test_options_of_a_files_reward_do_not_reach_another(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("reward: majority_voting\nreward_options: {threshold: 0.4}\n")
    assert load(path).reward_options == {"threshold": 0.4}
    assert load(path, ["reward=majority_voting"]).reward_options == {"threshold": 0.4}
    assert load(path, ["reward=self_certainty"]).reward_options == {}
    assert load(path, ["reward=mine.py:f", "reward_options={scale: 2}"]).reward_options == {"scale": 2}
    assert load(path, ["reward=mine.py:f", "reward_options.scale=2"]).reward_options == {"scale": 2}


def test_saved_config_loads_back_to_the_same(tmp_path):
    config = load(None, ["reward_options={threshold: 0.5}", "trainer.stop_after=3", "prompts.suffix=' \\boxed{}\n'"])
    configuration.save(config, tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepz=3", "no option 'trainer.stepz'; did you mean 'trainer.steps'"),
        ("steps=3", "did you mean 'trainer.steps'"),
        ("rollout.lr=3", "did you mean 'trainer.lr'"),
        ("modle=x", "did you mean 'model'"),
        ("trainer.steps=abc", "trainer.steps='abc' is a str; it must be a whole number"),
        ("trainer.steps=1.5", "must be a whole number"),
        ("trainer.steps=true", "must be a whole number"),
        ("trainer.lr=fast", "must be a number"),
        ("trainer.gradient_checkpointing=1", "must be true or false"),
        ("rollout.stop_token_ids=[a]", r"rollout.stop_token_ids\[0\]='a'"),
        ("trainer=3", "trainer is a section"),
        ("seed.x=3", "seed"),
        ("rollout.engine=vlm", "rollout.engine='vlm': valid are vllm, hf; did you mean vllm"),
        ("rollout.group_size=0", "must be at least 1"),
        ("rollout.temperature=0", "greedy rollouts"),
        ("rollout.top_p=0.9", "did you mean 'eval.top_p'"),
        ("trainer.keep_checkpoints=-1", "must be at least 0"),
        ("trainer.stop_after=0", "must be at least 1"),
        ("eval.temperature=0", "greedy accuracy is measured in any case"),
        ("rollout.gpu_memory=1.5", r"rollout.gpu_memory must be in"),
        ("trainer.device=tpu", "valid are auto, cpu, cuda"),
        ("trainer.steps", "overrides look like trainer.steps=300"),
        ("trainer.steps=[1", "cannot read the value"),
    ],
)
def test_bad_options_are_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        load(tmp_path / "none.yaml")
    path = tmp_path / "c.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must hold `key: value`"):
        load(path)


def test_every_option_is_documented_and_every_rule_names_an_option():
    text = configuration.documentation()
    for key in flatten(Config()):
        assert f"{key} = " in text
    assert set(configuration.CHOICES) | set(configuration.MINIMUM) <= set(flatten(Config()))


def test_shipped_configs_load():
    from pathlib import Path

    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for path in files:
        load(path)
