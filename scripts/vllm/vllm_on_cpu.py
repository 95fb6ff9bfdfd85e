"""Serve a small model on a CPU with the wheel of vLLM from PyPI, which is built for GPUs.

The wheel holds vLLM's CPU platform but not the compiled operators that it calls. This module has the six
operators of a decoder in plain PyTorch: correct, slow, for tests alone. vLLM calls `register` in each
process. A build of vLLM for CPUs has operators of its own and keeps them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SCALES = 'float k_scale=1.0, float v_scale=1.0, str kv_cache_dtype="auto"'
_SCHEMAS = {
    "init_cpu_memory_env": "(SymInt[] nodes) -> ()",
    "cpu_attn_has_isa": "(str isa) -> bool",
    "get_scheduler_metadata": "(int requests, int heads, int kv_heads, int head_dim, Tensor seq_lens, "
    "ScalarType dtype, Tensor query_start_loc, bool causal, int window, str isa, bool split, "
    'Tensor? dynamic_causal, str kv_cache_dtype="auto") -> Tensor',
    "cpu_attn_reshape_and_cache": "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    f"Tensor slots, str isa, {_SCALES}) -> ()",
    "cpu_attention_with_kv_cache": "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) output, "
    "Tensor query_start_loc, Tensor seq_lens, float scale, bool causal, Tensor? alibi, SymInt window, "
    f"Tensor blocks, float softcap, Tensor metadata, Tensor? sinks, Tensor? dynamic_causal, {_SCALES}) -> ()",
    "compute_slot_mapping_kernel_impl": "(Tensor query_start_loc, Tensor positions, Tensor blocks, "
    "Tensor(a!) slots, SymInt block_size) -> ()",
}
_kept: list[torch.library.Library] = []  # a collected library would take its operators with it


def register() -> None:
    """Define the operators, once in a process, where vLLM runs on a CPU without its own."""
    from vllm.platforms import current_platform

    if _kept or not current_platform.is_cpu():
        return
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return
    library = torch.library.Library("_C", "FRAGMENT")
    operators = {
        "init_cpu_memory_env": lambda nodes: None,
        "cpu_attn_has_isa": lambda isa: False,
        "get_scheduler_metadata": lambda *_: torch.zeros(1),
        "cpu_attn_reshape_and_cache": keep,
        "cpu_attention_with_kv_cache": attend,
        "compute_slot_mapping_kernel_impl": place,
    }
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, operators[name], "CompositeExplicitAutograd")
    _kept.append(library)


def place(query_start: Tensor, positions: Tensor, blocks: Tensor, slots: Tensor, block_size: int) -> None:
    """Write where each token's key and value go: block number x block size + place in the block."""
    for row, (first, last) in enumerate(_spans(query_start)):
        position = positions[first:last]
        slots[first:last] = blocks[row].long()[position // block_size] * block_size + position % block_size


def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any) -> None:
    """Write keys and values (tokens, heads, dim) to the cache (blocks, heads, block size, dim)."""
    size, used = keys.shape[2], slots >= 0
    block, inside = slots[used] // size, slots[used] % size
    keys[block, :, inside] = key[: len(slots)][used]
    values[block, :, inside] = value[: len(slots)][used]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    scale: float,
    causal: bool,
    alibi: Tensor | None,
    window: int,
    blocks: Tensor,
    softcap: float,
    metadata: Tensor,
    sinks: Tensor | None,
    dynamic_causal: Tensor | None,
    *_: Any,
) -> None:
    """Let each request's queries (tokens, heads, dim) attend to all that the cache holds of it."""
    if alibi is not None or sinks is not None or dynamic_causal is not None or softcap or window != -1:
        raise ValueError("expected plain attention: no alibi, sinks, soft cap or window")
    for row, (first, last) in enumerate(_spans(query_start)):
        length, new = int(lengths[row]), last - first
        if not new:
            continue
        held = blocks[row, : -(-length // keys.shape[2])].long()
        key, value = (cache[held].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (keys, values))
        # Query i stands at position length - new + i and sees what is not after it.
        seen = torch.arange(length) <= torch.arange(length - new, length)[:, None] if causal else None
        heads = F.scaled_dot_product_attention(
            query[first:last].transpose(0, 1), key, value, seen, scale=scale, enable_gqa=True
        )
        output[first:last] = heads.transpose(0, 1)


def _spans(query_start: Tensor) -> list[tuple[int, int]]:
    bounds = query_start.tolist()
    return list(zip(bounds, bounds[1:], strict=False))
