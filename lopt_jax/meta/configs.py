"""The meta-trainings behind the shipped weights, and a tiny one that a CPU finishes in minutes.

The configs of shipped weights are what their records say, number by number. `outer_steps` is what a
wall-clock budget had room for then; for the first 40 steps the schedule was that of 4,000.
"""

import dataclasses

from lopt_jax.meta.config import MetaTrainConfig
from lopt_jax.meta.unroll import Objective

_TASKS = (
    "tables_mlp_32x2",
    "digits_mlp_64",
    "digits_conv_8",
    "china_autoencoder",
    "diabetes_mlp",
    "bytes_rnn_32",
)
# Two of them are small and noisy, so that overfitting costs; one shape each of the others.
_OVERFITTING_TASKS = (
    "tables_few_mlp_32x2",
    "teacher_few_mlp_32x2",
    "digits_mlp_norm_32x3",
    "digits_conv_8",
    "china_autoencoder",
    "bytes_rnn_32",
)
# Half an Adam, whose steps keep their size, and half the plain momentum, which vanishes with the
# gradient: the first alone runs on when the training loss is gone, and overfits.
_GAINS = (("rms_0", 0.6), ("momentum_0", 0.4))
_NOTES = (
    "Meta-trained on networks of about ten thousand parameters for at most 2,000 steps with small "
    "batches of small data; longer trainings, larger models and other kinds of data are untested "
    "unless the documentation says otherwise."
)

_SMALL_FC_LOPT = MetaTrainConfig(
    name="small_fc_lopt",
    architecture="small_fc_lopt",
    architecture_config=(
        ("hidden_size", 32),
        ("hidden_layers", 2),
        ("exp_mult", 0.1),
        ("step_mult", 0.002),
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.999,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
    ),
    tasks=_TASKS,
    gains=_GAINS,
    reparametrise=1.5,
    outer_steps=348,
    notes=_NOTES,
)

_CELO = MetaTrainConfig(
    name="celo_small",
    architecture="celo",
    architecture_config=(
        ("hidden_size", 8),
        ("hidden_layers", 2),
        ("lstm_hidden_size", 64),
        ("param_inits", 1),
        ("exp_mult", 0.1),
        ("step_mult", 0.02),
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.999,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
    ),
    tasks=_TASKS,
    gains=_GAINS,
    reparametrise=10.0,
    phases=((0.5, ("mlp",)), (0.5, ("lstm", "mix", "input", "step_size"))),
    outer_steps=846,
    notes=_NOTES,
)

_VELO = dataclasses.replace(
    _CELO,
    name="velo_small",
    architecture="velo",
    architecture_config=(
        ("hidden_size", 4),
        ("hidden_layers", 2),
        ("lstm_hidden_size", 64),
        ("param_inits", 16),
        ("exp_mult", 0.1),
        ("step_mult", 0.02),
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.999,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
        ("use_bugged_next_lstm_state", False),
        ("use_bugged_loss_features", False),
    ),
    phases=((1.0, ()),),
    scales=(("controls", 0.01),),
    outer_steps=790,
)

_CELO2 = MetaTrainConfig(
    name="celo2_small",
    architecture="celo2",
    architecture_config=(
        ("hidden_size", 8),
        ("hidden_layers", 2),
        ("exp_mult", 0.1),
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.95,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
    ),
    tasks=_TASKS,
    gains=_GAINS,
    learning_rate_peak=0.003,
    reparametrise=1.5,
    outer_steps=770,
    notes=_NOTES,
)

# Continues from the weights of _CELO2, with the learning rate and the weight decay that did best on
# training tasks, on tasks that are overfitted, and with more weight on the end of a life.
_CELO2_DECAY = dataclasses.replace(
    _CELO2,
    name="celo2_decay",
    outer_steps=4000,
    tasks=_OVERFITTING_TASKS,
    learning_rate_peak=0.01,
    weight_decay=3.0,
    min_horizon=200,
    objective=Objective(final_weight=16.0),
)

