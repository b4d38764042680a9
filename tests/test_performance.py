"""Precision and compilation: the same update as eager float32."""

import subprocess
import sys

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import IdentityEnvBox
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.common.performance import check_precision, has_bf16
from sb3_qsm.diffusion import ScoreNetwork
from sb3_qsm.diffusion.activations import MIN_ELEMENTS, Mish
from sb3_qsm.diffusion.linear import _OneDnnLinear, addmm, has_wide_units, linear

# Where it is not preferred it computes the same
needs_onednn = pytest.mark.skipif(
    not (th._C._has_mkldnn and hasattr(th.ops.mkldnn, "_linear_pointwise")), reason="PyTorch was built without oneDNN"
)
needs_bf16 = pytest.mark.skipif(not has_bf16(th.device("cpu")), reason="the processor has no bfloat16 instructions")


def make_model(**kwargs):
    kwargs = {"learning_starts": 40, "batch_size": 32, "diffusion_steps": 3, "seed": 0, "device": "cpu", **kwargs}
    return QSM("MlpPolicy", IdentityEnvBox(eps=0.5), policy_kwargs={"net_arch": [64, 48]}, **kwargs)


def collect(model):
    """Fill the replay buffer, the same for the same seed, without an update."""
    model.learn(40)
    th.manual_seed(0)
    np.random.seed(0)
    return model


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def gradients(model):
    batch = model.replay_buffer.sample(32)
    noise = model._draw_noise(batch)
    model._update_critic(batch, noise)
    model._update_actor(batch, noise)
    # Adam's running mean after one step; the compiled step keeps no other gradient
    optimizers = (model.critic.optimizer, model.actor.optimizer)
    states = [optimizer.state[p] for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    assert {int(state["step"]) for state in states} == {1}
    return th.cat([10.0 * state["exp_avg"].flatten() for state in states])


# Another batch size is compiled anew
@pytest.mark.parametrize("batch_size", [32, pytest.param(16, marks=pytest.mark.slow)])
def test_compiled_update_is_the_eager_one(tmp_path, batch_size):
    """Also after a changed gamma, tau, learning rate, target-policy noise and batch size, and in a loaded model."""
    eager, compiled = collect(make_model()), collect(make_model(compile=True))
    assert largest_difference(parameters(eager), parameters(compiled)) == 0.0
    results = []
    for model in (eager, compiled):
        th.manual_seed(1)
        np.random.seed(1)
        model.train(3, 32)
        model.gamma, model.tau, model.lr_schedule = 0.5, 0.3, lambda _: 1e-2
        model.target_policy_noise = 0.5
        model.train(2, batch_size)
        results.append(parameters(model))
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        loaded = QSM.load(tmp_path / "model", env=model.env)
        loaded.load_replay_buffer(tmp_path / "buffer")
        assert loaded.compile == model.compile
        loaded.set_logger(model.logger)
        loaded.train(1, 32)
        results.append(parameters(loaded))
    assert largest_difference(results[0], results[1]) > 1e-3  # the last step changed something
    # Adam divides by small numbers, so that rounding is not small in the parameters
    assert largest_difference(results[0], results[2]) < 1e-4
    assert largest_difference(results[1], results[3]) < 2e-4


@pytest.mark.slow
def test_every_model_compiles_its_own_update():
    """PyTorch compiles a few versions of one function and then stops: the models of a process must not share them."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=2):
        compare_compiled_models()


def compare_compiled_models():
    for kwargs in (
        {"score_target": "noised", "target_sampling_steps": 1, "critic_reduction": "split"},
        {"score_target": "clean", "sampler": "ddim"},
    ):
        found = []
        for compile_ in (False, True):
            model = collect(make_model(compile=compile_, diffusion_steps=2, **kwargs))
            th.manual_seed(1)
            np.random.seed(1)
            found.append(gradients(model))
        th.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "family", "expected"), [("AuthenticAMD", 25, False), ("AuthenticAMD", 26, True), ("GenuineIntel", 26, False)]
)
def test_onednn_is_for_processors_with_wide_units(vendor, family, expected):
    core = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n"
    assert has_wide_units(core + core.replace(": 0", ": 1")) is expected
    assert not has_wide_units(f"vendor_id\t: {vendor}\n")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_layer_by_onednn_is_the_ordinary_one(bias):
    generator = th.Generator().manual_seed(0)
    shapes = [(32, 24), (48, 24), *([(48,)] if bias else [])]
    inputs = [th.randn(*shape, generator=generator, dtype=th.float64).requires_grad_() for shape in shapes]
    expected = linear(*inputs)
    factor = th.randn(expected.shape, generator=generator, dtype=th.float64)
    expected_gradients = th.autograd.grad((expected * factor).sum(), inputs)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    actual = _OneDnnLinear.apply(*single, *([] if bias else [None]))
    th.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    actual_gradients = th.autograd.grad((actual * factor.float()).sum(), single)
    for gradient, expected_gradient in zip(actual_gradients, expected_gradients, strict=True):
        th.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_onednn_replaces_the_products_of_a_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    from sb3_qsm.diffusion.inductor import CpuPass

    generator = th.Generator().manual_seed(0)
    x, wide, bias, narrow = (th.randn(*shape, generator=generator) for shape in ((32, 64), (48, 64), (48,), (32, 20)))

    def function(x, wide, bias, narrow):
        # Forward; gradient of a weight, whose left side is transposed; the same with the smaller matrix on the right
        return x @ wide.t() + bias, th.addmm(bias, x, wide.t()), x.t() @ (x @ wide.t()), x.t() @ narrow, x.t() @ x[:, :1]

    graph = make_fx(function, tracing_mode="fake")(x, wide, bias, narrow)
    before = sum(node.target in (th.ops.aten.mm.default, th.ops.aten.addmm.default) for node in graph.graph.nodes)
    CpuPass(onednn=True)(graph.graph)
    graph.recompile()
    ours = sum(node.target is th.ops.sb3_qsm.linear.default for node in graph.graph.nodes)
    assert (before, ours) == (6, 5)  # all but the product with a single column
    for actual, expected in zip(graph(x, wide, bias, narrow), function(x, wide, bias, narrow), strict=True):
        th.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_reciprocal_square_roots_of_a_graph_are_kept():
    from torch.fx.experimental.proxy_tensor import make_fx

    from sb3_qsm.diffusion.inductor import CpuPass

    x = th.rand(8, 1, generator=th.Generator().manual_seed(0)) + 0.5
    graph = make_fx(lambda x: (x.rsqrt() * 2.0, x.rsqrt() + x), tracing_mode="fake")(x)
    CpuPass(onednn=False)(graph.graph)
    graph.recompile()
    for node in graph.graph.nodes:
        if node.target is th.ops.aten.rsqrt.default:
            assert [user.target for user in node.users] == [th.ops.prims.inductor_force_stride_order.default]
    for actual, expected in zip(graph(x), (x.rsqrt() * 2.0, x.rsqrt() + x), strict=True):
        th.testing.assert_close(actual, expected)


def test_additions_and_outer_products_of_a_graph_are_left_to_be_fused():
    from torch.fx.experimental.proxy_tensor import make_fx

    from sb3_qsm.diffusion.inductor import CpuPass

    generator = th.Generator().manual_seed(0)
    shapes = (8, 6), (4, 6), (4,), (8, 4), (8, 1)
    x, weight, bias, shift, column = (th.randn(*shape, generator=generator) for shape in shapes)

    def function(x, weight, bias, shift, column):
        return th.addmm(bias, x, weight.t()), th.addmm(shift, x, weight.t()), column @ bias.unsqueeze(0)

    graph = make_fx(function, tracing_mode="fake")(x, weight, bias, shift, column)
    CpuPass(onednn=False)(graph.graph)
    graph.graph.lint()
    graph.recompile()
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(th.ops.aten.mm.default) == 2 and th.ops.aten.addmm.default not in targets
    found, expected = (f(x, weight, bias, shift, column) for f in (graph, function))
    for actual, wanted in zip(found, expected, strict=True):
        th.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 64, 64), (64, 8, 64), (64, 64, 8), (8, 64, 64)])
def test_small_products_stay_in_float32_under_bf16(rows, inputs, outputs):
    x, weight, bias = th.randn(rows, inputs), th.randn(outputs, inputs), th.randn(outputs)
    with th.autocast("cpu", dtype=th.bfloat16):
        products = linear(x.bfloat16(), weight, bias), addmm(bias.expand(rows, -1), x, weight.t())
    small = min(rows, inputs, outputs) < 32
    assert {product.dtype for product in products} == {th.float32 if small else th.bfloat16}
    th.testing.assert_close(products[0].float(), x.bfloat16().float() @ weight.t() + bias, rtol=0.02, atol=0.2)
    if small:
        th.testing.assert_close(products[1], x @ weight.t() + bias)


def mish_and_derivative(x):
    """From the definition, in double precision: x tanh(softplus(x)), derivative by the product and the chain rule."""
    x = x.astype(np.float64)
    tanh = np.tanh(np.logaddexp(0.0, x))
    return x * tanh, tanh + x * (1.0 - tanh**2) / (1.0 + np.exp(-x))


@pytest.mark.parametrize("size", [100, MIN_ELEMENTS])
def test_mish(size):
    x = np.linspace(-90.0, 90.0, size, dtype=np.float32)
    expected, derivative = mish_and_derivative(x)
    given = th.tensor(x)
    with th.no_grad():
        acting = Mish()(given)
    assert np.array_equal(given, x)
    np.testing.assert_allclose(acting, expected, rtol=2e-6, atol=1e-30)

    given.requires_grad_()
    training = Mish()(given)
    training.sum().backward()
    np.testing.assert_allclose(training.detach(), expected, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(given.grad, derivative, rtol=1e-5, atol=1e-6)


def test_mish_where_it_is_slow(monkeypatch):
    """Without a gradient, and compiled, PyTorch's kernel is not called; an exported program keeps it as one operation."""
    x = th.linspace(-90.0, 90.0, MIN_ELEMENTS)
    program = th.export.export(Mish(), (x,))
    assert th.ops.aten.mish.default in {node.target for node in program.graph.nodes}
    expected, derivative = mish_and_derivative(x.numpy())

    monkeypatch.setattr(nn.Mish, "forward", lambda self, input: pytest.fail("PyTorch's Mish was called"))
    with th.no_grad():
        Mish()(x)
    monkeypatch.setattr(th.compiler, "is_compiling", lambda: True)
    given = x.clone().requires_grad_()
    compiled = Mish()(given)
    compiled.sum().backward()
    np.testing.assert_allclose(compiled.detach(), expected, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(given.grad, derivative, rtol=1e-5, atol=1e-6)


def test_networks_of_mish_are_faster_ones():
    network = ScoreNetwork(3, 2, (16,), nn.Mish)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Mish)]
    assert len(layers) == 2 and all(type(layer) is Mish for layer in layers)


