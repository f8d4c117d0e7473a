"""The adversary's switches, each against a plain float64 derivation in NumPy."""

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
    softmax,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.config import Adversarial, Discriminator, Loss
from afkd_jax.data.augment import Mixed
from afkd_jax.method import adversary, losses
from afkd_jax.method.objective import Objective, _Pair
from afkd_jax.method.presets import Method
from afkd_jax.method.ring import Ring
from afkd_jax.models import layers

CLASSES = 4


def objective(weight=1.0, adversarial=Adversarial(), ramp=0, **settings):  # noqa: B008 - frozen
    method = Method('nobody', 'adversarial')
    return Objective(
        method, Ring((0, 1)), Loss(adversarial_weight=weight), 0, (),
        Discriminator(**settings), adversarial, ramp,
    )  # fmt: skip


def random_maps(size=3, seed=0):
    return np.random.default_rng(seed).standard_normal((2, 5, size, size, 2))


# --- Losses: D(map) = w . map, so that every gradient is a line. ---


def linear(w, maps, condition):
    return (w[None] * maps).sum((1, 2, 3)), {}


BY_HAND = {
    # L_G, its slope; L_D, its slopes to D(fake) and D(real); where D lies between its goals
    'hinge': (
        lambda d: -d,
        lambda d: -np.ones_like(d),
        lambda d, real: np.maximum(0, 1 - real) + np.maximum(0, 1 + d),
        lambda d, real: (1.0 * (d > -1), -1.0 * (real < 1)),
        lambda d: np.clip((d + 1) / 2, 0, 1),
    ),
    'lsgan_linear': (
        lambda d: (1 - d) ** 2,
        lambda d: -2 * (1 - d),
        lambda d, real: (1 - real) ** 2 + d**2,
        lambda d, real: (2 * d, -2 * (1 - real)),
        lambda d: np.clip(d, 0, 1),
    ),
}