# The parameter itself in the direction: a decay that the scheduler scales as it does the step.
_CELO_DECAY = dataclasses.replace(
    _CELO,
    name="celo_decay",
    outer_steps=4000,
    tasks=_OVERFITTING_TASKS,
    gains=(("rms_0", 1.0), ("parameter", 0.3)),
    min_horizon=200,
    objective=Objective(final_weight=16.0),
)

# The recipes of Celo2 (arXiv 2602.19142) and ELO (arXiv 2607.06772), number by number as their
# papers and amoudgl/celo and xiaol827/ELO have them, on pictures that are to be had: in place of
# MNIST, CIFAR-10 and SVHN, scikit-learn's digits and openclipart in grey and in colour.
_PICTURES = ("fashion_mlp_8", "digits_mlp_8", "clipart_mlp_8", "clipart_mlp_8_colour")
_PAPER_NOTES = (
    "A reproduction of a published recipe on other pictures. Meta-trained on MLPs of one hidden "
    "layer of 32 units."
)
_TRAINING_LOSS = Objective(measure="training", logarithm=False, ceiling=10.0, final_weight=0.0)

_CELO2_PAPER = MetaTrainConfig(
    name="celo2_paper",
    architecture="celo2",
    architecture_config=(
        ("hidden_size", 8),
        ("hidden_layers", 2),
        ("exp_mult", 0.0),  # no learned magnitude
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.95,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
    ),
    tasks=_PICTURES,
    join=True,  # three of them have one shape
    gains=(),
    learning_rate_peak=0.001,
    schedule="constant",
    rule_options=(("adam_learning_rate_mult", 20.0), ("adam_betas", (0.9, 0.95))),
    num_pairs=8,
    standard_deviation=0.01,
    truncation_length=50,
    min_horizon=100,
    max_horizon=2000,
    objective=_TRAINING_LOSS,
    reparametrise=1000.0,  # six decades
    reparametrise_level="global",
    outer_steps=100_000,
    outer_learning_rate=5e-5,
    outer_schedule="constant",
    outer_warmup=0,
    outer_weight_decay=1e-4,
    outer_second_decay=0.999,
    gradient_clip=1e6,  # none
    log_every=100,
    deal_every=2000,  # stored states are gone then: a life can be of 100,000 steps
    notes=_PAPER_NOTES,
)

_ELO_CELO2_PAPER = dataclasses.replace(
    _CELO2_PAPER,
    name="elo_celo2_paper",
    architecture="elo_celo2",
    weight_decay=0.1,
    schedule="warmup_cosine",
    rule_options=(),  # which clips gradients to norm 1
    horizons="uniform",
    resume=0.8,
    expert="muon",
    expert_learning_rate=0.01,
    expert_steps=(5_000, 50_000),
    imitation_direction=(0.7, 0.21),
    imitation_size=(0.3, 0.0),
    outer_learning_rate=1e-4,
    outer_schedule="cosine",
    outer_warmup=100,
    gradient_clip=1.0,
)

_ELO_SMALL_FC_PAPER = dataclasses.replace(
    _ELO_CELO2_PAPER,
    name="elo_small_fc_paper",
    architecture="elo",
    architecture_config=(
        ("hidden_size", 32),
        ("hidden_layers", 2),
        ("exp_mult", 0.001),
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.999,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
    ),
    weight_decay=0.0,
    schedule="warmup_constant",
    expert="adamw",
)

# A direction inside the recipe of `lopt`, which is in the loop as users have it. The start says
# what the linear rule says: the gradient and its momentum, each of root mean square one. So what
# the outer steps learn comes on top of today's `lopt`.
_LOPT_LINEAR_START = (("gradient", 1.0), ("momentum_0", 1.0))
_DIRECTION_NOTES = (
    "A direction for matrices inside the recipe of lopt_jax.lopt. Meta-trained on networks of "
    "3,000 to 67,000 parameters for at most 2,000 steps."
)

