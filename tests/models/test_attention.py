"""Attention taken a few windows at a time against the plain formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bhsd_jax.models import attention
from bhsd_jax.models.attention import attend

SHAPE = (2, 6, 5, 3, 4)  # samples, windows, tokens, heads, depth


@pytest.fixture
def tokens(key):
    """Query, key, value; bias; regions of the tokens in every window."""
    *parts, bias = (
        jax.random.normal(k, shape)
        for k, shape in zip(jax.random.split(key, 4), [SHAPE] * 3 + [(3, 5, 5)], strict=True)
    )
    return *parts, bias, jax.random.randint(key, (6, 5), 0, 2)


def passes(function, *inputs, regions):
    """Output and the gradients of a random projection of it to every input that is there."""

    def project(*inputs):
        out = function(*inputs, regions)
        return (jnp.sin(jnp.arange(1.0 * out.size)).reshape(out.shape) * out).sum(), out

    which = tuple(i for i, x in enumerate(inputs) if x is not None)
    (_, out), grads = jax.jit(jax.value_and_grad(project, which, has_aux=True))(*inputs)
    return out, *grads


def assert_close(found, want):
    """Relative distance at most 1e-6."""
    for a, b in zip(found, want, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_it_is_the_softmax_of_scaled_products_head_by_head(tokens):
    query, key, value, bias, regions = map(np.asarray, tokens)
    out = attend(*tokens)
    assert out.shape == (2, 6, 5, 12)
    for b, w, h in np.ndindex(2, 6, 3):
        scores = query[b, w, :, h] @ key[b, w, :, h].T / 2 + bias[h]
        scores[regions[w][:, None] != regions[w]] = -np.inf
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        want = weights @ value[b, w, :, h]
        np.testing.assert_allclose(out[b, w, :, 4 * h : 4 * h + 4], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [1, 160, 10_000], ids=["one", "two", "all"])
@pytest.mark.parametrize("known", ["bias, regions", "bias", "regions", "nothing"])
def test_by_block_value_and_gradients_are_those_of_all_windows_at_once(
    cached, known, tokens, monkeypatch
):
    monkeypatch.setattr(attention, "_CACHED", cached)
    query, key, value, bias, regions = tokens
    assert attention._windows_at_once(query, key) == {1: 1, 160: 2, 10_000: 6}[cached]
    bias = bias if "bias" in known else None
    regions = regions if "regions" in known else None
    found = passes(attention._by_block, query, key, value, bias, regions=regions)
    want = passes(attention.at_once, query, key, value, bias, regions=regions)
    assert len(found) == len(want) == (5 if "bias" in known else 4)
    assert_close(found, want)


def test_more_keys_than_queries(tokens):
    query, key, value, *_ = tokens
    inputs = query[:, :, :2], key, value, None
    found = passes(attention._by_block, *inputs, regions=None)
    assert_close(found, passes(attention.at_once, *inputs, regions=None))


def test_tokens_in_bfloat16_are_computed_in_float32(tokens):
    half = [x.astype(jnp.bfloat16) for x in tokens[:3]]
    want = attend(*(x.astype(jnp.float32) for x in half), *tokens[3:])
    out, *grads = passes(attend, *half, tokens[3], regions=tokens[4])
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3 + [jnp.float32]
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_what_drops_weights_is_applied_to_them(tokens):
    out = attend(*tokens, drop=lambda weights: weights.at[:, 2].set(0) * 2)
    want = 2 * attend(*tokens).at[:, 2].set(0)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_the_weights_of_all_windows_are_never_held(full_compilation):
    windows, count, heads = 512, 64, 2
    x = jnp.zeros((1, windows, count, heads, 4))
    bias = jnp.zeros((heads, count, count))
    grad = jax.jit(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2, 3)))
    memory = grad.lower(x, x, x, bias).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * windows * heads * count**2


def test_devices_that_share_a_batch_meet_once(tokens, monkeypatch, full_compilation):
    """Over the bias, the only thing they share, and not in the loop over blocks."""
    monkeypatch.setattr(attention, "_CACHED", 1)
    query, key, value, bias, regions = tokens
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    alone = passes(attend, query, key, value, bias, regions=regions)
    spread = [jax.device_put(x, rows) for x in (query, key, value)]
    shared = passes(attend, *spread, bias, regions=regions)
    assert_close(shared, alone)

    grad = jax.grad(lambda *x: attend(*x, regions).sum(), (0, 1, 2, 3))
    everywhere = NamedSharding(mesh, PartitionSpec())
    lowered = jax.jit(grad, out_shardings=(rows, rows, rows, everywhere)).lower(*spread, bias)
    text = lowered.compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)
    assert re.search(r" while\(", text)
    entry = text[text.index("\nENTRY ") :]
    assert "all-reduce" in entry, "loops are computations of their own"


def test_off_cpus_it_is_one_product_for_all_windows(tokens):
    lowered = jax.jit(functools.partial(attend)).trace(*tokens).lower(lowering_platforms=("cuda",))
    assert "stablehlo.while" not in lowered.as_text()
    assert "stablehlo.while" in jax.jit(attend).trace(*tokens).lower().as_text()
