"""Packages around PyTorch, where they are installed: the extra ``tools`` has them (docs/guides/tools.md)."""

import pytest
import torch
from every_module import CASES, inputs, made, result
from torch import nn

import mi_kernels as mi

pytestmark = pytest.mark.tools


def needs(package):
    return pytest.importorskip(package, reason=f"{package} is not installed (mi_kernels[tools] has it)")


class Network(nn.Module):
    """A conditioned layer of each kind of weights, between ordinary layers."""

    def __init__(self):
        super().__init__()
        self.layer = mi.nn.MultiplicativeInteraction(16, context_features=3, out_features=16)
        self.norm = mi.nn.AdaLayerNorm(16, context_features=3)
        self.mlp = mi.nn.GatedMLP(16, hidden_features=32)
        self.head = nn.Linear(16, 2)

    def forward(self, x, z):
        return self.head(self.mlp(self.norm(self.layer(x, z), z)))


def batch(rows=12):
    return torch.randn(rows, 16), torch.randn(rows, 3), torch.randn(rows, 2)


def linears(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


# Quantisation of the weights of linear layers to 8 bits: half a step of 1/127 of the largest of each row.
def int8_limit(layer, x):
    step = layer.weight.abs().amax(1) / 127
    return 0.5 * step * x.abs().sum(-1, keepdim=True) * (1 + 1e-3)


BOUND = {
    "HyperLinear": lambda: mi.nn.HyperLinear(64, out_features=48, context_features=8),
    "HyperLoRA": lambda: mi.nn.HyperLoRA(nn.Linear(64, 48), context_features=8, rank=4),
}


@pytest.mark.parametrize("name", BOUND)
def test_torchao_quantises_bound_layers(name):
    """A layer of one context is an nn.Linear, which torchao takes as any other."""
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer, x, z = BOUND[name](), torch.randn(16, 64), torch.randn(8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1)
    bound = layer.bind(z)
    torch.testing.assert_close(bound(x), layer(x, z))
    limit = int8_limit(bound, x)
    model = nn.Sequential(bound)
    expected = model(x)
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model[0].weight).__name__ == "Int8Tensor"
    assert ((model(x) - expected).abs() <= limit).all()


def test_torchao_quantises_bound_networks():
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    network = mi.nn.HyperMLP([64, 32, 48], context_features=8)
    bound = network.bind(torch.randn(8))
    quantize_(bound, Int8WeightOnlyConfig())
    kinds = [type(layer.weight).__name__ for layer in bound if isinstance(layer, nn.Linear)]
    assert kinds == ["Int8Tensor"] * 2
    assert bound(torch.randn(16, 64)).isfinite().all()


def test_our_kernels_take_no_quantised_weights():
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = mi.nn.GLU(64, out_features=64)
    quantize_(layer, Int8WeightOnlyConfig(), filter_fn=lambda module, path: True)
    with pytest.raises(NotImplementedError, match="mi_kernels.dual_linear"):
        layer(torch.randn(16, 64))


def test_torchao_quantises_the_base_of_an_adapter():
    """HyperLoRA over a quantised layer computes with it, and merges into what it stands for."""
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer, x, z = BOUND["HyperLoRA"](), torch.randn(16, 64), torch.randn(8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1)
    expected, limit = layer(x, z), int8_limit(layer.linear, x)
    quantize_(layer, Int8WeightOnlyConfig())
    assert type(layer.linear.weight).__name__ == "Int8Tensor"
    assert ((layer(x, z) - expected).abs() <= limit).all()
    bound = layer.bind(z)
    assert type(bound.weight.data) is torch.Tensor
    torch.testing.assert_close(bound(x), layer(x, z))


@pytest.mark.parametrize("name", CASES)
def test_torchao_leaves_other_weights_alone(name):
    """quantize_ takes layers of nn.Linear alone, so the model computes on with the others as they are."""
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module, given = made(name), inputs(name)
    expected, quantised = result(module(*given)), linears(module)
    quantize_(module, Int8WeightOnlyConfig())
    found = result(module(*given))
    assert found.isfinite().all() and torch.equal(found, expected) is not bool(quantised)


