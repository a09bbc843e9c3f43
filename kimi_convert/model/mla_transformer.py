"""The source models: DeepSeek-V2, DeepSeek-V3, Moonlight and Kimi-K2, on one device.

Every layer is multi-head latent attention with RoPE. Read in this order, against DeepSeek-V2
(arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437):

    mla_transformer  this page
    language_model   embedding, layers, final norm, head
    cache            the latent and the shared rope key of every token
    block            x + mixer(norm x), x + feed_forward(norm x)
    mla              latent attention                             V2 section 2.1
    rope             rotation, YaRN's frequencies                 V2 section 3.1.4
    moe              routing, groups, shared experts              V2 section 2.2, V3 section 2.1.2
    numerics         where implementations disagree

The family differs in config fields alone: a low-rank q or a full one; softmax scores chosen
greedily, by groups of one best expert (V2), or sigmoid scores with a correction bias and groups
of two best experts (V3); YaRN, which slows the low frequencies and sharpens the softmax by m^2.
Multi-token-prediction layers are not part of the model.
"""

from __future__ import annotations

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import ConfigError
from kimi_convert.model.language_model import LanguageModel
from kimi_convert.model.numerics import Numerics


class MlaTransformer(LanguageModel):
    """A transformer whose every layer is rotated latent attention."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics | None = None, *, dtype: torch.dtype
    ) -> None:
        """Allocate all weights; see `LanguageModel`.

        Raises:
            ConfigError: the config has KDA layers or does not rotate.
        """
        if config.kda_layers or config.mla.rope is None:
            raise ConfigError(
                "an MLA source model must have rotated latent attention in every layer",
                found=f"KDA layers {config.kda_layers}, rope {config.mla.rope}",
            )
        super().__init__(config, numerics, dtype=dtype)
