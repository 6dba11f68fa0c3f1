from __future__ import annotations

import copy
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from urlvr_fast.trainer.checkpoint import CheckpointError, checkpoints, load_optimizer, save_checkpoint


@pytest.fixture
def parts(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_model_dir), torch.optim.AdamW(model.parameters(), lr=1e-3)


def one_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_a_restored_optimiser_goes_on_bit_for_bit(parts, tmp_path):
    model, tokenizer, optimizer = parts
    one_step(model, optimizer, 0)
    one_step(model, optimizer, 1)
    path = save_checkpoint(tmp_path, 2, model, tokenizer, optimizer)
    restored = AutoModelForCausalLM.from_pretrained(path)
    fresh = torch.optim.AdamW(restored.parameters(), lr=1e-3)
    assert load_optimizer(path, restored, fresh) == 2
    one_step(model, optimizer, 2)
    one_step(restored, fresh, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(path)("1+1=").input_ids == tokenizer("1+1=").input_ids


def test_the_newest_are_kept(parts, tmp_path):
    model, tokenizer, optimizer = parts
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, step, model, tokenizer, optimizer, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000009", "step-000010"]


def test_a_write_that_fails_leaves_what_was_there(parts, tmp_path):
    model, tokenizer, optimizer = parts
    save_checkpoint(tmp_path, 1, model, tokenizer, optimizer)

    class Broken:
        def save_pretrained(self, path):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        save_checkpoint(tmp_path, 2, model, Broken(), optimizer)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_half_written_directory_is_not_a_checkpoint(parts, tmp_path):
    """What a process that is killed outright leaves behind."""
    (tmp_path / "checkpoints" / ".writing-step-000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000004").mkdir()
    assert checkpoints(tmp_path) == []
    model, tokenizer, optimizer = parts
    save_checkpoint(tmp_path, 3, model, tokenizer, optimizer)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000003"]


def test_optimiser_of_another_model_is_refused(parts, tmp_path):
    model, tokenizer, optimizer = parts
    one_step(model, optimizer, 0)
    path = save_checkpoint(tmp_path, 1, model, tokenizer, optimizer)
    wider = copy.deepcopy(model)
    wider.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight belongs to another model"):
        load_optimizer(path, wider, torch.optim.AdamW(wider.parameters()))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB: one checkpoint of the tiny model fits, the next does not."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a file system")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk_is_named_and_loses_nothing(parts, small_disk):
    model, tokenizer, optimizer = parts
    one_step(model, optimizer, 0)
    first = save_checkpoint(small_disk, 1, model, tokenizer, optimizer)
    with pytest.raises(CheckpointError, match=r"no space left for the checkpoint of step 2.*newest complete checkpoint is .*step-000001"):
        save_checkpoint(small_disk, 2, model, tokenizer, optimizer)
    assert checkpoints(small_disk) == [first]
    assert len(list((small_disk / "checkpoints").iterdir())) == 1
    AutoModelForCausalLM.from_pretrained(first)
