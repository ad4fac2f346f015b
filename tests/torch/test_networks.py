"""Networks as people write them: what the report says of all of their parameters, and steps that lower the loss."""

import pytest
import torch

import kfcore as kf
from kfcore_torch import Optimizer

nn, F = torch.nn, torch.nn.functional


def descends(model, optimizer, loss, steps=3):
    """Losses before every step and after the last."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return [*losses, loss().item()]


# -- a residual network of images --------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, planes_in, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or planes_in != planes:
            self.downsample = nn.Sequential(nn.Conv2d(planes_in, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = nn.Sequential(BasicBlock(6, 6)), nn.Sequential(BasicBlock(6, 8, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_resnet(sharing):
    torch.manual_seed(0)
    model = ResNet()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05, momentum=0.0, sharing=sharing)
    coupled = "BatchNorm2d in training mode takes statistics of the batch, through which each example's loss depends on all the others"
    for row in optimizer.report():
        owner = model.get_submodule(row.parameter.rpartition(".")[0])
        if isinstance(owner, nn.BatchNorm2d):
            assert (row.kind, row.factors) == ("diagonal", ())
            assert coupled in row.reason
        else:
            assert (row.kind, row.reason) == ("kfac", type(owner).__name__.removesuffix("2d"))
    x, y = torch.randn(8, 3, 12, 12), torch.arange(8) % 3
    losses = descends(model, optimizer, lambda: F.cross_entropy(model(x), y))
    assert losses == sorted(losses, reverse=True)


def test_resnet_with_fixed_statistics_is_covered_as_a_whole(lib):
    torch.manual_seed(0)
    model = ResNet().double().eval()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.05, momentum=0.0)
    assert optimizer.report().fallbacks() == []
    x, y = torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.arange(8) % 3
    found = lib.rebuilt(model, lambda: F.cross_entropy(model(x), y).backward())
    assert len(found) == 2 * 6 + 1
    assert max(found.values()) < 1e-10
    losses = descends(model, optimizer, lambda: F.cross_entropy(model(x), y))
    assert losses == sorted(losses, reverse=True)


# -- a causal language model -------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = (part.view(n, t, self.heads, c // self.heads).transpose(1, 2) for part in self.c_attn(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(n, t, c))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), CausalSelfAttention(width, heads), nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """In the manner of nanoGPT: positions without an axis of examples, and an output layer tied to the table of words."""

    def __init__(self, vocabulary=11, positions=16, width=8, heads=2, layers=2, tied=True):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(positions, width),
                "h": nn.ModuleList([Block(width, heads) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        pos = torch.arange(0, idx.shape[1])
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [5, 6], ids=["other lengths than examples", "as many positions as examples"])
def test_gpt(tied, length):
    torch.manual_seed(0)
    model = GPT(tied=tied)
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.1, momentum=0.0)
    idx = torch.randint(11, (6, length + 1))
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    model(x, y).backward()
    assert optimizer.engine._terms == 6 * length, "a term is a token, whichever layer is the last with a block"
    with pytest.warns(UserWarning, match=r"layer 'transformer\.wpe' has no statistics in this step"):
        losses = descends(model, optimizer, lambda: model(x, y))
    assert losses == sorted(losses, reverse=True)
    stray = (
        "its 6 ids are examples or positions, of which there are as many: give it ids [N, S]"
        if length == 6
        else "the first axis of its input has 5 entries, and is not that of the 6 examples"
    )
    expected = {"transformer.wpe.weight": ("diagonal", stray)}
    if tied:
        expected["transformer.wte.weight"] = ("diagonal", "weight shared by modules that do different things with it: Embedding and Linear")
    else:
        expected["transformer.wte.weight"] = ("kfac", "Embedding")
    for row in optimizer.report():
        owner = model.get_submodule(row.parameter.rpartition(".")[0])
        default = ("kfac", "Norm (diagonal)" if isinstance(owner, nn.LayerNorm) else "Linear")
        assert (row.kind, row.reason) == expected.get(row.parameter, default), row.parameter


# -- a transformer of images -------------------------------------------------------------------------------------------


class ViT(nn.Module):
    def __init__(self, width=8, patches=9):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(0.02 * torch.randn(1, 1 + patches, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        return self.head(self.norm(self.body(x)[:, 0]))


@pytest.mark.parametrize("norm", ["diagonal", "full"])
def test_vit(norm):
    torch.manual_seed(0)
    model = ViT()
    optimizer = Optimizer(model, kf.KFAC(damping=0.1), lr=0.02, momentum=0.0, norm=norm)
    report = optimizer.report()
    assert {row.parameter: row.reason for row in report.fallbacks()} == {"cls": "a bare parameter", "pos": "a bare parameter"}
    for row in report:
        owner, _, role = row.parameter.rpartition(".")
        if "norm" in owner:
            assert (row.reason, row.factors) == (f"Norm ({norm})", (16, 1))
        elif "self_attn" in owner and "out_proj" not in owner and role == "weight":
            first = 8 * "qkv".index(owner.rpartition(".")[2][0])
            assert row.reason == f"Linear in rows {first}:{first + 8} of {owner.rpartition('.')[0]}.in_proj_weight"
        elif owner:
            assert row.reason == ("Conv" if owner == "patch" else "Linear")
    x, y = torch.randn(8, 3, 12, 12), torch.arange(8) % 3
    losses = descends(model, optimizer, lambda: F.cross_entropy(model(x), y))
    assert losses == sorted(losses, reverse=True)
