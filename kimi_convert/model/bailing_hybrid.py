"""Ling-3 as `bailing_hybrid`: KDA layers with a bounded decay, MLA layers that rotate and are gated.

The maths is in `kda` and `mla`; the config says which law and which gates. No YaRN is known of a
released model; where a config has it, it is DeepSeek's.
"""

from __future__ import annotations

from kimi_convert.model.language_model import LanguageModel


class BailingHybrid(LanguageModel):
    """The hybrid: KDA on `config.kda_layers`, gated latent attention with RoPE on the others."""
