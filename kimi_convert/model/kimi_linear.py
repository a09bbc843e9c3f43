"""Kimi-Linear (arXiv 2510.26692): three KDA layers to one full-attention layer, on one device.

Read in this order, each file against the report:

    kimi_linear      this page                                    section 4
    language_model   embedding, layers, final norm, head
    cache            what is kept between calls
    block            x + mixer(norm x), x + feed_forward(norm x)
    kda              Kimi Delta Attention                         section 3, equation 1
    mla              latent attention, here without rotation      section 4, NoPE
    moe              sigmoid routing, shared experts              section 4
    numerics         where implementations disagree

Two properties set it apart from its parents. Nothing rotates: positions come from KDA alone, and
the MLA layers' rope dims are plain dims shared by all heads. And only MLA layers grow a cache: a
KDA layer keeps one K x V state per head, however long the text.
"""

from __future__ import annotations

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import ConfigError
from kimi_convert.model.language_model import LanguageModel
from kimi_convert.model.numerics import Numerics


class KimiLinear(LanguageModel):
    """The hybrid: KDA on `config.kda_layers`, NoPE latent attention on the others."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics | None = None, *, dtype: torch.dtype
    ) -> None:
        """Allocate all weights; see `LanguageModel`.

        Raises:
            ConfigError: the config rotates, which no Kimi-Linear runtime does.
        """
        if config.mla.rope is not None:
            raise ConfigError(
                "a kimi_linear model cannot have rotary position embedding",
                expected="mla.rope None (NoPE)",
                found=config.mla.rope,
            )
        super().__init__(config, numerics, dtype=dtype)
