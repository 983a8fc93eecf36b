"""The feed-forward as a mixture of experts: each token goes through a few of many, and through shared ones."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from stackwise_jax.models.layers import FeedForward, as_fixed
from stackwise_jax.models.weights import fixed_maps
from stackwise_jax.ops.activation import activate
from stackwise_jax.ops.experts import (
    balance_loss,
    expert_matmul,
    from_slots,
    lay_out,
    route,
    router_z_loss,
    to_slots,
)
from stackwise_jax.schema import ModelConfig


class ExpertFeedForward(nn.Module):
    """The sum of a token's active experts, weighted by the router (Shazeer et al., 2017), and of the shared experts.

    Shared experts are one feed-forward of their joint width that every token goes through (Dai et al., 2024). A token's
    output depends on no other token: none is dropped.
    """

    model: ModelConfig
    dtype: DTypeLike

    def setup(self) -> None:
        if self.model.experts.shared:
            self.shared = FeedForward(self.model, self.dtype)

    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float32[Array, ""]]:
        """What the experts put out, and what is added to the training loss, a token.

        Args:
          counted: tokens whose loads are to be even; None: all.
        """
        own, rows = self.model.experts, x.reshape(-1, x.shape[-1])
        routing = route(rows, self.get_variable("params", "router"), active=own.active, normalises=own.normalises)
        layout = lay_out(routing.experts, own.count)
        placed = to_slots(rows.astype(self.dtype), layout)
        hidden = self._product(placed, "gate" if self.model.is_gated else "up", layout.expert_of)
        up = self._product(placed, "up", layout.expert_of) if self.model.is_gated else None
        out = self._product(activate(hidden, up, self.model.ffn), "down", layout.expert_of)
        weights = routing.weights.astype(self.dtype)
        y = jnp.einsum("MAD,MA->MD", from_slots(out, layout), weights, preferred_element_type=jnp.float32)
        y = y.astype(x.dtype).reshape(x.shape)
        if own.shared:
            y = y + self.shared(x)
        among = None if counted is None else counted.reshape(-1)
        return y, own.balance * balance_loss(routing, among) + own.z_loss * router_z_loss(routing, among)

    def _product(
        self, rows: Float[Array, "blocks block D"], name: str, expert_of: Array
    ) -> Float[Array, "blocks block F"]:
        kernel = self.get_variable("params", "experts")[name]["kernel"]
        kernel = as_fixed(kernel) if name in fixed_maps(self.model) else kernel
        return expert_matmul(rows, kernel, expert_of, dtype=self.dtype)
