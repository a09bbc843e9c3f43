"""How the errors of one layer read: the same figures on the terminal and on the page."""

from __future__ import annotations

from kimi_convert.validation.report import LayerErrors


def error_cells(layer: LayerErrors) -> tuple[str, ...]:
    """Return errors, cosine, norm ratio, experts in common, and the KL of the layer alone."""
    return (
        f"{layer.hidden:.4f}",
        f"{layer.mixer_output:.4f}",
        f"{layer.teacher_forced:.4f}",
        f"{layer.cosine:.3f}",
        f"{layer.norm_ratio:.3f}",
        "-" if layer.router_agreement is None else f"{layer.router_agreement:.1%}",
        # Rounding can leave it below 0.
        "-" if layer.replaced_kl is None else f"{max(layer.replaced_kl, 0.0):.4f}",
    )
