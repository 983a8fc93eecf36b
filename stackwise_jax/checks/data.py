"""What must fit together in the data and the devices."""

from stackwise_jax.checks.choices import QUANTISED, require
from stackwise_jax.checks.text import weighted_sources
from stackwise_jax.schema import RunConfig


def check_data(config: RunConfig) -> None:
    """Sources, splits and rows."""
    data = config.data
    weighted_sources(data.source)
    if data.validation_source:
        weighted_sources(data.validation_source, field="data.validation_source")
    require(
        bool(data.validation_source) or data.validation_fraction > 0.0,
        "data.validation_fraction=0 leaves nothing to evaluate on; set it above 0 or give data.validation_source",
    )
    require(
        data.max_rows is None or data.max_rows < 2**31,
        f"data.max_rows={data.max_rows} must be below 2**31, which is all rows that can be numbered",
    )


def check_mesh(config: RunConfig) -> None:
    """Devices and processes."""
    mesh, training = config.mesh, config.training
    devices, sizes = mesh.n_devices, f"mesh.data={mesh.data} times mesh.fsdp={mesh.fsdp} must divide"
    rows = training.batch_size // training.accumulation_steps
    require(rows % devices == 0, f"{sizes} the {rows} rows of training.batch_size / training.accumulation_steps")
    appends = training.mode != "end_to_end" and training.progressive.direction == "left_to_right"
    caches = appends and training.progressive.cache_activations is not False
    require(
        not caches or config.data.seq_len % devices == 0,
        f"{sizes} data.seq_len={config.data.seq_len}, by which the activation cache is divided",
    )
    require(
        config.model.d_model % mesh.fsdp == 0,
        f"mesh.fsdp={mesh.fsdp} must divide model.d_model={config.model.d_model}, so that every matrix can be divided",
    )
    require(
        (config.model.d_embedding or 0) % mesh.fsdp == 0,
        f"mesh.fsdp={mesh.fsdp} must divide model.d_embedding={config.model.d_embedding}, as every matrix",
    )
    trunk = config.precision.trunk
    require(
        mesh.fsdp == 1 or trunk not in QUANTISED,
        f"mesh.fsdp={mesh.fsdp} divides matrices, and quantised ones stay whole: precision.trunk={trunk!r} needs "
        "mesh.fsdp=1 (mesh.data is free), or precision.trunk='bf16'",
    )
    named = (mesh.coordinator or None, mesh.processes, mesh.process_id)
    require(
        named == (None, None, None) or (mesh.distributed and None not in named),
        "mesh.coordinator, mesh.processes and mesh.process_id go together, and with mesh.distributed=True; "
        f"they are {mesh.coordinator!r}, {mesh.processes} and {mesh.process_id}",
    )
    require(
        not mesh.distributed or config.cache.tier != "disk",
        "cache.tier='disk' is for one process; with mesh.distributed=True set it to 'host', 'device' or 'auto'",
    )
