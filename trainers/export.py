"""A run's policy as a directory that plain transformers, or PEFT, loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_rl.errors import LightningError
from lightning_rl.recipe import load_recipe
from rollout_server.models.catalog import resolve_model
from trainers.run_directory import RunDirectory


def export_run(run: RunDirectory, out: Path, *, merged: bool) -> Path:
    """The newest published policy of the run."""
    from trainers.run import latest_policy

    recipe = load_recipe(run.recipe)
    return export(latest_policy(run), resolve_model(recipe.model.name), out, merged=merged)


def export(policy_dir: Path, model_dir: Path, out: Path, *, merged: bool) -> Path:
    """`policy_dir` holds an adapter or full weights. Merging is done in fp32 and rounded once, to the base's own dtype.

    The directory appears only when it is complete. Raises LightningError when it exists already.
    """
    if out.exists():
        raise LightningError(f"{out} exists already", hint="give a new directory")
    scratch = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    is_adapter = (policy_dir / "adapter_config.json").is_file()
    if is_adapter and merged:
        _merge(policy_dir, model_dir, scratch)
    elif is_adapter or merged:
        shutil.copytree(policy_dir, scratch)
    else:
        raise LightningError("this run trains all weights: there is no adapter to export", hint="leave out --adapter")
    for path in model_dir.iterdir():
        if path.name.startswith("tokenizer") or path.name in ("chat_template.jinja", "special_tokens_map.json"):
            shutil.copy(path, scratch)
    scratch.rename(out)
    return out


def _merge(policy_dir: Path, model_dir: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, policy_dir).merge_and_unload()
    dtype = AutoConfig.from_pretrained(model_dir).dtype or torch.float32
    merged.to(dtype).save_pretrained(out)
