"""`import urlvr_fast` needs torch alone."""

import json
import subprocess
import sys

import urlvr_fast

OPTIONAL = ("vllm", "transformers", "triton", "rich", "yaml", "datasets", "safetensors", "math_verify", "tokenizers", "pyarrow", "numpy")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    report = f"{code}\nimport sys, json; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_nothing_beyond_what_torch_loads():
    added = modules_after("import urlvr_fast, urlvr_fast.ops") - modules_after("import torch, torch.distributed")
    assert "urlvr_fast" in added
    assert not added & set(OPTIONAL)


def test_the_package_offers_the_six_ops():
    ops = ("token_stats", "linear_token_stats", "group_advantages", "policy_loss", "policy_loss_from_logits", "linear_policy_loss")
    for name in (*ops, "TokenStats"):
        assert name in urlvr_fast.__all__
        assert getattr(urlvr_fast, name).__doc__