@needs_bf16
def test_bf16_update_is_close_to_float32():
    reference, model = collect(make_model()), collect(make_model(precision="bf16"))
    found = []
    for each in (reference, model):
        th.manual_seed(1)
        np.random.seed(1)
        found.append(gradients(each))
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    assert th.cosine_similarity(found[0], found[1], dim=0) > 0.999
    relative = (found[0] - found[1]).norm() / found[0].norm()
    assert 1e-5 < relative < 0.05  # not the same: bfloat16 was used


def test_precision_that_was_set_is_followed(monkeypatch):
    # Emulated by a processor without bfloat16 instructions, slowly and with the same results
    monkeypatch.setattr("sb3_qsm.qsm.qsm.check_precision", lambda device, precision: None)
    made, changed, reference = collect(make_model(precision="bf16")), collect(make_model()), collect(make_model())
    changed.precision = "bf16"
    for model in (made, changed, reference):
        th.manual_seed(1)
        np.random.seed(1)
        model.train(2, 32)
    assert largest_difference(parameters(changed), parameters(made)) == 0.0
    assert largest_difference(parameters(changed), parameters(reference)) > 0.0


@needs_bf16
def test_bf16_targets_are_float32():
    model = collect(make_model(precision="bf16"))
    batch = model.replay_buffer.sample(32)
    loss = model._critic_step.loss
    with th.autocast("cpu", dtype=th.bfloat16):
        actions = loss.next_actions(batch.next_observations, model._draw_noise(batch))
        targets = loss.targets(batch.next_observations, actions, model._transitions(batch))
    assert actions.dtype == targets.dtype == th.float32


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", [(), (64, 48)])
# One product or a share added; filled up to 32 inputs and as many as there are
@pytest.mark.parametrize(("features_dim", "action_dim"), [(3, 6), (25, 6), (80, 6), (80, 31)])
def test_sampler_in_bf16_predicts_the_noise(features_dim, action_dim, net_arch, layer_norm):
    th.manual_seed(0)
    network = ScoreNetwork(features_dim, action_dim, net_arch, layer_norm=layer_norm)
    nn.init.normal_(network.input_layer.bias)
    features, actions, steps = th.randn(128, features_dim), th.randn(128, action_dim), th.arange(4)
    with th.no_grad(), th.autocast("cpu", dtype=th.bfloat16):
        predict_noise = network.denoiser(features, steps)
        found = [predict_noise(actions, t) for t in range(4)]
    with th.no_grad():
        network.double()
        expected = [network(features.double(), actions.double(), th.full((128,), t)) for t in range(4)]
    for t in range(4):
        assert found[t].dtype == th.float32
        error = (found[t] - expected[t]).norm() / expected[t].norm()
        others = [(found[t] - expected[other]).norm() / expected[other].norm() for other in range(4) if other != t]
        assert 1e-4 < error < 0.02 < min(others)  # bfloat16 was used, and the step's own share of time


