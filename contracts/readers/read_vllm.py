"""vLLM: `SpeculativeConfig` decides method and class, and the class loads the weights, on a CPU.

No engine runs: attention and its kernels need a GPU, or a build for CPUs. All of this is vLLM's own code: `vllm/config/
speculative.py`, `transformers_utils/configs/{eagle,speculators}`, `model_executor/models/{registry,qwen3_dflash*,
qwen3_dspark}.py`, `v1/worker/gpu/spec_decode`.
"""

import json
import os
from pathlib import Path

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # as on a GPU, where triton is installed

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = vllm.platforms.current_platform = CpuPlatform()

from safetensors.torch import load_file
from vllm.config import (
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.configs.speculators import SpeculatorsConfig
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id

from answers import JOB, answer

TARGET = ModelConfig(model=str(JOB / "target"), skip_tokenizer_init=True, dtype="float32")


def read(folder: Path) -> dict:
    """Resolve a draft as the engine does, and load its weights."""
    config = SpeculativeConfig(
        model=str(folder), target_model_config=TARGET, target_parallel_config=ParallelConfig(), **chosen(folder)
    )
    draft = config.draft_model_config
    model_class, _ = ModelRegistry.resolve_model_cls(draft.architectures, draft)
    found = {
        "method": config.method,
        "architectures": draft.architectures,
        "class": model_class.__name__,
        "proposed": config.num_speculative_tokens,
        "layer_ids": get_eagle3_aux_layers_from_config(config),
        "mask_token_id": get_parallel_drafting_token_id(draft.hf_config),
        "rope": dict(draft.hf_config.rope_parameters),
    }
    return found | loaded(model_class, config, folder)


def chosen(folder: Path) -> dict:
    """What the user says of a draft, where vLLM does not find it out itself."""
    raw = json.loads((folder / "config.json").read_text())
    if "speculators_config" in raw:
        return SpeculatorsConfig.extract_vllm_speculative_config(raw)
    architecture = raw["architectures"][0]
    if "DSpark" in architecture:
        return {}
    if "DFlash" in architecture:  # or a path that contains it
        return {"method": "dflash", "num_speculative_tokens": 4}
    return {"num_speculative_tokens": 4}


def loaded(model_class, config: SpeculativeConfig, folder: Path) -> dict:
    """Build the model and load the weights; return the attention of its layers and the names of what was not loaded."""
    whole = VllmConfig(model_config=TARGET, speculative_config=config, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(whole):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{JOB / 'rendezvous'}", 0, "gloo")
            initialize_model_parallel(1)
        with set_default_torch_dtype(torch.float32):
            model = model_class(vllm_config=whole, prefix="draft")
        weights = load_file(folder / "model.safetensors")
        for parameter in model.parameters():
            parameter.data.fill_(filling(parameter))
        model.load_weights(weights.items())
    layers = [layer.self_attn for layer in model.model.layers]
    causal = [attention.causal for attention in layers]
    windows = [attention.sliding_window for attention in layers]
    return {"causal": causal, "windows": windows, "empty": empty_of(model)}


def filling(parameter: torch.Tensor) -> float:
    """A value that no weight has; ids of tokens are no floats."""
    return float("nan") if parameter.is_floating_point() else -1


def empty_of(model: torch.nn.Module) -> list[str]:
    """The names of parameters that were not loaded, or not wholly."""
    found = []
    for name, parameter in model.named_parameters():
        unset = torch.full_like(parameter, filling(parameter))
        if parameter.isclose(unset, equal_nan=True).any():
            found.append(name)
    return sorted(found)


answer(read)