@pytest.mark.parametrize('loss', BY_HAND)
def test_losses_equal_numpy(loss, x64):
    value, slope, loss_D, slopes_D, between = BY_HAND[loss]
    maps, w = random_maps(), 0.3 * np.random.default_rng(1).standard_normal((2, 3, 3, 2))
    to_maps, to_params, _, values = objective(3.0, loss=loss).of_adversaries(
        [linear] * 2, list(jnp.array(w)), jnp.array(maps)
    )
    for k in range(2):
        own, teacher = maps[k], maps[1 - k]
        d, real = ((m * w[k]).sum((1, 2, 3)) for m in (own, teacher))
        assert min(d) < -1 < max(d)  # both sides of the hinge
        np.testing.assert_allclose(values['adversarial'][k], value(d).mean())
        np.testing.assert_allclose(values['discriminator'][k], loss_D(d, real).mean())
        np.testing.assert_allclose(values['d_own'][k], between(d).mean())
        np.testing.assert_allclose(values['d_teacher'][k], between(real).mean())
        expected = 3.0 * slope(d)[:, None, None, None] * w[k] / 5
        np.testing.assert_allclose(to_maps[k], expected, rtol=1e-9)
        by_own, by_real = slopes_D(d, real)
        expected = np.einsum('b,bhwc->hwc', by_own, own) / 5
        expected += np.einsum('b,bhwc->hwc', by_real, teacher) / 5
        np.testing.assert_allclose(to_params[k], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('loss', losses.ADVERSARIAL)
def test_reported_outputs_run_from_the_goal_for_fake_to_that_for_real(loss):
    # L_D of one number is least at the goals: 0 and 1 are where D errs least.
    it, d = losses.ADVERSARIAL[loss], np.linspace(-1, 1, 201)
    worst = it.discriminator(d, np.full_like(d, 1.0))
    assert it.between(d[np.argmin(worst)]) == 0
    assert it.between(d[np.argmin(worst)] + 0.1) > 0
    real = it.discriminator(np.full_like(d, d[np.argmin(worst)]), d)
    assert it.between(d[np.argmin(real)]) == pytest.approx(1)


# --- The discriminator in NumPy. ---


def conv(x, layer, stride, padding):
    kernel, bias = layer['kernel'], layer.get('bias', 0.0)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = kernel.shape[:2]
    h, w = ((x.shape[1] - rows) // stride + 1, (x.shape[2] - columns) // stride + 1)
    y = np.zeros((len(x), h, w, kernel.shape[3]))
    for i in range(h):
        for j in range(w):
            window = x[:, stride * i : stride * i + rows, stride * j : stride * j + columns]
            y[:, i, j] = np.einsum('bhwc,hwcd->bd', window, kernel)
    return y + bias


def power_iteration(kernel, u):
    """Returns the kernel divided by its estimated largest singular value, and the new vector."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    v = u @ matrix.T
    v /= np.linalg.norm(v)
    u = v @ matrix
    u /= np.linalg.norm(u)
    return kernel / (v @ matrix @ u.T)[0, 0], u


def plain(settings, params, stats, maps, condition):
    """Returns the discriminator's outputs, written out."""
    params = {name: dict(layer) for name, layer in params.items()}
    if settings.norm == 'spectral':
        for vectors in stats.values():
            [path] = [name for name in vectors if name.endswith('/u')]
            layer = params[path.split('/')[0]]
            layer['kernel'], _ = power_iteration(layer['kernel'], vectors[path])
    x, pooled = maps, settings.input == 'pooled'
    if pooled:
        x = x.mean((1, 2), keepdims=True)
    for n in range(settings.layers):
        x = conv(x, params[f'Conv_{n}'], 2 if n == 0 and not pooled else 1, 0 if pooled else 1)
        if settings.norm in ('batch', 'joint'):
            norm = params[f'BatchNorm_{n}']
            x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
            x = x * norm['scale'] + norm['bias']
        x = np.where(x > 0, x, 0.2 * x)
    d = conv(x, params[f'Conv_{settings.layers}'], 1, 0)[..., 0]
    if condition is not None:
        inner = np.einsum('bhwc,bc->bhw', x, condition @ params['projection']['kernel'])
        d = d + (inner if settings.input == 'patch' else inner.mean((1, 2), keepdims=True))
    if settings.loss == 'lsgan':
        d = 1 / (1 + np.exp(-d))
    return d if settings.input == 'patch' else d[:, 0, 0]


@functools.cache
def built(settings, size=5):
    """Returns the module, and its variables, every one of them random."""
    module = adversary.Discriminator(
        layers.layers(None), settings, 0 if settings.condition == 'none' else CLASSES
    )
    condition = np.zeros((1, CLASSES)) if module.classes else None
    variables = module.init(jax.random.key(0), np.zeros((1, size, size, 2)), condition)
    rng = np.random.default_rng(3)
    variables = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape), variables)
    return module, variables['params'], variables['batch_stats'] if module.has_state else {}


def applied(module, stats):
    def discriminate(params, maps, condition):
        variables = {'params': params, 'batch_stats': stats}
        d, new = module.apply(variables, maps, condition, mutable=['batch_stats'])
        return d, new['batch_stats'] if module.has_state else {}

    return discriminate


SWITCHES = [
    {},
    {'loss': 'lsgan_linear', 'layers': 3, 'width': 4},
    {'norm': 'joint', 'loss': 'hinge', 'condition': 'label'},
    {'norm': 'spectral', 'loss': 'hinge', 'condition': 'probabilities', 'layers': 2},
    {'norm': 'none', 'input': 'patch', 'condition': 'label', 'width': 3},
    {'norm': 'none', 'input': 'pooled', 'condition': 'probabilities', 'layers': 2},
    {'norm': 'joint', 'input': 'pooled'},
]


