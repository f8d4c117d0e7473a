"""Collectives are parsed from the HLO of CPUs, GPUs and TPUs."""

import pytest

from afkd_jax.tools import hlo

# (line, mesh, operation, axis, bytes)
LINES = {
    'plain': (
        '  %all-reduce.1 = f32[64]{0} all-reduce(%x), channel_id=1, '
        'replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%sum',
        (2, 4),
        ('all-reduce', 'data', 256),
    ),
    'several arrays in one': (
        '  %all-reduce.2 = (f32[2,3]{1,0}, bf16[8]{0}, /*index=2*/s32[]) all-reduce(%a, %b, %c), '
        'channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum',
        (2, 4),
        ('all-reduce', 'peer', 24 + 16 + 4),
    ),
    'all devices, in short': (
        '  ROOT %r = pred[10]{0:T(256)} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%or',
        (2, 4),
        ('all-reduce', 'all', 10),
    ),
    'transposed, in short': (
        '  %r = f32[10]{0:T(256)S(1)} all-reduce-start(%x), replica_groups=[4,2]<=[2,4]T(1,0), '
        'to_apply=%sum',
        (2, 4),
        ('all-reduce', 'peer', 40),
    ),
    'a hop': (
        '  %p = bf16[1,16,2,2,64]{4,3,2,1,0} collective-permute(%x), channel_id=9, '
        'source_target_pairs={{0,4},{4,0},{1,5},{5,1}}',
        (2, 4),
        ('collective-permute', 'peer', 2 * 16 * 2 * 2 * 64),
    ),
    'a hop, started': (
        '  %p = (f32[4,10]{1,0:T(8,128)}, f32[4,10]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) '
        'collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,0}}',
        (3, 1),
        ('collective-permute', 'peer', 160),
    ),
    'a gather, started': (
        '  %g = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], '
        'dimensions={0}',
        (1, 4),
        ('all-gather', 'data', 64),
    ),
}


@pytest.mark.parametrize('name', LINES)
def test_a_line_is_parsed(name):
    line, mesh, (operation, axis, size) = LINES[name]
    (row,) = hlo.parse(line, mesh)
    assert (row.operation, row.axis, row.bytes) == (operation, axis, size)
    assert (row.count, row.largest) == (1, size)


def test_operations_that_send_nothing_are_left_out():
    text = """
      %a = f32[64]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%sum
      %d = f32[64]{0} all-reduce-done(%s)
      %f = f32[64]{0} fusion(%all-reduce.1), kind=kLoop, calls=%c
      %g = f32[64]{0} get-tuple-element(%all-reduce.1), index=0
    """
    assert hlo.parse(text, (1, 2)) == []


def test_operations_of_one_kind_are_added_and_the_largest_mover_comes_first():
    text = '\n'.join(
        LINES[name][0] for name in ('several arrays in one', 'plain', 'plain', 'a hop')
    )
    rows = hlo.parse(text, (2, 4))
    assert [(row.operation, row.axis, row.count) for row in rows] == [
        ('collective-permute', 'peer', 1),
        ('all-reduce', 'data', 2),
        ('all-reduce', 'peer', 1),
    ]
    assert (rows[1].bytes, rows[1].largest) == (512, 256)


def test_unknown_groups_raise():
    with pytest.raises(ValueError, match='no groups are known'):
        hlo.parse('%a = f32[64]{0} all-reduce(%x), replica_groups={}, to_apply=%s', (1, 2))


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('input_reduce_fusion.7', 'elementwise or sum'),
        ('loop_convert_fusion', 'elementwise or sum'),
        ('input_transpose_fusion.3', 'copy or transpose'),
        ('copy.12', 'copy or transpose'),
        ('void cudnn::ops::nchwToNhwcKernel<float>', 'copy or transpose'),
        ('cudnn-conv-bw-filter.1', 'convolution'),
        ('sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32', 'convolution'),
        ('conv_general_dilated.4', 'convolution'),
        ('gemm_fusion_dot.5', 'matrix product'),
        ('ampere_sgemm_128x64_nn', 'matrix product'),
        ('dot.3', 'matrix product'),
        ('all-reduce-start.2', 'collective'),
        ('ncclDevKernel_AllReduce_Sum_f32', 'collective'),
        ('reduce-scatter.1', 'collective'),
        ('rng_bits', 'other'),
    ],
)
def test_kernels_are_sorted_by_their_names(name, kind):
    assert hlo.kind(name) == kind


GPU = """
%fused (p: f32[4]) -> f32[4] {
  ROOT %copy.9 = f32[4]{0} copy(%p)
}

ENTRY %main.1 (x: bf16[8]) -> (f32[8], f32[8]) {
  %x = bf16[8]{0} parameter(0)
  %one = f32[] constant(1)
  %loop_add_fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %cudnn-conv.2 = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %x), window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %get-tuple-element.1 = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%cudnn-conv.2), index=0
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%loop_add_fusion), replica_groups={{0,1}}
  %all-reduce-done.1 = f32[8]{0} all-reduce-done(%all-reduce-start.1)
  %copy.3 = f32[8]{0} copy(%all-reduce-done.1)
  ROOT %tuple.1 = (f32[8]{0}, f32[8]{0}) tuple(%copy.3, %loop_add_fusion)
}
"""  # noqa: E501


def test_the_kernels_and_convolutions_of_a_program_for_gpus():
    kinds = ('elementwise or sum', 'convolution', 'collective', 'copy or transpose')
    assert hlo.kernels(GPU) == dict.fromkeys(kinds, 1)
    assert hlo.convolutions(GPU) == {'bf16, b01f_o01i->b01f': 1}
