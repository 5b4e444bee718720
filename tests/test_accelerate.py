"""fastlm.accelerate on models of torch.nn: the same model, with our layers, and back."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from errors import assert_within_rule
from torch import nn

import fastlm
from fastlm.nn import OURS

LAYERS = {
    nn.LayerNorm: lambda: nn.LayerNorm(8),
    nn.RMSNorm: lambda: nn.RMSNorm(8),
    nn.Linear: lambda: nn.Linear(8, 8),
    nn.CrossEntropyLoss: lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(8, 2),
    nn.modules.linear.NonDynamicallyQuantizableLinear: lambda: nn.MultiheadAttention(8, 2).out_proj,
    nn.TransformerEncoderLayer: lambda: nn.TransformerEncoderLayer(8, 2, 16),
    nn.TransformerDecoderLayer: lambda: nn.TransformerDecoderLayer(8, 2, 16),
    nn.TransformerEncoder: lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
    nn.TransformerDecoder: lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2),
    nn.Transformer: lambda: nn.Transformer(8, 2, 1, 1, 16),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    LAYERS[nn.LinearCrossEntropyLoss] = lambda: nn.LinearCrossEntropyLoss(8, 5)


class Classifier(nn.Module):
    """Token classification with what people put into a model: tied weights, a buffer, a list, a layer used twice."""

    def __init__(self, E=24, V=31, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        layer = nn.TransformerEncoderLayer(E, 3, 48, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(E, 3, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(E), nn.RMSNorm(E)])
        self.again = self.norms[0]
        self.conv = nn.Conv1d(E, E, 3, padding=1)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.embedding.weight
        self.loss = nn.CrossEntropyLoss(ignore_index=0)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids, labels, padding=None):
        x = self.embedding(ids) * self.scale
        x = self.encoder(x, src_key_padding_mask=padding)
        x = self.norms[0](x + self.attention(x, x, x, padding)[0])
        x = self.again(x + self.conv(x.mT).mT)
        return self.loss(self.head(self.norms[1](x)).mT, labels)


def classifier(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Classifier(**options).to(dtype)


def batch(B=3, T=9, V=31):
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(V, (B, T), generator=generator) for _ in range(2))
    padding = torch.arange(T) >= torch.tensor([T, 5, 2])[:, None]
    return ids, labels.masked_fill(padding, 0), padding


def answers(model, inputs=None):
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    loss = model(*(inputs or batch()))
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("kind", list(LAYERS), ids=lambda kind: kind.__name__)
def test_every_layer_that_fastlm_has_is_swapped_and_put_back(kind):
    model = nn.Sequential(LAYERS[kind]())
    before = {name: type(module) for name, module in model.named_modules()}
    report = fastlm.accelerate(model)
    assert type(model[0]) is OURS[kind]
    assert type(model[0]) is getattr(fastlm.nn, kind.__name__)
    assert not {type(module) for module in model.modules()} & set(OURS)
    assert [change.name for change in report.swapped] == [name for name in before if name and before[name] in OURS]
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not report.swapped


def test_no_layer_of_fastlm_is_forgotten_here():
    assert set(LAYERS) == set(OURS)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_and_gradients_are_within_the_error_rule(dtype, backend):
    plain, exact = classifier(dtype), classifier(torch.float64)
    exact.load_state_dict(plain.state_dict())
    ours = copy.deepcopy(plain)
    fastlm.accelerate(ours)
    with fastlm.use_backend("cpu,auto" if backend == "cpu" else backend):
        found = answers(ours)
    for one, near, true in zip(found, answers(plain), answers(exact), strict=True):
        assert_within_rule(one, near, true)


def test_the_layers_run_the_backend_that_is_asked_for():
    model = classifier()
    fastlm.accelerate(model)
    with fastlm.use_backend("cuda"), pytest.raises(fastlm.BackendError, match="no backend of 'cuda'"):
        model(*batch())


def test_parameters_buffers_keys_ties_and_modes_are_the_very_same():
    model = classifier().eval()
    model.encoder.layers[0].train()
    for parameter in model.encoder.layers[1].parameters():
        parameter.requires_grad_(False)
    before = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    modes = {name: module.training for name, module in model.named_modules()}
    keys, text = list(model.state_dict()), repr(model)
    fastlm.accelerate(model)
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model.head.weight is model.embedding.weight
    assert model.again is model.norms[0]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert not any(parameter.requires_grad for parameter in model.encoder.layers[1].parameters())


def test_hooks_of_every_layer_see_what_they_saw():
    def watched(model):
        seen = []

        def note(name, kind):
            def hook(module, *values):
                tensors = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
                seen.append((name, kind, [x.shape for x in tensors if isinstance(x, torch.Tensor)]))

            return hook

        for name, module in model.named_modules():
            module.register_forward_pre_hook(note(name, "forward pre"))
            module.register_forward_hook(note(name, "forward"))
            module.register_full_backward_hook(note(name, "backward"))
        return seen

    plain = classifier(dropout=0.1)
    ours = copy.deepcopy(plain)
    before = watched(ours)
    fastlm.accelerate(ours)
    after = watched(plain)
    answers(plain), answers(ours)
    assert len(before) > 60
    assert sorted(before, key=str) == sorted(after, key=str)


def test_a_hook_that_changes_an_output_still_does():
    plain = classifier()
    ours = copy.deepcopy(plain)
    fastlm.accelerate(ours)
    for model in (plain, ours):
        model.encoder.layers[0].norm2.register_forward_hook(lambda module, inputs, output: 2 * output)
    for one, two in zip(answers(ours), answers(plain), strict=True):
        torch.testing.assert_close(one, two)


def test_copies_are_accelerated_too_and_undo_leaves_them():
    model = classifier()
    report = fastlm.accelerate(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    report.undo()
    for twin in twins:
        assert type(twin.norms[0]) is fastlm.nn.LayerNorm
        assert twin.head.weight is twin.embedding.weight
        for one, two in zip(answers(twin), answers(model), strict=True):
            torch.testing.assert_close(one, two)
    assert type(model.norms[0]) is nn.LayerNorm


def test_a_pickle_opens_in_a_process_that_knows_nothing_of_fastlm(tmp_path):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 3))
    fastlm.accelerate(model)
    x = torch.randn(2, 5, 8)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert type(model[1]).__module__ == 'fastlm.nn'\n"
        "torch.testing.assert_close(model(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], check=True)


def test_undo_gives_bitwise_what_was_before():
    model = classifier()
    before = answers(model)
    report = fastlm.accelerate(model)
    with fastlm.use_backend("reference"):
        answers(model)
    report.undo()
    assert all(map(torch.equal, answers(model), before))


def test_undo_leaves_what_someone_else_has_changed_since():
    class Mine(fastlm.nn.LayerNorm):
        pass

    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    report = fastlm.accelerate(model)
    model[0].__class__ = Mine
    report.undo()
    assert [type(layer) for layer in model] == [Mine, nn.LayerNorm]


class Shifted(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


def test_what_may_do_another_thing_is_left_alone_and_the_report_says_why():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    patched = nn.Linear(8, 8)
    patched.forward = lambda input: input
    model = nn.Sequential(Shifted(8), patched, parametrized, nn.Embedding(3, 8), nn.LayerNorm(8), nn.Tanh())
    before = [type(layer) for layer in model]
    report = fastlm.accelerate(model)
    assert [type(layer) for layer in model] == [*before[:4], fastlm.nn.LayerNorm, nn.Tanh]
    assert [change.name for change in report.swapped] == ["4"]
    assert "Shifted may do another thing than torch.nn.LayerNorm" in report.left["0"]
    assert report.left["1"] == "its forward is not that of torch.nn.Linear"
    assert "ParametrizedLinear may do another thing than torch.nn.Linear" in report.left["2"]
    assert report.left["3"] == "FastLM has nothing for torch.nn.Embedding"
    assert "5" not in report.left
    text = str(report)
    assert "torch.nn.LayerNorm -> fastlm.nn.LayerNorm: 4" in text
    for reason in report.left.values():
        assert reason in text


def test_a_layer_of_a_dtype_that_no_kernel_knows_is_left_alone():
    report = fastlm.accelerate(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)))
    assert report.left == {"0": "parameters of torch.complex64"}


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss")
def test_a_loss_with_options_of_torchs_is_left_alone_and_one_without_gives_the_same():
    options = nn.LinearCrossEntropyOptions()
    model = nn.ModuleList([nn.LinearCrossEntropyLoss(8, 5, options=options), nn.LinearCrossEntropyLoss(8, 5)])
    x, target = torch.randn(4, 8), torch.randint(5, (4,))
    before = model[1](x, target)
    report = fastlm.accelerate(model)
    assert report.left == {"0": "its options choose how torch's computes it"}
    assert type(model[1]) is fastlm.nn.LinearCrossEntropyLoss
    torch.testing.assert_close(model[1](x, target), before)


def test_a_lazy_layer_is_left_alone():
    model = nn.Sequential(nn.LazyLinear(3))
    report = fastlm.accelerate(model)
    assert "LazyLinear" in report.left["0"]
    assert model(torch.randn(2, 5)).shape == (2, 3)


def test_a_second_time_changes_nothing_and_says_so():
    model = classifier()
    first = fastlm.accelerate(model)
    second = fastlm.accelerate(model)
    assert not second.swapped
    assert second.left["head"] == "FastLM's already"
    second.undo()
    assert type(model.head) is fastlm.nn.Linear
    first.undo()
    assert type(model.head) is nn.Linear


def test_the_model_itself_may_be_the_layer():
    layer = nn.LayerNorm(8)
    report = fastlm.accelerate(layer)
    assert type(layer) is fastlm.nn.LayerNorm
    assert "the model" in str(report)


@pytest.mark.parametrize("model", [None, nn.LayerNorm, {"model": nn.LayerNorm(8)}, torch.ones(2)])
def test_what_is_no_module_is_a_type_error(model):
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module, got "):
        fastlm.accelerate(model)


def test_a_model_on_the_meta_device_gives_the_same_shapes():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)).to("meta")
    fastlm.accelerate(model)
    assert model(torch.empty(3, 4, device="meta")).shape == (3, 8)


def test_twenty_steps_of_training_have_the_same_losses():
    losses = []
    for accelerated in (False, True):
        model = classifier()
        if accelerated:
            fastlm.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for _ in range(20):
            loss = model(*batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), rtol=1e-4, atol=0)
    assert losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize(("order", "autocast"), [("before", False), ("before", True), ("after a call", False)])
def test_torch_compile_before_and_after_gives_the_same(order, autocast):
    torch._dynamo.reset()
    plain = classifier()
    model = copy.deepcopy(plain)
    if order == "before":
        fastlm.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if order == "after a call":
            answers(compiled)
            fastlm.accelerate(compiled)
            assert type(model.head) is fastlm.nn.Linear
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
        for one, two in zip(answers(compiled), answers(plain), strict=True):
            torch.testing.assert_close(one, two, **tolerance)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["before", "after"])
def test_distributed_data_parallel_before_and_after_gives_the_same(order, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not in this torch")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = classifier()
        model = copy.deepcopy(plain)
        if order == "before":
            fastlm.accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if order == "after":
            fastlm.accelerate(wrapped)
        assert type(model.head) is fastlm.nn.Linear
        for one, two in zip(answers(wrapped), answers(plain), strict=True):
            torch.testing.assert_close(one, two)
    finally:
        torch.distributed.destroy_process_group()
