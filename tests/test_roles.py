"""What `lopt` takes for an embedding, a head, a norm or a bias in models of linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lopt_jax
from lopt_jax.optimizers.plans import Matrix
from lopt_jax.optimizers.roles import BIAS, EMBEDDING, HEAD, MATRIX, NORM, VECTOR, roles_of

WIDTH, VOCABULARY = 12, 40
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def roles_by_name(params, stacked=None):
    """The role of every leaf, by its path; as `describe` says it."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    roles = roles_of(params, stacked or [0] * len(leaves))
    found = lopt_jax.describe(lopt_jax.lopt(10), params).leaves if stacked is None else []
    for leaf, role in zip(found, roles, strict=False):
        assert leaf.reason.startswith(f"{role.name}: {role.reason}")
        assert leaf.rule == ("learned" if role.name == MATRIX else "adamw")
    return {
        ".".join(lopt_jax.optimizers.plans.names_of(path)): role.name
        for (path, _), role in zip(leaves, roles, strict=True)
    }


def of_linen(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return roles_by_name(shapes["params"])


def of_nnx(build):
    return roles_by_name(nnx.eval_shape(lambda: nnx.state(build(nnx.Rngs(0)), nnx.Param)))


def check(found, **expected):
    """Roles of leaves that are no matrices, by path; norms and biases by their names."""
    for path, role in found.items():
        usual = {"bias": BIAS, "scale": NORM}.get(path.split(".")[-1], MATRIX)
        assert role == expected.get(path.replace(".", "__"), usual), path
    assert set(expected) <= {path.replace(".", "__") for path in found}


# -- linen --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Grouped queries and a gated MLP: kernels of outputs that only reshaped arrays read."""

    @nn.compact
    def __call__(self, x):
        y = nn.RMSNorm()(x)
        q = nn.Dense(WIDTH, name="q_proj", use_bias=False)(y)
        k = nn.Dense(WIDTH // 3, name="k_proj", use_bias=False)(y)
        v = nn.Dense(WIDTH // 3, name="v_proj", use_bias=False)(y)
        x = x + nn.Dense(WIDTH, name="o_proj")(q + jnp.tile(k + v, 3))
        y = nn.LayerNorm()(x)
        gate, up = jnp.split(nn.Dense(6 * WIDTH, name="gate_up")(y), 2, axis=-1)
        return x + nn.Dense(WIDTH, name="down")(nn.silu(gate) * up)


class Gpt(nn.Module):
    tied: bool
    layers: int = 2
    head: str = "lm_head"

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(tokens) + self.param("pos_emb", nn.initializers.normal(), (5, WIDTH))
        for _ in range(self.layers):
            x = Block()(x)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(VOCABULARY, name=self.head)(x)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("head", [None, "lm_head", "Dense_0", "to_tokens"])
def test_gpt_of_linen(head, layers):
    found = of_linen(Gpt(head is None, layers, head or ""), TOKENS)
    heads = {} if head is None else {f"{head}__kernel": HEAD}
    check(found, Embed_0__embedding=EMBEDDING, pos_emb=EMBEDDING, **heads)


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), (4, 4), name="embedding")(images).reshape((2, -1, WIDTH))
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (2, 1, 1)), x], 1)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 5, WIDTH))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


def test_vit_of_linen():
    """Patches are read by a matrix, whatever it is called; biases of attention have two axes."""
    found = of_linen(Vit(), IMAGES)
    check(found, cls=EMBEDDING, pos_embedding=EMBEDDING, Dense_4__kernel=HEAD)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (3, 3), name="stem")(images)
        for width in (8, 16):
            y = nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1], name=f"dw{width}")(x)
            y = nn.GroupNorm(4)(nn.Conv(width, (1, 1))(y))
            x = nn.relu(y + nn.Conv(width, (1, 1), name=f"shortcut{width}")(x))
        return nn.Dense(10)(x.mean((1, 2)))


def test_conv_net_of_linen():
    found = of_linen(ConvNet(), IMAGES)
    check(found, dw8__kernel=VECTOR, dw16__kernel=VECTOR, Dense_0__kernel=HEAD)


class ActorCritic(nn.Module):
    names: tuple = (None, None)

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(32)(x))
        x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(4, name=self.names[0])(x), nn.Dense(1, name=self.names[1])(x)


@pytest.mark.parametrize("names", [("Dense_2", "Dense_3"), ("policy", "value")])
def test_actor_critic_of_linen(names):
    """Two heads, one of them of a single output."""
    found = of_linen(ActorCritic(names), jax.ShapeDtypeStruct((2, 6), jnp.float32))
    check(found, **{f"{names[0]}__kernel": HEAD, f"{names[1]}__kernel": HEAD})


def test_rnn_of_linen():
    class Rnn(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, 8)(tokens)
            return nn.Dense(VOCABULARY)(nn.RNN(nn.OptimizedLSTMCell(16))(x))

    check(of_linen(Rnn(), TOKENS), Embed_0__embedding=EMBEDDING, Dense_0__kernel=HEAD)


# -- NNX ----------------------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, WIDTH, WIDTH, decode=False, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 6 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(3 * WIDTH, WIDTH, rngs=rngs)


