"""What the names of a checkpoint's tensors say, where there is no model: as hubs publish them."""

import re
from collections.abc import Container, Mapping
from typing import Any

from fx_sparsity.storage.json_files import object_in

_QUANTIZED = re.compile(
    r"(?:.*_)?(?:scales?|scale_inv|scale_2|scale_ub|zero_?points?|zeros|qzeros|qweight|packed|g_idx"
    r"|absmax|amax|quant_map|codebooks?|scb)",
    re.IGNORECASE,
)
"""What goes with the codes of a quantized weight, or holds them: fp8 with scales of blocks,
compressed-tensors, GPTQ, AWQ, bitsandbytes, quanto, AQLM."""
_SCALES = (
    *("{name}_scale_inv", "{name}_scale", "{owner}.scale", "{owner}.weight_scale"),
    *("{owner}.scales", "{name}._scale"),
)
"""What the scales of a weight in codes are called beside it."""
_PLACE = frozenset({"pos", "position", "positions", "positional", "rel", "relative", "distance"})
_TABLE = frozenset(
    {
        *("embed", "embeds", "emb", "embd", "embedding", "embeddings", "encoding", "encodings"),
        *("bias", "table", "h", "w"),
    }
)
"""A table of positions has a word of both in its name: `embed_positions`, `rel_pos_h`."""
_BIAS = re.compile(r"(?:.*_)?bias(?:es)?", re.IGNORECASE)
_DECAY = re.compile(
    r"A_logs?|(?:log_|inv_)?A_(?:real|imag|re|im)|Ds?|log_dt|time_decay|time_first|time_faaaa"
    r"|time_mix_\w+|time_maa_[a-z]|r_k"
)
"""Of Mamba, S4 and RWKV; `time_maa_w1` and the like are matrices of a product."""
_ROUTER = re.compile(r"(?:.*\.)?(?:(?:\w+_)?router(?:\..*)?|gate(?:\.wg)?|shared_expert_gate)")

_HEADS = {
    "embed_tokens": ("lm_head",),
    "tok_embeddings": ("output", "lm_head"),
    "wte": ("lm_head",),
    "word_embeddings": ("lm_head", "cls.predictions.decoder", "lm_head.decoder"),
    "embed_in": ("embed_out",),
    "shared": ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens"),
}
"""What a table of tokens is called -> the modules that have its weight where they are tied."""
_WITH_HEAD = re.compile(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration")


def why_dense(name: str) -> str | None:
    """Why no pattern is meant for a tensor, by its name; None if one may be.

    Scales and zero points, positions, biases, decays, and routers of experts.
    """
    own, path = name.rpartition(".")[2], name.removesuffix(".weight")
    words = {*path.rpartition(".")[2].lower().split("_")}
    if "wpe" in words or (words & _PLACE and words & _TABLE):
        return "a table of positions"
    if _QUANTIZED.fullmatch(own):
        return "goes with the codes of a quantized weight"
    if _BIAS.fullmatch(own):
        return "a bias"
    if _DECAY.fullmatch(own):
        return "decays or mixes states, element by element"
    if _ROUTER.fullmatch(path):
        return "routes tokens to experts"
    return None


def scale_of(name: str, held: Container[str]) -> str | None:
    """Which tensor scales a weight of codes; None where there is none."""
    owner = name.rpartition(".")[0]
    names = (text.format(name=name, owner=owner) for text in _SCALES)
    return next((found for found in names if found != name and found in held), None)


def tied_names(config: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, str]:
    """Names that a configuration ties to a checkpoint's table of tokens, and files leave out.

    Args:
        config: the model's `config.json`.
        held: names of the tensors in the files.

    Returns:
        Name -> the tensor that it is tied to. Empty unless there is one such table.
    """
    if not _ties_heads(config):
        return {}
    known = (name.rpartition(".") for name in (n.removesuffix(".weight") for n in held))
    tables = [(before, table) for before, _, table in known if table in _HEADS]
    tables = [place for place in tables if place[1] == "shared"] or tables
    if len(tables) != 1:
        return {}
    before, table = tables[0]
    tensor = f"{before}.{table}.weight" if before else f"{table}.weight"
    # Models that have a language model within may call its head by either name.
    parents = {"", *(f"{before[: dot.start()]}." for dot in re.finditer(r"\.", before))}
    names = {f"{parent}{head}.weight" for parent in parents for head in _HEADS[table]}
    return dict.fromkeys(sorted(names - held.keys()), tensor)


def _ties_heads(config: Mapping[str, Any]) -> bool:
    """As `tie_word_embeddings` says; older files leave it out where they do tie them."""
    for part in (config, object_in(config, "text_config")):
        if (said := part.get("tie_word_embeddings")) is not None:
            return said is True
    classes = config.get("architectures")
    return isinstance(classes, list) and bool(_WITH_HEAD.search("".join(map(str, classes[:1]))))