def test_sampler_under_autocast_can_be_differentiated():
    network = ScoreNetwork(3, 2, (64,))
    actions = th.randn(128, 2, requires_grad=True)
    with th.autocast("cpu", dtype=th.bfloat16):
        network.denoiser(th.randn(128, 3), th.arange(4))(actions, 1).sum().backward()
    assert actions.grad.abs().sum() > 0
    assert network.input_layer.weight.grad is not None


@needs_bf16
def test_bf16_acting(tmp_path):
    model = make_model(precision="bf16")
    few, _ = model.predict(np.zeros((127, 1), dtype=np.float32), deterministic=True)
    many, _ = model.predict(np.zeros((128, 1), dtype=np.float32), deterministic=True)
    # Rows at the edge of a product may be rounded in another way; bfloat16 is far more than that
    assert np.ptp(few) < 1e-6 and np.ptp(many) < 1e-6 and abs(few[0] - many[0]) > 1e-4
    obs = np.random.default_rng(0).uniform(-1, 1, size=(128, 1)).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=True)
    model.actor.precision = "float32"
    expected, _ = model.predict(obs, deterministic=True)
    difference = np.abs(actions - expected).max()
    assert 0 < difference < 0.05
    assert actions.dtype == np.float32
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], actions)
    assert QSM.load(tmp_path / "model", precision="float32").actor.precision == "float32"
    model.save_safe(tmp_path / "model")
    assert QSM.load_safe(tmp_path / "model").actor.precision == "bf16"


def test_precision_the_device_would_emulate():
    with pytest.raises(ValueError, match="precision='bf16' needs a processor with bfloat16 instructions.*meta.*float32"):
        check_precision(th.device("meta"), "bf16")
    with pytest.raises(ValueError, match="Unknown precision 'float16'; known ones: float32, bf16"):
        make_model(precision="float16")


def test_no_compiler():
    """In a process of its own: a compiler that was found is remembered."""
    code = (
        "from sb3_qsm import QSM\n"
        "from stable_baselines3.common.envs import IdentityEnvBox\n"
        "QSM('MlpPolicy', IdentityEnvBox(), compile=True, device='cpu')"
    )
    result = subprocess.run([sys.executable, "-c", code], env={"PATH": "", "CXX": "no-such-compiler"}, capture_output=True)
    assert result.returncode == 1
    message = result.stderr.decode().strip().splitlines()[-1]
    assert message.startswith("ValueError: compile=True needs a C++ compiler; none was found. Install one"), message


def test_import_does_not_load_the_compiler():
    code = "import sys, sb3_qsm; print('sb3_qsm.diffusion.inductor' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.decode().strip() == "False"
