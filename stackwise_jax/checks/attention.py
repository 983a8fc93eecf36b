"""What must fit together in the kind of attention, and what that kind cannot do."""

import dataclasses

from stackwise_jax.checks.choices import KERNEL_FAMILIES, one_of, require
from stackwise_jax.schema import KernelConfig, LatentConfig, ModelConfig


def settle_attention(model: ModelConfig) -> ModelConfig:
    """A model, its heads settled, with the widths of its latents and the family of its kernel filled in."""
    latent, kernel, d_head = model.latent, model.kernel, model.d_head or 0
    if model.has_latents:
        d_rope = latent.d_rope or d_head // 2 if _has_rotary_key(model) else latent.d_rope
        latent = dataclasses.replace(
            latent, kv_rank=latent.kv_rank or 4 * d_head, d_rope=d_rope, d_value=latent.d_value or d_head
        )
    if model.has_kernel:
        family = kernel.family or ("laplacian" if model.attention_kind == "mlgka" else "gaussian")
        kernel = dataclasses.replace(kernel, family=family)
    return dataclasses.replace(model, latent=latent, kernel=kernel)


def linear_maps(model: ModelConfig) -> tuple[str, ...]:
    """The linear maps of a block by name, as adapters and `models.weights.block_table` call them.

    Experts and their router are none; shared experts are the maps of a feed-forward.
    """
    names = ["query", "key", "value", "output"]
    if not model.has_experts or model.experts.shared:
        names += ["up", "down"] + (["gate"] if model.is_gated else [])
    if not model.has_latents:
        return tuple(names)
    names += ["query_latent"] if model.latent.query_rank is not None else []
    if model.latent.form == "separate":
        return (*names, "key_latent", "value_latent")
    return (*names, "latent", *(["rotary_key"] if _has_rotary_key(model) else []))


def _has_rotary_key(model: ModelConfig) -> bool:
    return model.has_latents and model.latent.form == "shared" and model.positions == "rotary"


def check_attention(model: ModelConfig) -> None:
    """The sections of the kind that is chosen, and of the others; windows, which sums cannot express."""
    _check_unused(model)
    if model.has_latents:
        _check_latents(model)
    if model.has_kernel:
        _check_kernel(model)
    require(
        not model.is_linear_time or model.window is None,
        f"model.window={model.window} cannot go with model.kernel.form='linear', which keeps sums of the past and no "
        "places; set model.window=None or model.kernel.form='softmax'",
    )


def _check_unused(model: ModelConfig) -> None:
    """A field of a section that this kind does not read is at its default."""
    sections = (
        ("latent", model.latent, LatentConfig(), model.has_latents, "mla or mlgka"),
        ("kernel", model.kernel, KernelConfig(), model.has_kernel, "kernel or mlgka"),
    )
    for name, section, defaults, is_read, kinds in sections:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            require(
                is_read or value == getattr(defaults, field.name),
                f"model.{name}.{field.name}={value!r} is of model.attention_kind {kinds}, not "
                f"{model.attention_kind!r}; leave it out",
            )


def _check_latents(model: ModelConfig) -> None:
    d_rope = model.latent.d_rope
    if not _has_rotary_key(model):
        require(
            d_rope is None,
            f"model.latent.d_rope={d_rope} is of model.latent.form='shared' with model.positions='rotary', not of "
            f"{model.latent.form!r} with {model.positions!r}; leave it out",
        )
        return
    require(
        d_rope is not None and d_rope >= 2 and d_rope % 2 == 0,
        f"model.latent.d_rope={d_rope} must be even and at least 2: rotary positions pair coordinates",
    )


def _check_kernel(model: ModelConfig) -> None:
    kernel = model.kernel
    one_of("model.kernel.family", kernel.family, KERNEL_FAMILIES)
    require(
        kernel.n_features % 2 == 0,
        f"model.kernel.n_features={kernel.n_features} must be even: a cosine and a sine of each frequency",
    )
    for name in ("bandwidth", "scale"):
        value = getattr(kernel, name)
        require(value is None or value > 0.0, f"model.kernel.{name}={value} must be above 0")
    for name, unset in (("bandwidth", None), ("n_features", KernelConfig().n_features)):
        value = getattr(kernel, name)
        require(
            kernel.family != "linear" or value == unset,
            f"model.kernel.{name}={value} is of kernels of a distance; model.kernel.family='linear' has none",
        )
    require(
        kernel.form == "linear" or kernel.positive_features == KernelConfig().positive_features,
        f"model.kernel.positive_features={kernel.positive_features} is of model.kernel.form='linear', not "
        f"{kernel.form!r}",
    )
    require(kernel.seed < 2**32, f"model.kernel.seed={kernel.seed} must be below 2**32")
