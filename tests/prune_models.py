"""Small models, one per way in which channels travel, for the tests of tracing and cutting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torsion.prune._cut import kept_units


def mlp(act=nn.ReLU):
    return nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 7), act(), nn.Linear(7, 3))


def mlp_bn():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


def cnn(act=nn.ReLU, inplace=False):
    kwargs = {"inplace": True} if inplace else {}
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        act(**kwargs),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        act(**kwargs),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 6),
        act(**kwargs),
        nn.Linear(6, 3),
    )


class Residual(nn.Module):
    """A stem, a block with identity and a block with projection, as ResNets have them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 7, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv4, self.bn4 = nn.Conv2d(7, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.project, self.bn5 = nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        x = self.relu(out)
        out = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x)))))
        x = self.relu(out + self.bn5(self.project(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """The stream stays raw between blocks; norms and activations come before each convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.bn3, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.fc(F.relu(self.bn3(x)).mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, normalized and activated anew by each layer, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1, bias=False)
        self.bn3, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 3)

    def forward(self, x):
        parts = [F.relu(self.stem(x))]
        parts.append(self.conv1(F.relu(self.bn1(parts[0]))))
        parts.append(self.conv2(F.relu(self.bn2(torch.cat(parts, 1)))))
        return self.fc(F.relu(self.bn3(torch.cat(parts, 1))).mean([2, 3]))


class Mobile(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, linear bottleneck with a residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.project, self.bn3 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.hardswish(self.bn1(self.expand(x)))
        y = F.hardswish(self.bn2(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.bn3(self.project(y))
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolutions behind each other, one of them transposed."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 9, 2, stride=2, groups=3)
        self.fc = nn.Linear(9, 3)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.fc(x.flatten(2).mean(-1))


class Up(nn.Module):
    """Transposed convolution, depthwise transposed convolution, upsampling, padding, PReLU and pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.up1 = nn.ConvTranspose2d(6, 8, 2)
        self.act1 = nn.PReLU(8)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 12, 3)
        self.shuffle = nn.PixelShuffle(2)
        self.pad = nn.ZeroPad2d(1)
        self.last = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        x = F.relu(self.fc1(x))[:, :, None, None]
        x = F.interpolate(self.act1(self.up1(x)), scale_factor=2)
        x = F.relu(self.bn(self.up2(x)))
        return self.last(self.pad(F.leaky_relu(self.shuffle(self.conv(x)))))


class Gated(nn.Module):
    """Three gated layers: F.glu, one projection halved by hand, and a gate and an up projection (SwiGLU)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.second = nn.Linear(6, 14)
        self.gate, self.up = nn.Linear(7, 8, bias=False), nn.Linear(7, 8, bias=False)
        self.down = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        a, b = self.second(F.glu(self.first(x), dim=-1)).chunk(2, dim=-1)
        x = F.gelu(a) * b
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """A transformer layer written by hand, pre-norm; heads, stream and logits stay."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.ln1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.ln2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.ln3 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        n, t, _ = x.shape
        q, k, v = (z.view(n, t, 2, 4).transpose(1, 2) for z in self.qkv(self.ln1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, 8))
        x = x + self.fc2(F.gelu(self.fc1(self.ln2(x))))
        return self.head(self.ln3(x))


class Shared(nn.Module):
    """One layer used three times, and one activation module for all."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.first(x))
        for _ in range(3):
            x = self.act(self.again(x))
        return self.last(x)


class Branches(nn.Module):
    """Splits by chunk and slice with sizes from the tensor, stack, permute, squeeze, scalar operations, masks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv1d(4, 5, 1), nn.Conv1d(4, 5, 1)
        self.last = nn.Linear(10, 3)

    def forward(self, x):
        a, b = F.relu(self.first(x)).chunk(2, 1)
        a, b = F.relu(self.left(a)) * 2.0, F.silu(self.right(b)).clamp(max=4.0)
        x = torch.cat([a, -b / 3], dim=1).permute(2, 0, 1)
        return self.last(x.transpose(0, 1).mean(dim=1))


class RootMeanSquare(nn.Module):
    """RMSNorm behind the activation: it maps zeros to zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.RMSNorm(8, eps=1e-3), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.norm(F.relu(self.first(x))))


class Groups(nn.Module):
    """GroupNorm and InstanceNorm before the activation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3), nn.InstanceNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 6, 1), nn.GroupNorm(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(F.relu(self.norm3(self.conv3(x))).sum((2, 3)))


class Shuffle(nn.Module):
    """Grouped 1x1 convolutions with a channel shuffle in between, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 12, 1, groups=2), nn.Conv2d(12, 6, 1, groups=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(F.relu(self.conv2(x)).amax((2, 3)))


def image(n=4, channels=3, size=8):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def rows(n=16):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(0))


def tokens():
    return torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))


MODELS = {
    "mlp": (mlp, rows),
    "mlp_gelu": (lambda: mlp(nn.GELU), rows),
    "mlp_silu": (lambda: mlp(nn.SiLU), rows),
    "mlp_bn": (mlp_bn, rows),
    "cnn": (cnn, image),
    "cnn_inplace": (lambda: cnn(inplace=True), image),
    "residual": (Residual, image),
    "pre_activation": (PreActivation, image),
    "dense": (Dense, image),
    "mobile": (Mobile, image),
    "grouped": (Grouped, lambda: image(channels=4)),
    "up": (Up, rows),
    "gated": (Gated, rows),
    "attention": (Attention, tokens),
    "shared": (Shared, rows),
    "branches": (Branches, lambda: image()[..., 0]),
    "rms": (RootMeanSquare, rows),
    "groups": (Groups, image),
    "shuffle": (Shuffle, lambda: image(channels=4)),
    "encoder": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True), nn.Linear(8, 3)
        ),
        lambda: rows().reshape(4, 4, 5),
    ),
}
"""Name -> model and inputs, both made anew by a call."""


def build(name, seed=0):
    """A float64 model with random weights and statistics, and its inputs."""
    make, inputs = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    model, x = make().double(), inputs()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=generator)
        for buffer_name, b in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                b.normal_(generator=generator)
            elif buffer_name.endswith("running_var"):
                b.uniform_(0.5, 2, generator=generator)
    return model, x.double() if x.is_floating_point() else x


def random_masks(structure, seed, live=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layer.units, generator=generator) < live for name, layer in structure.layers.items()}


def kill(model, structure, keep):
    """Zero all that makes the units that ``keep`` leaves out, so that they are dead whatever the activation."""
    kept = kept_units(structure, keep)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for use in structure.symbols.uses.values():
            if use.row and use.name in params:
                dead = (use.symbols >= 0) & ~kept[use.symbols.clamp(min=0)]
                p = params[use.name]
                if dead.dim() == 1:
                    p.transpose(0, use.axis)[dead] = 0
                else:  # axis 1 of a grouped transposed convolution
                    for rows_of_group, mask in zip(p.chunk(len(dead)), dead, strict=True):
                        rows_of_group.transpose(0, 1)[mask] = 0


def snapshot(model, optimizer=None):
    """Everything a refusal must leave: objects by identity, values by bits."""
    held = [*model.named_parameters(), *model.named_buffers()]
    state = {
        "tensors": [(n, id(t), t.detach().clone()) for n, t in held],
        "attributes": [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()],
        "grads": [(n, None if p.grad is None else id(p.grad)) for n, p in model.named_parameters()],
        "rng": torch.get_rng_state(),
    }
    if optimizer is not None:
        state["groups"] = [([id(p) for p in g["params"]], g["lr"]) for g in optimizer.param_groups]
        state["state"] = [
            (id(p), [(k, id(v), v.clone() if isinstance(v, torch.Tensor) else v) for k, v in s.items()])
            for p, s in optimizer.state.items()
        ]
    return state


def same(a, b):
    """Whether two snapshots are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outputs(model, x):
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        y = model(x)
    for m, mode in modes:
        m.training = mode
    return y
