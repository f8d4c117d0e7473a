"""Methods with auxiliary modules: losses and gradients against NumPy, on two devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    softmax,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.config import Loss
from afkd_jax.devices.arrays import scalar_count
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA, varying
from afkd_jax.errors import UserError
from afkd_jax.method import auxiliary, losses, presets
from afkd_jax.method import step as step_lib
from afkd_jax.method.objective import Objective
from afkd_jax.method.ring import Ring
from afkd_jax.models import layers as layers_lib
from afkd_jax.tools import describe
from afkd_jax.training import run as run_lib

NETWORKS, BATCH, CLASSES, T, WEIGHT = 3, 8, 4, 2.0, 0.7
LABELS = np.array([0, 3, 1, 1, 2, 3, 1, 0])  # image 4 is alone in its class
CHANNELS = (8, 16, 8)


# --- The second way, in NumPy: `at` is a tree of arrays, `stopped` what no gradient reaches. ---


def log_softmax(z):
    return np.log(softmax(z))


def entropy(z):
    return -log_softmax(z)[..., np.arange(BATCH), LABELS].mean(-1)


def kl(z, teacher):
    q = softmax(teacher / T)
    return T**2 * (q * (np.log(q) - log_softmax(z / T))).sum(-1).mean(-1)


def norm(x, p):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * p['scale'] + p['bias']


def dense(x, p):
    return x @ p['kernel'] + p.get('bias', 0)


def pooled(at):
    return [own.mean((1, 2)) for own in at['maps']]


def plain_one(at, stopped):
    def ensemble(at):
        x = norm(dense(np.concatenate(pooled(at), 1), at['Dense_0']), at['BatchNorm_0'])
        gate = softmax(np.maximum(x, 0))
        return sum(gate[:, k, None] * at['logits'][k] for k in range(NETWORKS))

    kls = [kl(z, ensemble(stopped)) for z in at['logits']]
    return entropy(ensemble(at)) + WEIGHT * sum(kls), {
        'mimicry_kl': kls,
        'auxiliary_cross_entropy': entropy(ensemble(at)),
    }


def plain_okddip(at, stopped):
    h, kls = pooled(at), []
    for k in range(2):
        query = dense(h[k], at[f'query_{CHANNELS[k]}'])
        values = [dense(h[j], at[f'value_{CHANNELS[j]}']) for j in range(2)]
        weights = softmax(np.stack([(query * value).sum(1) for value in values], 1))
        target = sum(weights[:, j, None] * stopped['logits'][j] for j in range(2))
        kls.append(kl(at['logits'][k], target))
    kls.append(kl(at['logits'][2], (stopped['logits'][0] + stopped['logits'][1]) / 2))
    return WEIGHT * sum(kls), {'mimicry_kl': kls}


def plain_ffl(at, stopped):
    def fused(at):
        first, second, third = at['maps']  # 2x2, 4x4 and 2x2
        second = second.reshape(BATCH, 2, 2, 2, 2, -1).mean((2, 4))
        x = np.concatenate([first, second, third], -1)
        padded, kernel = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), at['Conv_0']['kernel']
        y = np.zeros_like(x)
        for i, j, a, b in np.ndindex(2, 2, 3, 3):
            y[:, i, j] += padded[:, i + a, j + b] * kernel[a, b, 0]
        y = np.maximum(norm(y, at['BatchNorm_0']), 0) @ at['Conv_1']['kernel'][0, 0]
        return dense(np.maximum(norm(y, at['BatchNorm_1']), 0).mean((1, 2)), at['Dense_0'])

    kls = [kl(z, fused(stopped)) for z in at['logits']]
    fused_kl = kl(fused(at), np.mean(stopped['logits'], 0))
    return entropy(fused(at)) + WEIGHT * (sum(kls) + fused_kl), {
        'mimicry_kl': kls,
        'auxiliary_cross_entropy': entropy(fused(at)),
        'auxiliary_kl': fused_kl,
    }


def plain_mcl(at, stopped):
    def similarities(at):
        v = []
        for k, h in enumerate(pooled(at)):
            x = dense(np.maximum(dense(h, at[f'Dense_{2 * k}']), 0), at[f'Dense_{2 * k + 1}'])
            v.append(x / np.sqrt((x**2).sum(1, keepdims=True)))
        return [[10 * v[k] @ v[j].T for j in range(NETWORKS)] for k in range(NETWORKS)]

    def supervised(s):
        total = 0
        for a in range(BATCH):
            others = [b for b in range(BATCH) if b != a]
            same = [b for b in others if LABELS[b] == LABELS[a]]
            if same:
                total -= np.mean([s[a, b] - np.log(np.exp(s[a, others]).sum()) for b in same])
        return total / BATCH

    s, fixed, hard, soft = similarities(at), similarities(stopped), [], []
    for k in range(NETWORKS):
        others = [j for j in range(NETWORKS) if j != k]
        hard.append(supervised(s[k][k]) + sum(supervised(s[k][j]) for j in others))
        soft.append(sum(kl(s[k][k], fixed[j][j]) + kl(s[k][j], fixed[j][k]) for j in others))
    total = WEIGHT * (0.1 * sum(hard) + sum(soft))
    return total, {'contrastive': hard, 'contrastive_kl': soft}


WEIGHTS = np.array([0.5, 0.0, 0.5])


def plain_general(at, stopped):
    target = np.log(0.5 * softmax(stopped['logits'][0]) + 0.5 * softmax(stopped['logits'][2]))
    kls = [kl(z, target) for z in at['logits']]
    return WEIGHT * sum(kls), {'mimicry_kl': kls, 'teacher_weight': WEIGHTS}


PLAIN = {
    'kdcl_general': plain_general,
    'one': plain_one,
    'okddip': plain_okddip,
    'ffl': plain_ffl,
    'mcl': plain_mcl,
}


def inputs(method):
    """Returns (module, variables, logits, maps) in double precision."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((NETWORKS, BATCH, CLASSES))
    maps = [
        rng.uniform(0, 2, (BATCH, side, side, c))
        for side, c in zip((2, 4, 2), CHANNELS, strict=True)
    ]
    layers = layers_lib.layers(DATA)
    module = auxiliary.AUXILIARIES[method].module(layers, NETWORKS, CLASSES)
    if method == 'mcl':
        module = auxiliary.Embeddings(layers, 5)
    variables = module.init(jax.random.key(0), logits, maps, False)
    if method == 'kdcl_general':
        variables = {'params': {}, 'batch_stats': {'weights': WEIGHTS}}
    # No bias is 0 and no scale 1.
    variables['params'] = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.2 * rng.standard_normal(leaf.shape), variables['params']
    )
    return module, variables, logits, maps


