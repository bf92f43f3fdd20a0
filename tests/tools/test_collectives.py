"""Counts and bytes of collectives: of programs compiled here, whose loops are known, and of texts as a TPU's read."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tghmoe_jax.tools.collectives import Collective, collectives, replica_groups

PROGRAM = """
    import dataclasses, json, jax, jax.numpy as jnp
    from tghmoe_jax.tools.collectives import collectives
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("x"), jax.P()

    def local(x, w):  # x (2, 8) of (8, 8), w (2, 8) of (8, 8)
        def layer(x, _):
            full = jax.lax.all_gather(x + w, "x", tiled=True)
            x = jax.lax.all_to_all(jnp.tanh(x @ full).reshape(4, 2, 2), "x", 0, 0).reshape(2, 8)
            return x, jax.lax.psum(jnp.sum(x), "x")
        x, sums = jax.lax.scan(layer, x, None, length=5)
        return jax.lax.psum_scatter(x.reshape(16), "x", tiled=True), sums

    f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, whole), check_vma=False))
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = collectives(f.lower(shape, shape).compile().as_text())
    print(json.dumps([dataclasses.astuple(one) for one in found.values()]))
"""


def test_a_compiled_loop_counts_as_often_as_it_runs():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {kind: Collective(kind, *rest) for kind, *rest in json.loads(done.stdout)}
    assert found["all-gather"] == Collective("all-gather", 5, 5 * 256, 5 * 192)  # 8 x 8 floats, 3 of 4 parts sent
    assert found["all-to-all"] == Collective("all-to-all", 5, 5 * 64, 5 * 48)
    assert found["all-reduce"].count == 5 and found["all-reduce"].bytes == 5 * 4
    assert found["reduce-scatter"] == Collective("reduce-scatter", 1, 64, 48)
    assert set(found) == {"all-gather", "all-to-all", "all-reduce", "reduce-scatter"}


TPU = """
HloModule jit_step

%fused.1 (param_0: bf16[2,4]) -> (bf16[4,4], u32[]) {
  %param_0 = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[4,4]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=1, replica_groups=mesh['axis_0'=3,'axis_1'=2], device_ids=([3,2]T(1,0)) {'axis_1'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[4,4]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (param_0.1: bf16[2,4]) -> bf16[4,4] {
  %param_0.1 = bf16[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,4]{1,0} all-gather(%param_0.1), channel_id=1, replica_groups=mesh['axis_0'=3,'axis_1'=2], device_ids=([3,2]T(1,0)) {'axis_1'}, dimensions={0}
}

%fused.3 (param_0.2: bf16[2,4]) -> bf16[4,4] {
  %param_0.2 = bf16[2,4]{1,0} parameter(0)
  %all-gather.3 = bf16[4,4]{1,0} all-gather(%param_0.2), channel_id=1, replica_groups=mesh['axis_0'=3,'axis_1'=2], device_ids=([3,2]T(1,0)) {'axis_1'}, dimensions={0}
  ROOT %custom-call.3 = bf16[4,4]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (arg: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %arg = (s32[]{:T(128)}, bf16[2,4]{1,0}) parameter(0)
  %kernel = bf16[2,4]{1,0} custom-call(%arg), custom_call_target="tpu_custom_call", metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  %start = (bf16[4,4]{1,0}, u32[]{:S(2)}) fusion(%kernel), kind=kCustom, calls=%fused.1
  %middle = bf16[4,4]{1,0} fusion(%kernel), kind=kOutput, calls=%async_collective_fusion.2
  %end = bf16[4,4]{1,0} fusion(%kernel), kind=kCustom, calls=%fused.3
  %psum.1 = f32[6]{0} all-reduce(%end), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %tuple = (s32[]{:T(128)}, bf16[2,4]{1,0}) tuple(%arg, %kernel)
}

%condition (arg.1: (s32[], bf16[2,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  %arg.1 = (s32[]{:T(128)}, bf16[2,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.7 (param_0.3: f32[8]) -> f32[2] {
  %param_0.3 = f32[8]{0} parameter(0)
  %all-reduce.7 = f32[8]{0} all-reduce(%param_0.3), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[2]{0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={2}
}

ENTRY %main (x: bf16[2,4]) {
  %x = bf16[2,4]{1,0} parameter(0)
  %tuple.1 = (s32[]{:T(128)}, bf16[2,4]{1,0}) tuple(%x)
  %scattered = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %while.1 = (s32[]{:T(128)}, bf16[2,4]{1,0}) while(%tuple.1), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_tpu_program_counts_an_asynchronous_collective_once_and_reads_its_loop_from_the_condition():
    assert collectives(TPU) == {
        "all-reduce": Collective("all-reduce", 7, 7 * 24, 7 * 24),
        "all-gather": Collective("all-gather", 7, 7 * 32, 7 * 16),
        "reduce-scatter": Collective("reduce-scatter", 1, 32, 24),
    }


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1},{2,3}}", {(0, 1), (2, 3)}),
        ("[2,4]<=[8]", {(0, 1, 2, 3), (4, 5, 6, 7)}),
        ("[4,2]<=[2,4]T(1,0)", {(0, 4), (1, 5), (2, 6), (3, 7)}),
        ("mesh['a'=2,'b'=4] {'b'}", {(0, 1, 2, 3), (4, 5, 6, 7)}),
        ("mesh['a'=2,'b'=4] {'a'}", {(0, 4), (1, 5), (2, 6), (3, 7)}),
        ("mesh['a'=3,'b'=2], device_ids=([3,2]T(1,0)) {'b'}", {(0, 2), (4, 1), (3, 5)}),
    ],
)
def test_devices_that_take_part_together_are_read_in_every_way_of_writing_them(written, expected):
    line = f"  %x.1 = f32[8]{{0}} all-to-all(%y), channel_id=1, replica_groups={written}, dimensions={{0}}"
    assert replica_groups(line) == expected
    assert replica_groups(line, ("all-reduce",)) == set()


GPU = """
HloModule jit_step

ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  %all-gather-start = ((bf16[2,4]{1,0}, bf16[3,4]{1,0}), (bf16[8,4]{1,0}, bf16[12,4]{1,0})) all-gather-start(%p, %q), replica_groups=[1,4]<=[4]
  %all-reduce-start = (f32[8]{0}, f32[4]{0}) all-reduce-start(%r, %s), replica_groups=[1,4]<=[4]
  %reduce-scatter-start = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}) reduce-scatter-start(%t), replica_groups=[1,4]<=[4]
  %all-gather-done = (bf16[8,4]{1,0}, bf16[12,4]{1,0}) all-gather-done(%all-gather-start)
}
"""  # noqa: E501


def test_a_gpu_starts_several_collectives_as_one():
    found = collectives(GPU)
    assert found["all-gather"] == Collective("all-gather", 1, 160, 120)  # 20 rows of 4 numbers of 2 bytes
    assert found["all-reduce"] == Collective("all-reduce", 1, 48, 72)
    assert found["reduce-scatter"] == Collective("reduce-scatter", 1, 64, 48)