class NnxGpt(nnx.Module):
    def __init__(self, rngs, head):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((5, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        if head:
            setattr(self, head, nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs))


@pytest.mark.parametrize("head", [None, "unembed", "to_tokens"])
def test_gpt_of_nnx(head):
    heads = {} if head is None else {f"{head}__kernel": HEAD}
    found = of_nnx(lambda rngs: NnxGpt(rngs, head))
    check(found, embed__embedding=EMBEDDING, positions=EMBEDDING, **heads)


def test_vit_of_nnx():
    class NnxVit(nnx.Module):
        def __init__(self, rngs):
            self.patch_embedding = nnx.Conv(3, WIDTH, (4, 4), rngs=rngs)
            self.pos_embed = nnx.Param(jnp.zeros((1, 5, WIDTH)))
            self.blocks = nnx.List([NnxBlock(rngs)])
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.classifier = nnx.Linear(WIDTH, 10, rngs=rngs)

    check(of_nnx(NnxVit), pos_embed=EMBEDDING, classifier__kernel=HEAD)


def test_resnet_of_nnx():
    class NnxResNet(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.linear = nnx.Linear(16, 10, rngs=rngs)

    check(of_nnx(NnxResNet), linear__kernel=HEAD)


def test_actor_critic_of_nnx():
    class NnxActorCritic(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 32, rngs=rngs)
            self.second = nnx.Linear(32, 32, rngs=rngs)
            self.actor = nnx.Linear(32, 4, rngs=rngs)
            self.critic = nnx.Linear(32, 1, rngs=rngs)

    check(of_nnx(NnxActorCritic), actor__kernel=HEAD, critic__kernel=HEAD)


def test_lora_of_nnx():
    """Adapters, which are all that is trained: neither factor is a head."""

    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)
            self.up = nnx.LoRALinear(WIDTH, 4 * WIDTH, lora_rank=2, rngs=rngs)

    build = lambda: nnx.state(Adapted(nnx.Rngs(0)), nnx.LoRAParam)  # noqa: E731
    found = roles_by_name(nnx.eval_shape(build))
    assert len(found) == 4
    assert set(found.values()) == {MATRIX}


# -- flat dictionaries ----------------------------------------------------------------------------


def shapes(tree):
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, jnp.float32), tree, is_leaf=is_shape)


def test_names_of_haiku():
    found = roles_by_name(
        shapes(
            {
                "embed": {"embeddings": (VOCABULARY, 8)},
                "token_embedding": {"w": (VOCABULARY, 8)},
                "mlp/~/linear_0": {"w": (8, 16), "b": (16,)},
                "mlp/~/linear_1": {"w": (16, 8), "b": (8,)},
                "layer_norm": {"scale": (8,), "offset": (8,)},
                "conv2_d": {"w": (3, 3, 8, 8)},
                "linear": {"w": (8, VOCABULARY), "b": (VOCABULARY,)},
            }
        )
    )
    assert found == {
        "embed.embeddings": EMBEDDING,
        "token_embedding.w": EMBEDDING,
        "mlp/~/linear_0.w": MATRIX,
        "mlp/~/linear_0.b": BIAS,
        "mlp/~/linear_1.w": MATRIX,
        "mlp/~/linear_1.b": BIAS,
        "layer_norm.scale": NORM,
        "layer_norm.offset": BIAS,
        "conv2_d.w": MATRIX,
        "linear.w": HEAD,
        "linear.b": BIAS,
    }


def test_a_convolution_of_haiku_is_one_matrix():
    (role,) = roles_of(shapes({"conv2_d": {"w": (3, 3, 8, 16)}}), [0])
    assert role.matrix == Matrix((-4, -3, -2), (-1,))


def test_lists_and_flat_names():
    found = roles_by_name(shapes({"w0": (6, 32), "b0": (32,), "w1": (32, 32), "w2": (32, 3)}))
    assert found == {"b0": VECTOR, "w0": MATRIX, "w1": MATRIX, "w2": HEAD}
    layers = roles_by_name(shapes([((6, 32), (32,)), ((32, 3), (3,))]))
    assert list(layers.values()) == [MATRIX, VECTOR, HEAD, VECTOR]
    assert roles_by_name(shapes((4, 5))) == {"": HEAD}
    assert roles_by_name(shapes(())) == {"": VECTOR}


def test_scanned_blocks_hold_no_heads():
    params = shapes(
        {
            "blocks": {"gate": {"kernel": (3, WIDTH, 7 * WIDTH)}, "norm": {"scale": (3, WIDTH)}},
            "embed": {"embedding": (VOCABULARY, WIDTH)},
            "out": {"kernel": (WIDTH, VOCABULARY)},
        }
    )
    stacked = [1, 1, 0, 0]
    found = roles_by_name(params, stacked)
    assert list(found.values()) == [MATRIX, NORM, EMBEDDING, HEAD]


def test_a_description_prints_as_a_table():
    params = jax.eval_shape(Gpt(False).init, jax.random.key(0), TOKENS)["params"]
    lines = repr(lopt_jax.describe(lopt_jax.lopt(10), params)).splitlines()
    titles = next(line for line in lines if line.startswith("leaf")).split()
    assert " ".join(titles) == "leaf shape tensors matrix rule scale decay backend why"
    (head,) = [line for line in lines if "lm_head" in line and "kernel" in line]
    assert "adamw" in head
    assert "head: named 'lm_head'" in head
    (gate,) = [line for line in lines if all(x in line for x in ("Block_0", "gate_up", "kernel"))]
    assert f"{WIDTH} x {6 * WIDTH}" in gate
    assert "learned" in gate
    np.testing.assert_allclose(
        float(gate.split("learned")[1].split()[0]), lopt_jax.Recipe().matrix / WIDTH**0.5, 0.01
    )