@pytest.mark.parametrize("name", [name for name in CASES if linears(made(name))])
def test_peft_adapts_the_linear_layers(name):
    """Of AdaLN, HyperLoRA, GatedMLP: those of torch.nn inside."""
    peft = needs("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = made(name)

        def forward(self, *given):
            return result(self.inner(*given))

    model, given = Model(), inputs(name)
    targets, expected = linears(model), model(*given)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
    assert torch.equal(adapted(*given), expected)
    adapted(*given).sin().sum().backward()
    trained = [(key, p.grad) for key, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    assert all(grad is not None and (grad.any() or ".lora_A." in key) for key, grad in trained)


def test_peft_adapts_weights():
    """target_parameters adapts W [O, Z, X] as O matrices; it starts as the model and merges into it."""
    peft = needs("peft")
    model, (x, z, _) = Network(), batch()
    expected = model(x, z)
    config = peft.LoraConfig(
        target_modules=["head"], target_parameters=["layer.weight", "mlp.glu.weight"], r=2
    )
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(x, z), expected)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(x, z).sin().sum().backward()
    optimizer.step()
    after = adapted(x, z)
    assert not torch.allclose(after, expected)
    merged = adapted.merge_and_unload()
    assert type(merged.layer) is mi.nn.MultiplicativeInteraction
    torch.testing.assert_close(merged(x, z), after)


def test_peft_refuses_our_modules_as_targets():
    peft = needs("peft")
    with pytest.raises(ValueError, match="MultiplicativeInteraction.* is not supported"):
        peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["layer"], r=2))


def test_peft_in_an_adapter_is_not_merged_in_silence():
    """HyperLoRA.bind would leave out what peft adds to its linear layer."""
    peft = needs("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = BOUND["HyperLoRA"]()

        def forward(self, x, z):
            return self.inner(x, z)

    x, z = torch.randn(16, 64), torch.randn(8)
    config = peft.LoraConfig(target_modules=["inner.linear"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(Model(), config)
    with pytest.raises(TypeError, match="HyperLoRA: bind: linear: .* merge its own adapter into it first"):
        adapted.model.inner.bind(z)
    expected = adapted(x, z)
    merged = adapted.merge_and_unload().inner
    torch.testing.assert_close(merged.bind(z)(x), expected)


def test_accelerate():
    accelerate = needs("accelerate")
    model, (x, z, target) = Network(), batch()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, z, target), batch_size=4)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    first = last = None
    for _ in range(5):
        losses = []
        for rows, contexts, wanted in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(rows, contexts), wanted)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        last = sum(losses)
        first = last if first is None else first
    assert last < first
    assert set(accelerator.get_state_dict(model)) == set(Network().state_dict())


def test_accelerate_offloads_a_model():
    """Weights are brought when a module is called, and taken away after."""
    accelerate = needs("accelerate")
    model, (x, z, _) = Network(), batch()
    expected = model(x, z)
    hooked = accelerate.cpu_offload(model, execution_device="cpu")
    assert next(hooked.layer.parameters()).device.type == "meta"
    torch.testing.assert_close(hooked(x, z), expected)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = needs("lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Network()
            self.losses = []

        def training_step(self, given, number):
            x, z, target = given
            loss = nn.functional.mse_loss(self.network(x, z), target)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task, data = Task(), torch.utils.data.TensorDataset(*batch())
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        gradient_clip_val=1.0,
    )
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=12))
    assert len(task.losses) == 4 and task.losses[-1] < task.losses[0]
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    again = Task.load_from_checkpoint(tmp_path / "task.ckpt")
    torch.testing.assert_close(again.state_dict(), task.state_dict(), rtol=0, atol=0)
