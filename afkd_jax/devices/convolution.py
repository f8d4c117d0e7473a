"""The convolution of all networks, with forms of its own on CPUs; elsewhere it is XLA's."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from afkd_jax.devices import convolution_forms as forms
from afkd_jax.devices.convolution_forms import Form
from afkd_jax.devices.xla_cpu import computed_once


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Is jax.lax.conv_general_dilated, as flax.linen.Conv calls it.

    Those of images, ordinary or depthwise and not dilated, have forms of their own.
    """
    primitive = _primitive_of(x, kernel, **options)
    if primitive is None:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((before, after) for before, after in padding)
    form = Form(x.shape[1:], kernel.shape, tuple(strides), pads, tuple(options.items()))
    g = primitive.bind(*_varying_over_the_same_axes(x, kernel), form=form)
    # On CPUs the gradient would be computed for each tap of the kernel.
    return computed_once(g) if primitive is _depthwise else g


def _primitive_of(
    x: jax.Array,
    kernel: jax.Array,
    feature_group_count: int = 1,
    lhs_dilation: Sequence[int] = (),
    rhs_dilation: Sequence[int] = (),
    dimension_numbers: Any = None,
    precision: Any = None,
    **others: Any,
) -> Primitive | None:
    """Returns the primitive of an ordinary or a depthwise convolution; None of any other."""
    del dimension_numbers, precision  # Flax has one layout
    if x.ndim != 4 or others or {*lhs_dilation, *rhs_dilation} - {1}:
        return None
    if feature_group_count == 1:
        return _convolution
    depthwise = kernel.shape[2] == 1 and feature_group_count == x.shape[-1] == kernel.shape[3]
    return _depthwise if depthwise else None


def _varying_over_the_same_axes(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Marks each array as varying over the mesh axes over which the other does, in shard_map.

    JAX does so before its own primitives; the transpose sums the gradient over the added axes.
    """

    def axes(array: jax.Array) -> frozenset[str]:
        kind: Any = jax.typeof(array)  # the name of the field depends on the version of JAX
        return kind.vma if hasattr(kind, 'vma') else kind.manual_axis_type.varying

    def marked(array: jax.Array, other: jax.Array) -> jax.Array:
        return jax.lax.pcast(array, tuple(sorted(axes(other) - axes(array))), to='varying')

    return marked(x, kernel), marked(kernel, x)


Function = Callable[[jax.Array, jax.Array, Form], jax.Array]


def _primitive(name: str, default: Function, cpu: Function) -> Primitive:
    """Returns a primitive of two arrays, which is `cpu` on CPUs."""
    primitive = Primitive(name)
    primitive.def_impl(lambda a, b, form: jax.jit(default, static_argnums=2)(a, b, form))

    def abstract(a: Any, b: Any, form: Form) -> Any:
        shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (a, b)]
        out = jax.eval_shape(lambda a, b: default(a, b, form), *shapes)
        return a.update(shape=out.shape, dtype=out.dtype)  # varies over the mesh as `a`

    def batched(arrays: Any, axes: Any, form: Form) -> tuple[jax.Array, int]:
        return jax.vmap(lambda a, b: default(a, b, form), axes)(*arrays), 0

    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    if cpu is not default:
        lowering = mlir.lower_fun(cpu, multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform='cpu')
    return primitive


def _bilinear(name: str, forward: Function, to_images: Function, to_kernel: Function) -> Primitive:
    """Returns the convolution with these forms on CPUs.

    It and its gradients NAME_to_images and NAME_to_kernel are each other's transposes.
    """
    convolution = _primitive(name, forms.forward, forward)
    images = _primitive(f'{name}_to_images', forms.to_images, to_images)
    kernels = _primitive(f'{name}_to_kernel', forms.to_kernel, to_kernel)
    ad.defbilinear(
        convolution,
        lambda g, x, kernel, form: images.bind(g, kernel, form=form),
        lambda g, x, kernel, form: kernels.bind(x, g, form=form),
    )
    ad.defbilinear(
        images,
        lambda x, g, kernel, form: convolution.bind(x, kernel, form=form),
        lambda x, g, kernel, form: kernels.bind(x, g, form=form),
    )
    ad.defbilinear(
        kernels,
        lambda kernel, x, g, form: images.bind(g, kernel, form=form),
        lambda kernel, x, g, form: convolution.bind(x, kernel, form=form),
    )
    return convolution


_convolution = _bilinear('convolution', forms.forward, forms.to_images_cpu, forms.to_kernel_cpu)
_depthwise = _bilinear(
    'depthwise',
    forms.depthwise_cpu,
    forms.depthwise_to_images_cpu,
    forms.depthwise_to_kernel_cpu,
)
