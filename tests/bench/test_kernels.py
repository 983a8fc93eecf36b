"""Kernels added up by name, and a trace where there is no device to take apart."""

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.bench import kernels

PROGRAM = """
HloModule jit_step
  %fused (p: f32[4]) -> f32[4] {
    ROOT %add.3 = f32[4]{0} add(%p, %p), metadata={op_name="jit(step)/inside" stack_frame_id=4}
  }
ENTRY %main {
  %loop_add_fusion.12 = f32[4]{0} fusion(%p.1), kind=kLoop, metadata={op_name="jit(step)/norm/add"}
  loop_add_fusion.7 = f32[4]{0} fusion(%p.1), kind=kLoop, metadata={op_name="jit(step)/other/add"}
  ROOT %copy.1 = f32[4]{0} copy(%p.1)
}
"""


def test_kernels_are_added_up_by_name_and_traced_back_to_the_program():
    operations = kernels.operation_names(PROGRAM)
    assert operations["add.3"] == "jit(step)/inside"
    assert "copy.1" not in operations
    events = [
        ("loop_add_fusion_12", "loop_add_fusion.12", 0.5),
        ("loop_add_fusion_7", "loop_add_fusion.7", 0.25),
        ("nvjet_tst_128x256_64x4_NNT", "cublas.1", 3.0),
    ]
    gemm, add = kernels.add_up(events, operations)
    assert (gemm.name, gemm.calls, gemm.source) == ("nvjet_tst_128x256_64x4_NNT", 1, "")
    assert (add.name, add.seconds, add.calls, add.source) == ("loop_add_fusion", 0.75, 2, "jit(step)/norm/add")
    text = kernels.as_text([gemm, add], most=1)
    assert "80.0%" in text
    assert "loop_add" not in text
    assert "1250.000" in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator has kernels")
def test_a_cpu_has_no_kernels_to_show():
    step = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
    rows = kernels.trace_kernels(lambda: step(jnp.ones((8, 8))), step.as_text() or "")
    assert rows == []
    assert "CPU" in kernels.as_text(rows)
