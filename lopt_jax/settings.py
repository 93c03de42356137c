"""What the tensors of a step have beside their arrays."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from lopt_jax.rows import take_rows
from lopt_jax.rules.rule import MLP, AccumulatorStatistics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TensorSettings:
    """Each tensor's network and rates.

    Attributes:
      mlp: the network: one for all tensors, or with a leading axis of tensors.
      scale: (tensors,), multiplies the step.
      weight_decay: (tensors,), multiplies the parameter.
      statistics: of the accumulators before this step, with a leading axis of tensors, where the
        rule keeps them.
      mlp_per_tensor: whether the network has that axis.
    """

    mlp: MLP
    scale: jax.Array
    weight_decay: jax.Array
    statistics: AccumulatorStatistics | None
    mlp_per_tensor: bool = dataclasses.field(metadata={"static": True})

    def rows(self, tensors: Sequence[int]) -> "TensorSettings":
        """Those of some of the tensors."""
        if list(tensors) == list(range(self.scale.shape[0])):
            return self
        mlp = take_rows(self.mlp, tensors) if self.mlp_per_tensor else self.mlp
        rates = (self.scale, self.weight_decay, self.statistics)
        scale, weight_decay, statistics = take_rows(rates, tensors)
        return TensorSettings(mlp, scale, weight_decay, statistics, self.mlp_per_tensor)
