"""The errors of one layer while they are added up over batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from kimi_convert.model.dynamics import MixerDynamics
from kimi_convert.model.router_agreement import RouterAgreement
from kimi_convert.validation.metrics import Alignment, RelativeSquaredError
from kimi_convert.validation.report import LayerErrors


@dataclass(slots=True)
class LayerSums:
    """One layer of the student beside the teacher's."""

    hidden: RelativeSquaredError = field(default_factory=RelativeSquaredError)
    mixer_output: RelativeSquaredError = field(default_factory=RelativeSquaredError)
    teacher_forced: RelativeSquaredError = field(default_factory=RelativeSquaredError)
    alignment: Alignment = field(default_factory=Alignment)
    routing: RouterAgreement = field(default_factory=RouterAgreement)
    dynamics: MixerDynamics | None = None

    def errors(
        self, layer_idx: int, *, mixer: str, converted: bool, replaced_kl: float | None
    ) -> LayerErrors:
        """Return the sums as the report has them."""
        return LayerErrors(
            layer_idx=layer_idx,
            mixer=mixer,
            converted=converted,
            hidden=self.hidden.value,
            mixer_output=self.mixer_output.value,
            teacher_forced=self.teacher_forced.value,
            cosine=self.alignment.cosine,
            norm_ratio=self.alignment.norm_ratio,
            router_agreement=self.routing.value,
            replaced_kl=replaced_kl,
            dynamics=self.dynamics,
        )
