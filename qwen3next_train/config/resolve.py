"""The layer pattern made explicit."""

from __future__ import annotations

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.config.validate import expand_interval


def with_layer_types(model: ModelConfig) -> ModelConfig:
    """The model with ``layer_types`` written out, one entry per layer.

    ``full_attention_interval`` is kept when it describes the pattern, else replaced by the smallest interval
    that does, else by the schema's default: so what is printed and read again resolves to the same.
    """
    num_layers = model.num_hidden_layers
    if not model.layer_types:
        pattern = expand_interval(model.full_attention_interval, num_layers)
        return model.model_copy(update={"layer_types": pattern})
    if expand_interval(model.full_attention_interval, num_layers) == model.layer_types:
        return model
    # The first softmax layer is the only candidate; a pattern without one has every interval beyond its end.
    first = next((i for i, kind in enumerate(model.layer_types) if kind == "full_attention"), num_layers)
    interval: int = ModelConfig.model_fields["full_attention_interval"].default
    if expand_interval(first + 1, num_layers) == model.layer_types:
        interval = first + 1
    return model.model_copy(update={"full_attention_interval": interval})