_LOPT_DIRECTION = MetaTrainConfig(
    name="lopt_direction",
    architecture="celo2",
    architecture_config=(
        ("hidden_size", 8),
        ("hidden_layers", 2),
        ("exp_mult", 0.0),
        ("initial_momentum_decays", (0.9, 0.99, 0.999)),
        ("initial_rms_decays", (0.95,)),
        ("initial_adafactor_decays", (0.9, 0.99, 0.999)),
    ),
    tasks=(
        "clipart_mlp_norm_32x3",
        "clipart_mlp_48x2_colour",
        "clipart_conv_colour",
        "clipart_transformer_colour",
        "words_rnn_48",
        "words_transformer_48",
        "teacher_mlp_32x3",
    ),
    gains=_LOPT_LINEAR_START,
    recipe="lopt",
    schedule="constant",
    weight_decay=1.0,
    num_pairs=64,
    standard_deviation=0.01,
    truncation_length=50,
    min_horizon=100,
    max_horizon=2000,
    reparametrise=1.5,
    outer_steps=4000,
    outer_learning_rate=1e-3,
    outer_warmup=100,
    log_every=25,
    deal_every=250,
    notes=_DIRECTION_NOTES,
)

# Four numbers in place of a network: the gradient and three momenta.
_LOPT_LINEAR = dataclasses.replace(
    _LOPT_DIRECTION,
    name="lopt_linear",
    architecture="linear",
    architecture_config=(("initial_momentum_decays", (0.9, 0.99, 0.999)),),
    standard_deviation=0.05,
    outer_steps=2000,
    outer_learning_rate=5e-3,
)

# For CPUs: few pairs and short trainings of small networks.
_LOPT_DIRECTION_SMALL = dataclasses.replace(
    _LOPT_DIRECTION,
    name="lopt_direction_small",
    tasks=("words_transformer_24", "clipart_mlp_norm_32x3", "teacher_mlp_32x3"),
    num_pairs=4,
    truncation_length=20,
    min_horizon=100,
    max_horizon=400,
    standard_deviation=0.02,
    outer_steps=2000,
    outer_warmup=20,
    log_every=5,
    deal_every=50,
)

_TINY = MetaTrainConfig(
    name="tiny",
    architecture="small_fc_lopt",
    architecture_config=(
        *(
            pair
            for pair in _SMALL_FC_LOPT.architecture_config
            if pair[0] not in ("hidden_size", "step_mult")
        ),
        ("hidden_size", 4),
        # Far too small a step, so that there is something to learn in a minute.
        ("step_mult", 0.0005),
    ),
    tasks=("tables_mlp_16",),
    num_pairs=8,
    truncation_length=20,
    measure_every=10,
    min_horizon=40,
    max_horizon=100,
    standard_deviation=0.03,
    outer_steps=200,
    outer_learning_rate=0.03,
    outer_warmup=5,
    objective=Objective(floor=0.03),
    notes="A demonstration for CPUs; not for use.",
)

# From Adam at a rate of 1e-4, far too small as well.
_NN_ADAM_TINY = dataclasses.replace(
    _TINY,
    name="nn_adam_tiny",
    architecture="nn_adam",
    architecture_config=(("lstm_hidden_size", 8), ("output_scale", 0.01)),
    gains=(),
)

CONFIGS: dict[str, MetaTrainConfig] = {
    config.name: config
    for config in (
        _TINY,
        _NN_ADAM_TINY,
        _SMALL_FC_LOPT,
        dataclasses.replace(
            _SMALL_FC_LOPT,
            name="small_fc_lopt_h4",
            outer_steps=485,
            architecture_config=(
                ("hidden_size", 4),
                *(pair for pair in _SMALL_FC_LOPT.architecture_config if pair[0] != "hidden_size"),
            ),
        ),
        _CELO,
        _VELO,
        _CELO2,
        _CELO2_DECAY,
        _CELO_DECAY,
        _CELO2_PAPER,
        _ELO_CELO2_PAPER,
        _ELO_SMALL_FC_PAPER,
        _LOPT_DIRECTION,
        _LOPT_LINEAR,
        _LOPT_DIRECTION_SMALL,
    )
}
