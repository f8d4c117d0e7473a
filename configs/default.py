"""The schema of every experiment, and by itself the paper's main one: AFD on CIFAR-100.

Reproduces: a pair of ResNet-32 trained together by AFD. The paper's own number, told by a third
party: 74.03 % top-1 (alone 69.38 %, logit ring only 73.38 %). Ours: not run.

Command: python launch.py --config configs/default.py

An experiment starts from get_config() and assigns fields. There is no other place for a default:
a field that is not here is refused. The networks may be given behind the file's name:
configs/default.py:resnet32,wrn-16-2 is --config.networks="('resnet32','wrn-16-2')".
"""

from ml_collections import config_dict


def get_config(networks: str = 'resnet32,resnet32') -> config_dict.ConfigDict:
    """Returns every field with its default; the comments give meaning, unit and "off" value."""
    config = config_dict.ConfigDict()

    # What is trained, and how. A network learns from its predecessor, the first from the last.
    config.networks = tuple(
        name.strip() for name in networks.split(',')
    )  # at least two names; see afkd_jax/models
    # The networks, counted from 1, as each teaches the next and the last the first, e.g. (1, 3, 2);
    # (): as listed.
    config.ring_order = ()
    config.method = 'afd'  # a preset or LOGITS+MAPS; see afkd_jax/methods.py
    config.epochs = 300  # passes over the training images
    config.batch_size = 128  # images per step over all devices together
    config.eval_batch_size = 1000  # images per evaluation step over all devices together
    config.seed = 0  # weights, order of the images, augmentation, dropout; never the splits
    config.mapping = 'shard_map'  # how the step is mapped over devices: 'shard_map' or 'pmap'

    # Where. Networks of one architecture may live on different devices, the batch always does.
    config.mesh = config_dict.ConfigDict()
    config.mesh.peer = 1  # over how many devices the networks are spread; 1: each has all of them
    config.mesh.data = 0  # into how many shares the batch is split; 0: as many as devices are left
    # In which networks and discriminators compute: 'float32' or 'bfloat16'. Parameters, statistics,
    # losses and optimizers are in float32 either way.
    config.dtype = 'float32'
    # Over which images a norm takes its statistics: 'global', the whole batch; 'local', each
    # device's share, which saves two small sums over devices per norm, but then the result depends
    # on config.mesh.
    config.batch_statistics = 'global'

    # The losses; what a method does not use has no effect.
    config.loss = config_dict.ConfigDict()
    config.loss.temperature = 3.0  # T of the mimicry KL; above 0
    config.loss.kl_weight = 1.0  # of the mimicry KL
    config.loss.kl_ramp_up = 0.0  # fraction of the run in which its weight grows; 0: none
    config.loss.l1_weight = 1.0  # of the L1 between maps
    config.loss.adversarial_weight = 1.0  # of L_G, whose scale Adam mostly takes out again
    config.loss.label_smoothing = 0.0  # of the cross-entropy, in [0, 1); 0: none

    # The images: 'digits', 'idx:DIR', 'folder:DIR' or 'tfds:NAME'; see afkd_jax/data/sources.py.
    config.dataset = 'tfds:cifar100'
    config.data = config_dict.ConfigDict()
    config.data.train_examples = 0  # use the first n of a fixed permutation; 0: all
    config.data.validation_fraction = 0.0  # of the training images, held out; 0: none
    # Where they are kept: 'device', all of them on every device; 'host', in memory, a batch at a
    # time on the devices; 'stream', on disk, read and decoded when they are needed; 'auto': on the
    # devices if they need at most a quarter of their memory, as they are stored, else 'stream'.
    config.data.placement = 'auto'
    # Side of the square to which images are cropped and resized; 0: as they are stored. Otherwise
    # they are streamed, and mean and std must be given; pad and flip come after it.
    config.data.image_size = 0
    config.data.crop_scale = (0.08, 1.0)  # then: share of the area of a random training crop
    config.data.crop_ratio = (3 / 4, 4 / 3)  # then: its width by its height
    # Then: shorter side, of whose centre evaluation sees image_size; usually 8/7 of that.
    config.data.eval_resize = 256
    config.data.pad = 4  # pixels of zeros on each side before a random crop; 0: no crop
    config.data.flip = True  # horizontal, with probability 1/2
    config.data.color_jitter = 0.0  # brightness, contrast, saturation within 1 +- this; 0: none
    # RandAugment: operations per image, of magnitude 0 .. 30, as it is streamed; 0: none.
    config.data.randaugment_operations = 0
    config.data.randaugment_magnitude = 9.0
    # Alpha of the Beta distribution by which an image is mixed with another of its batch, all over
    # (mixup) or in a box (cutmix); with both, each image by either. 0: not.
    config.data.mixup = 0.0
    config.data.cutmix = 0.0
    # Per channel, in 0 .. 1, to standardise by; (): those of the training images.
    config.data.mean = ()
    config.data.std = ()
    config.data.max_corrupt = 0  # 'stream': images that cannot be decoded and are passed over
    config.data.workers = 0  # 'stream': processes that decode; 0: threads of this process
    # tfds only: which part of the set is which, as in 'train[:90%]'; '': train, and test (or, where
    # there is none, validation).
    config.data.train_split = ''
    config.data.test_split = ''
    config.data.manual_dir = ''  # tfds only: where archives already lie; '': nowhere
    config.data.data_dir = ''  # tfds only: prepared sets; '': TFDS's own default

    # Updates feature extractors and classifiers from the logit loss: SGD.
    config.logit = config_dict.ConfigDict()
    config.logit.learning_rate = 0.1
    config.logit.momentum = 0.9  # 0: none
    config.logit.weight_decay = 1e-4  # added to the gradient of every parameter; 0: none
    config.logit.schedule = 'steps'  # 'constant', 'steps' or 'cosine' (to 0 at the end of the run)
    # Where along the run 'steps' multiplies by factor: epochs 150 and 225 of 300.
    config.logit.boundaries = (0.5, 0.75)
    config.logit.factor = 0.1

    # Updates feature extractors and transfer layers from the adversarial loss: Adam.
    config.feature = config_dict.ConfigDict()
    config.feature.learning_rate = 2e-5
    config.feature.weight_decay = 0.0  # added to the gradient; 0: none
    config.feature.schedule = 'steps'
    config.feature.boundaries = (0.25, 0.5)  # epochs 75 and 150 of 300
    config.feature.factor = 0.1

    # Updates the discriminators: Adam.
    config.discriminator = config.feature.copy_and_resolve_references()

    # What is written, and how often. These do not change what is computed, nor do data.manual_dir,
    # data.data_dir, data.workers, data.max_corrupt and data.placement (but to or from 'stream'): of
    # a run that continues they may be changed, but for log_every.
    config.log_every = 50  # steps per line of metrics.jsonl
    config.checkpoint = config_dict.ConfigDict()  # besides those at the end of each epoch:
    config.checkpoint.every_steps = 0  # one each time so many steps are taken; 0: none
    config.checkpoint.every_minutes = 10.0  # one so long after the last; 0: none
    config.checkpoint.keep = 3  # the last n, and for each network its best on validation

    # What is done when a loss or a gradient is no finite number: 'stop' the run, or 'skip' the
    # step: no array is changed by it, and it is counted.
    config.on_nonfinite = 'stop'
    # Warn when the outputs of a discriminator have been within 0.02 of 0 or 1 on own and teacher's
    # maps for so many steps; 0: never.
    config.saturation_steps = 500
    return config