@pytest.mark.parametrize('settings', SWITCHES, ids=str)
def test_discriminators_and_their_gradients_equal_numpy(settings, x64):
    # Values, L_G's gradient to the map and L_D's to the parameters, the gradients by differences
    # of the losses of a discriminator written in NumPy.
    it, maps = objective(**settings), random_maps(size=5)
    settings = it.discriminator
    module, params, stats = built(settings)
    logits = np.random.default_rng(4).standard_normal((2, 5, CLASSES))
    labels = np.array([0, 3, 1, 1, 2])
    conditions = it.conditions(jnp.array(logits), jnp.array(logits), labels)
    told = {
        'none': lambda k: None, 'label': lambda k: np.eye(CLASSES)[labels],
        'probabilities': lambda k: softmax(logits[k]),
    }[settings.condition]  # fmt: skip

    def outputs(params, own):
        condition, other = told(0), told(1)
        if settings.norm != 'joint':
            of = functools.partial(plain, settings, params, stats)
            return of(own, condition), of(maps[1], other)
        both = None if condition is None else np.concatenate([condition, other])
        d = plain(settings, params, stats, np.concatenate([own, maps[1]]), both)
        return d[:5], d[5:]

    def loss_G(params, own):
        d = outputs(params, own)[0]
        return (-d if settings.loss == 'hinge' else (1 - d) ** 2).mean()

    def loss_D(params, own):
        d, real = outputs(params, own)
        if settings.loss == 'hinge':
            return (np.maximum(0, 1 - real) + np.maximum(0, 1 + d)).mean()
        return ((1 - real) ** 2 + d**2).mean()

    of_adversaries = jax.jit(
        functools.partial(it.of_adversaries, [applied(module, stats), None])
    )  # the second network is frozen
    to_maps, to_params, states, values = of_adversaries(
        [params, None], jnp.array(maps), None, conditions
    )
    np.testing.assert_allclose(values['adversarial'][0], loss_G(params, maps[0]), rtol=1e-9)
    np.testing.assert_allclose(values['discriminator'][0], loss_D(params, maps[0]), rtol=1e-9)

    rng, e = np.random.default_rng(5), 1e-6
    along = rng.standard_normal(maps[0].shape)
    slope = (loss_G(params, maps[0] + e * along) - loss_G(params, maps[0] - e * along)) / (2 * e)
    np.testing.assert_allclose((to_maps[0] * along).sum(), slope, rtol=1e-5)
    if settings.norm == 'spectral':
        assert len(stats) == settings.layers + 2  # of each layer's kernel and the projection's
        # Its gradient holds u and v still; differences do not.
        for vectors, new in zip(stats.values(), states[0].values(), strict=True):
            [path] = [name for name in vectors if name.endswith('/u')]
            _, u = power_iteration(params[path.split('/')[0]]['kernel'], vectors[path])
            np.testing.assert_allclose(new[path], u, rtol=1e-9)
        return
    assert states[0] == {}
    along = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    moved = [jax.tree.map(lambda p, a, e=e: p + e * a, params, along) for e in (e, -e)]
    slope = (loss_D(moved[0], maps[0]) - loss_D(moved[1], maps[0])) / (2 * e)
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, a: (g * a).sum(), to_params[0], along)))
    np.testing.assert_allclose(found, slope, rtol=1e-5)


def test_spectral_norm_reaches_the_largest_singular_value(x64):
    settings = Discriminator(norm='spectral', loss='hinge')
    module, params, stats = built(settings)
    maps = random_maps(size=5)[0]
    step = jax.jit(lambda stats: applied(module, stats)(params, maps, None)[1])
    for _ in range(300):
        stats = step(stats)
    for vectors in stats.values():
        [sigma] = [float(value) for name, value in vectors.items() if name.endswith('/sigma')]
        [path] = [name for name in vectors if name.endswith('/u')]
        kernel = params[path.split('/')[0]]['kernel']
        largest = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]))[1][0]
        np.testing.assert_allclose(sigma, largest, rtol=1e-6)


def test_mixed_labels_are_conditions_by_their_weights(x64):
    labels, other, weight = np.array([0, 3]), np.array([1, 3]), np.array([0.25, 0.5])
    it = objective(condition='label')
    mixed = Mixed(jnp.array(other), jnp.array(weight))
    own, teachers = it.conditions(*2 * [jnp.zeros((2, 2, CLASSES))], jnp.array(labels), mixed)
    expected = [[0.25, 0.75, 0, 0], [0, 0, 0, 1]]
    for told in (*own, *teachers):
        np.testing.assert_allclose(told, expected)


