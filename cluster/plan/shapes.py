"""The shape of a model to plan for: by its config where that is at hand, else by its name.

A config of a gated model is not at hand where somebody plans; the shapes of some that many train are below,
as their config.json on the hub has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cluster.preparation.memory import ModelShape, shape_of
from cluster.preparation.model_checks import check_model
from core.config import Config
from core.errors import ConfigError
from core.model_shape import load_model_config


class Known(NamedTuple):
    """A model that is known by name: what transformers calls its kind, its attention heads, its shape."""

    kind: str
    heads: int
    shape: ModelShape

    def model_config(self) -> Any:
        """Returns as much of its Hugging Face config as the checks of a start want."""
        from transformers import AutoConfig

        shape = self.shape
        return AutoConfig.for_model(
            self.kind,
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=shape.kv_width * self.heads // shape.hidden,
            vocab_size=shape.vocabulary,
        )


_LLAMA_8B = Known("llama", 32, ModelShape(8_030_261_248, 32, 4096, 14_336, 1024, 128_256))
_LLAMA_70B = Known("llama", 64, ModelShape(70_553_706_496, 80, 8192, 28_672, 1024, 128_256))
KNOWN: dict[str, Known] = {
    "meta-llama-3-8b": _LLAMA_8B,
    "llama-3.1-8b": _LLAMA_8B,
    "meta-llama-3-70b": _LLAMA_70B,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.3-70b": _LLAMA_70B,
    "qwen2.5-0.5b": Known("qwen2", 14, ModelShape(494_032_768, 24, 896, 4864, 128, 151_936)),
    "qwen2.5-1.5b": Known("qwen2", 12, ModelShape(1_543_714_304, 28, 1536, 8960, 256, 151_936)),
    "qwen2.5-7b": Known("qwen2", 28, ModelShape(7_615_616_512, 28, 3584, 18_944, 512, 152_064)),
    "qwen2.5-32b": Known("qwen2", 40, ModelShape(32_763_876_352, 64, 5120, 27_648, 1024, 152_064)),
    "qwen3-8b": Known("qwen3", 32, ModelShape(8_190_735_360, 36, 4096, 12_288, 1024, 151_936)),
}
"""By the beginning of a hub id's last part, in lower case."""


def find_shape(config: Config) -> tuple[ModelShape, str]:
    """Returns the shape of `config.model`, and where it is from.

    Raises ConfigError where neither a config is at hand nor the name is known, where that config is none of a
    transformer, and for a model that a start refuses.
    """
    path = config.model.path
    try:
        shape = shape_of(config.model, config.learner)
    except OSError:
        pass
    else:
        check_model(config, load_model_config(config.model, local_files_only=True))
        return shape, f"the config of {path}"
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    found = max((known for known in KNOWN if name.startswith(known)), key=len, default=None)
    if found is None or Path(path).exists():
        makes = f" {config.model.make} makes it at the first start." if config.model.make else ""
        raise ConfigError(
            f"model.path = {path}: there is no config of it on this machine.{makes} To plan for it give a "
            f"directory with its config.json alone: model.path=DIR. Known by name: {', '.join(sorted(KNOWN))}."
        )
    if config.learner.lora_rank:
        raise ConfigError(
            f"model.path = {path} with learner.lora_rank = {config.learner.lora_rank}: adapters are sized by the "
            "model's layers, and its config is not on this machine. Give a directory with its config.json: model.path=DIR."
        )
    check_model(config, KNOWN[found].model_config())
    return KNOWN[found].shape, f"the name {path} (its config is not on this machine)"


def experts_note(config: Config) -> str:
    """Returns a sentence where the model is a mixture of experts, of which a token uses a part; else ""."""
    path = Path(config.model.path) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(isinstance(found.get(name), int) and found[name] > 1 for name in names):
        return "a mixture of experts is counted as if each token used all of it: it will be faster than this"
    return ""