@pytest.mark.parametrize('method', PLAIN)
def test_losses_and_gradients_equal_numpy(method, x64):
    module, variables, logits, maps = inputs(method)
    loss = Loss(temperature=T, kl_weight=WEIGHT)
    objective = Objective(presets.named(method), Ring(tuple(range(NETWORKS))), loss, 0)
    devices = take_devices(2)

    def per_device(params, logits_BxKxC, maps, labels):
        def apply(params, logits, maps):
            outputs, new = module.apply(
                variables | {'params': params}, logits, maps, True, mutable=['batch_stats']
            )
            return outputs, new

        logits = logits_BxKxC.swapaxes(0, 1)
        gradients, (values, _) = objective.of_auxiliary(
            apply, varying(params), logits, maps, labels, 0
        )
        to_params, to_logits, to_maps = gradients
        to_params, values = jax.lax.pmean((to_params, values), DATA)
        # The step averages gradients of parameters over the devices.
        return to_params, to_logits.swapaxes(0, 1) / 2, [own / 2 for own in to_maps], values

    mapped = devices.map(
        per_device,
        (REPLICATED, BATCH_SHARDED, BATCH_SHARDED, BATCH_SHARDED),
        (REPLICATED, BATCH_SHARDED, BATCH_SHARDED, REPLICATED),
    )
    to_params, to_logits, to_maps, values = jax.device_get(
        mapped(variables['params'], logits.swapaxes(0, 1), maps, LABELS)
    )
    at = {**variables['params'], 'logits': logits, 'maps': maps}
    gradient = {**to_params, 'logits': to_logits.swapaxes(0, 1), 'maps': to_maps}

    def total(moved):
        return entropy(moved['logits']).sum() + PLAIN[method](moved, at)[0]

    expected = {'cross_entropy': entropy(logits), **PLAIN[method](at, at)[1]}
    assert values.keys() == expected.keys()
    names = [*objective.value_names(), *objective.step_value_names()]
    assert sorted(values) == sorted(names)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-9, err_msg=name)
    # Each array's gradient, along a random direction, by central differences.
    leaves, structure = jax.tree.flatten(at)
    slopes, rng, step = structure.flatten_up_to(gradient), np.random.default_rng(1), 1e-5
    for i, leaf in enumerate(leaves):
        direction = rng.standard_normal(leaf.shape)
        ends = [
            total(structure.unflatten([*leaves[:i], leaf + sign * direction, *leaves[i + 1 :]]))
            for sign in (step, -step)
        ]
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((slopes[i] * direction).sum(), difference, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_a_step_follows_the_gradient_of_the_whole_loss(x64):
    """Of networks and module at once: also through the maps into the trunks."""
    config = tiny_config(('tiny-4-2', 'tiny-6-1'), method='ffl', batch_size=BATCH)
    state, cohort = as_float64(initial_state(config)), tiny_cohort(config)
    images, labels = as_float64(random_batch(BATCH))
    terms = auxiliary.Terms(
        lambda logits: losses.cross_entropy(logits, labels).mean(-1),
        lambda logits, teacher: losses.mimicry_kl(logits, teacher, 3.0).mean(-1),
        temperature=3.0,
        weight=1.0,
    )

    def total(networks, module):
        outputs = [
            own.apply({'params': params, 'batch_stats': network.batch_stats['network']},
                      images, True, mutable=['batch_stats'])[0]
            for own, params, network in zip(
                cohort.networks, networks, state.networks, strict=True
            )
        ]  # fmt: skip
        logits, maps = jnp.stack([logits for logits, _ in outputs]), [m for _, m in outputs]
        variables = {'params': module, 'batch_stats': state.auxiliary.batch_stats}
        fused, _ = cohort.auxiliary.apply(variables, logits, maps, True, mutable=['batch_stats'])
        added, _ = auxiliary.ffl_loss(fused, logits, labels, terms)
        return terms.cross_entropy(logits).sum() + added

    before = [network.variables()['params'] for network in state.networks], state.auxiliary.params
    expected = jax.tree.map(
        lambda p, g: p - 0.1 * (g + 1e-4 * p), before, jax.grad(total, (0, 1))(*before)
    )
    devices = take_devices(2)
    after, _ = mapped_update(config, devices)(
        devices.replicate(state), devices.split(images), devices.split(labels)
    )
    networks = [network.variables()['params'] for network in after.networks]
    difference, where = relative_difference((networks, after.auxiliary.params), expected)
    assert difference < 1e-9, where


@pytest.mark.parametrize('count', [1, 2])
def test_error_products_are_summed_over_the_masked_images(count, x64):
    config = tiny_config(method='kdcl_general')
    cohort, networks = tiny_cohort(config, DATA), as_float64(initial_state(config)).networks
    images, labels = as_float64(random_batch(8))
    mask = np.arange(8) < 5
    step = functools.partial(step_lib.eval_step, cohort)
    out = REPLICATED, BATCH_SHARDED
    mapped = take_devices(count).map(step, (REPLICATED, *(BATCH_SHARDED,) * 3), out)
    sums, _ = mapped(networks, images, labels, mask)
    errors = [
        softmax(np.asarray(module.apply(network.variables(), images, False)[0]))
        - np.eye(10)[labels]
        for module, network in zip(cohort.networks, networks, strict=True)
    ]
    expected = [[(a * b)[:5].sum() for b in errors] for a in errors]
    np.testing.assert_allclose(sums['error_products'], expected, rtol=1e-9)


def test_general_weights_minimise_the_error_of_the_mixture():
    # For two networks by hand: w_1 = (c_22 - c_12) / (c_11 + c_22 - 2 c_12).
    weights = auxiliary.general_weights(np.array([[2.0, 0.5], [0.5, 1.0]]) * 7, 7)['weights']
    np.testing.assert_allclose(weights, [0.25, 0.75], rtol=1e-6)
    errors = np.random.default_rng(0).standard_normal((3, 100))
    products = errors @ errors.T
    weights = auxiliary.general_weights(products, 100)['weights']
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    least = weights @ products @ weights
    for other in np.random.default_rng(1).dirichlet(np.ones(3), 200):
        assert other @ products @ other >= least * (1 - 1e-6)
    # A network that would get a negative weight gets none; equal ones get equal weights.
    weights = auxiliary.general_weights(np.array([[4.0, 1.8], [1.8, 1.0]]), 1)['weights']
    np.testing.assert_allclose(weights, [0, 1])
    for products in (np.ones((3, 3)), np.zeros((3, 3)), np.full((3, 3), np.nan)):
        found = auxiliary.general_weights(products, 1)['weights']
        np.testing.assert_allclose(found, [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'method': 'okddip'}, r'config\.networks: must be at least 3 with the method "okddip"'),
        (
            {'method': 'one', 'mesh__peer': 2},
            r'config\.mesh\.peer: must be 1 .* "one", which needs',
        ),
        (
            {'method': 'ffl', 'frozen': (1,), 'init_from': ('a:1', '')},
            r'config\.frozen: must be \(\) with the method "ffl", which updates all networks',
        ),
    ],
    ids=str,
)
def test_what_an_auxiliary_module_cannot_use_is_rejected(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_cohort(tiny_config(**fields))


@functools.cache
def described(method):
    return describe.describe(tiny_config(('tiny-8-2',) * 3, method=method))


@pytest.mark.parametrize(
    ('method', 'kind', 'parameters'),
    [
        ('one', 'gate', 24 * 3 + 6),
        ('okddip', 'attention', 2 * 8),
        ('ffl', 'fusion', 9 * 24 + 48 + 24 * 8 + 16 + 8 * 10 + 10),
        ('mcl', 'embeddings', 3 * (8 * 128 + 128 + 128 * 128 + 128)),
    ],
)
def test_the_module_is_described_and_is_no_part_of_a_network(method, kind, parameters):
    facts = described(method)
    assert facts['auxiliary'] == {'kind': kind, 'parameters': parameters}
    assert f'auxiliary module: {kind}, {parameters:,} parameters' in describe.text(facts)
    state = initial_state(tiny_config(('tiny-8-2',) * 3, method=method))
    assert scalar_count(state.auxiliary.params) == parameters
    assert set(state.networks[0].params) == {'trunk', 'head', 'transfer'}


def test_weights_of_held_out_images_are_described():
    facts = described('kdcl_general')
    assert facts['auxiliary'] == {'kind': 'weights', 'parameters': 0}
    assert 'weights of the networks are set after each evaluation' in describe.text(facts)
    with pytest.raises(UserError, match=r'config\.data\.validation_fraction: must be above 0 with'):
        run_lib.prepare(tiny_config(method='kdcl_general', data__validation_fraction=0.0))


def test_without_one_there_is_none():
    assert initial_state(tiny_config(method='dml')).auxiliary is None
    assert describe.describe(tiny_config(method='dml'))['auxiliary'] is None