@pytest.mark.parametrize('every', [1, 4])
def test_the_penalty_on_real_maps_equals_numpy(every, x64):
    # D = tanh(w . m): its slope is (1 - D^2) w, and the penalty r1 / 2 mean (1 - D^2)^2 |w|^2.
    def discriminator(w, maps, condition):
        return jnp.tanh((w[None] * maps).sum((1, 2, 3))), {}

    maps, w = random_maps(), 0.3 * np.random.default_rng(1).standard_normal((2, 3, 3, 2))

    @functools.cache
    def compiled(r1):
        it = objective(loss='hinge', r1=r1, r1_every=every)
        return jax.jit(functools.partial(it.of_adversaries, [discriminator] * 2))

    def gradient(step, r1):
        return np.array(
            compiled(r1)(list(jnp.array(w)), jnp.array(maps), None, None, jnp.int32(step))[1]
        )

    def penalty(w, real):
        d = np.tanh((real * w).sum((1, 2, 3)))
        return 0.7 / 2 * ((1 - d**2) ** 2).mean() * (w**2).sum()

    along, e = np.random.default_rng(2).standard_normal(w[0].shape), 1e-6
    for step in range(5):
        more = gradient(step, 0.7) - gradient(step, 0.0)
        for k in range(2):
            ends = [penalty(w[k] + s * e * along, maps[1 - k]) for s in (1, -1)]
            slope = every * (ends[0] - ends[1]) / (2 * e) if step % every == 0 else 0.0
            np.testing.assert_allclose((more[k] * along).sum(), slope, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_the_penalty_of_a_joint_batch_and_of_patches(x64):
    # By differences: the slope of the teacher's outputs, each the mean over its locations, to one
    # element of one of the teacher's maps.
    for settings in ({'norm': 'joint'}, {'norm': 'none', 'input': 'patch'}):
        it, maps = objective(loss='hinge', **settings), random_maps(size=5)
        module, params, stats = built(it.discriminator)
        found = pair_of(applied(module, stats), params, maps).slope(
            params, it.discriminator.norm == 'joint'
        )
        squares, e = 0.0, 1e-6
        for index in np.ndindex(maps[1].shape):
            ends = []
            for s in (e, -e):
                real = maps[1].copy()
                real[index] += s
                both = np.concatenate([maps[0], real]) if it.discriminator.norm == 'joint' else real
                d = plain(it.discriminator, params, stats, both, None)[-5:]
                ends.append(d.reshape(5, -1).mean(1).sum())
            squares += ((ends[0] - ends[1]) / (2 * e)) ** 2
        np.testing.assert_allclose(found, squares / 5, rtol=1e-5)


def pair_of(discriminator, params, maps):
    return _Pair(discriminator, params, tuple(jnp.array(maps)), (None, None))


# --- The networks' side, in a step of plain gradient descent by the logit optimizer. ---

PAIR = ('tiny-4-2', 'tiny-6-2')  # only the first has a transfer layer
RATE = 0.1


@functools.cache
def one_step(weight, **fields):
    """Returns the state before and after a step, and its values."""
    config = tiny_config(
        PAIR,
        method='adversarial',
        batch_size=8,
        epochs=4,
        loss__adversarial_weight=weight,
        logit__learning_rate=RATE,
        logit__momentum=0.0,
        logit__weight_decay=0.0,
        adversarial__optimizer='logit',
        **fields,
    )
    devices = take_devices(1)
    state = as_float64(initial_state(config))
    batch = map(devices.split, as_float64(random_batch(8)))
    after, values = mapped_update(config, devices)(devices.replicate(state), *batch)
    return jax.device_get((state, after, values))


def moved_by(weight, network, **fields):
    """Returns by how much the step moves the network's trunk and transfer layer."""
    before, after, _ = one_step(weight, **fields)
    parts = [
        [state.networks[network].params[part] for part in ('trunk', 'transfer')]
        for state in (before, after)
    ]
    leaves = zip(*map(jax.tree.leaves, parts), strict=True)
    return np.concatenate([(new - old).ravel() for old, new in leaves])


def adversarial_move(network, weight=1.0, **fields):
    """Returns what of it is due to L_G."""
    return moved_by(weight, network, **fields) - moved_by(0.0, network)


@pytest.mark.slow
def test_the_logit_optimizer_takes_both_gradients(x64):
    # Adam's first moment after one step is 0.1 times the gradient of L_G.
    config = tiny_config(PAIR, method='adversarial', batch_size=8, epochs=4)
    devices, batch = take_devices(1), as_float64(random_batch(8))
    state = devices.replicate(as_float64(initial_state(config)))
    after, _ = mapped_update(config, devices)(state, *map(devices.split, batch))
    assert 'grad_norm_feature' not in one_step(1.0)[2]
    for k in range(2):
        gradient = after.networks[k].opt['feature'][1].mu
        parts = [gradient[part] for part in ('trunk', 'transfer')]
        flat = 10 * np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(parts)])
        np.testing.assert_allclose(adversarial_move(k), -RATE * flat, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_balanced_weight_is_the_ratio_of_the_gradients_at_the_map(x64):
    state, _, _ = one_step(1.0)
    images, labels = as_float64(random_batch(8))
    config = tiny_config(PAIR, method='adversarial', batch_size=8)
    cohort, ratios, passes = tiny_cohort(config), [], []
    for k, own in enumerate(state.networks):
        both, _ = cohort.networks[k].apply(own.variables(), images, True, mutable=['batch_stats'])
        passes.append(both)

    def transferred(k, maps):
        if cohort.transfers[k] is None:
            return maps
        variables = state.networks[k].transfer_variables()
        return cohort.transfers[k].apply(variables, maps, True, mutable=['batch_stats'])[0]

    for k in range(2):
        logits, maps = passes[k]
        kernel = state.networks[k].params['head']['Dense_0']['kernel']
        # Every location has 1 / (h w) of the gradient to the pooled map.
        by_logits = (softmax(np.array(logits)) - np.eye(10)[labels]) / 8 @ kernel.T
        squares = (by_logits**2).sum() / (maps.shape[1] * maps.shape[2])

        def loss(maps, k=k):
            params = state.discriminators[k].params
            d = cohort.discriminators[k].apply(
                {'params': params}, transferred(k, maps), mutable=['batch_stats']
            )[0]
            return ((1 - d) ** 2).mean()

        ratios.append(np.sqrt(squares) / np.linalg.norm(jax.grad(loss)(maps)))
    limit = sum(ratios) / 2  # one of the weights is clipped
    fields = {'adversarial__balance': 'gradnorm', 'adversarial__balance_limit': float(limit)}
    values = one_step(0.5, **fields)[2]
    expected = np.minimum(ratios, limit)
    np.testing.assert_allclose(values['adversarial_balance'], expected, rtol=1e-9)
    for k in range(2):
        move = 0.5 * expected[k] * adversarial_move(k)
        np.testing.assert_allclose(adversarial_move(k, 0.5, **fields), move, rtol=1e-7, atol=1e-12)


def test_only_the_worse_network_learns_with_better_only(x64):
    entropies = one_step(1.0)[2]['cross_entropy']
    worse = int(np.argmax(entropies))
    fields = {'adversarial__direction': 'better_only'}
    np.testing.assert_allclose(
        adversarial_move(worse, **fields), adversarial_move(worse), rtol=1e-9, atol=1e-14
    )
    assert np.abs(adversarial_move(worse)).max() > 1e-6
    assert np.abs(adversarial_move(1 - worse, **fields)).max() < 1e-14
    values = one_step(1.0, **fields)[2]
    assert np.all(values['grad_norm_discriminator'] > 0)  # both discriminators learn


def test_the_weight_of_the_adversarial_loss_rises(x64):
    it = objective(2.0, ramp=8)
    steps = np.arange(10)
    expected = [2 * np.exp(-5 * (1 - min(t / 8, 1)) ** 2) for t in steps]
    np.testing.assert_allclose([it.adversarial_weight(t) for t in steps], expected)
    fields = {'adversarial__warm_up': 0.25}
    move = np.exp(-5) * adversarial_move(0)  # of step 0
    np.testing.assert_allclose(adversarial_move(0, **fields), move, rtol=1e-7, atol=1e-12)
