"""JAX arrays in, JAX arrays out. test_jax.py runs this in a process of its own."""

import jax
import numpy as np
import pytest

import urlfast


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_results_are_jax_arrays_that_hold_what_numpy_gets(dtype):
    for seed in range(20):  # fresh buffers each time: a result must be JAX's own once it is handed out
        z = jax.random.normal(jax.random.key(seed), (300, 15)).astype(dtype)
        reward = urlfast.knn_reward(z, 12)
        distances, indices = urlfast.knn(z, k=3)
        assert isinstance(reward, jax.Array) and isinstance(distances, jax.Array) and isinstance(indices, jax.Array)
        expected = urlfast.knn_reward(np.asarray(z), 12)
        assert np.array_equal(np.asarray(reward), expected)
        assert indices.dtype == np.int32  # JAX's own choice, without x64
        assert np.array_equal(np.asarray(indices)[:, 0], np.arange(300))
        assert float((reward * 2)[7]) == pytest.approx(2 * expected[7])
        scaled = urlfast.RunningNormalizer("mean")(z)
        assert isinstance(scaled, jax.Array) and np.isfinite(np.asarray(scaled)).all()


def test_jax_arrays_are_never_written():
    zeros, ones = jax.numpy.zeros((4, 3)), jax.numpy.ones((4, 3))
    with pytest.raises(ValueError, match=r"targets\[0\]: must be writable"):
        urlfast.ema_update_([zeros], [ones], 0.5)
    with pytest.raises(ValueError, match="out: must be writable"):
        urlfast.RunningNormalizer("mean").normalize(ones, out=ones)
    target = np.zeros((4, 3), np.float32)
    urlfast.ema_update_([target], [ones], 0.5)  # as a source it is welcome
    assert (target == 0.5).all() and not np.asarray(zeros).any()
