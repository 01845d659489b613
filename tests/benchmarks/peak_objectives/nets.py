"""Networks in torch, each with the layers, widths and batches of its own kind among the parameters."""

from __future__ import annotations

import optuna
import torch
from torch import nn
from torch.nn import functional

torch.set_num_threads(1)


def optimizer_for(trial: optuna.Trial, model: nn.Module, names: tuple[str, ...]) -> torch.optim.Optimizer:
    """One of several optimizers with a learning rate of its own, as in Optuna's pytorch_simple."""
    name = trial.suggest_categorical("optimizer", list(names))
    rate = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(model.parameters(), lr=rate)
    return optimizer


def cnn(trial: optuna.Trial) -> float:
    """Convolutions over images of 32 x 32, with as many layers and filters as asked for."""
    torch.manual_seed(0)
    batch = trial.suggest_categorical("batch_size", [16, 32, 64, 128, 256])
    layers: list[nn.Module] = []
    channels, size = 3, 32
    for i in range(trial.suggest_int("n_layers", 1, 4)):
        filters = trial.suggest_int(f"filters_{i}", 4, 64, log=True)
        kernel = trial.suggest_categorical(f"kernel_{i}", [3, 5])
        layers += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2)]
        if trial.suggest_categorical(f"norm_{i}", [True, False]):
            layers.append(nn.BatchNorm2d(filters))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, size = filters, size // 2
    width = trial.suggest_int("dense", 16, 1024, log=True)
    layers += [nn.Flatten(), nn.Linear(channels * size * size, width), nn.ReLU()]
    layers += [nn.Dropout(trial.suggest_float("dropout", 0.0, 0.5)), nn.Linear(width, 10)]
    model = nn.Sequential(*layers)
    optimizer = optimizer_for(trial, model, ("Adam", "SGD", "RMSprop"))
    right = 0
    for _ in range(4):
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
        x += y[:, None, None, None] * 0.1
        optimizer.zero_grad()
        out = model(x)
        functional.cross_entropy(out, y).backward()
        optimizer.step()
        right += int((out.argmax(1) == y).sum())
    return right / (4 * batch)


def lstm(trial: optuna.Trial) -> float:
    """A recurrent forecaster: LSTM or GRU, one direction or two."""
    torch.manual_seed(0)
    length = trial.suggest_int("window", 8, 200)
    batch = trial.suggest_int("batch", 8, 256, log=True)
    hidden = trial.suggest_int("hidden", 8, 256, log=True)
    layers = trial.suggest_int("layers", 1, 3)
    both = trial.suggest_categorical("bidirectional", [False, True])
    dropout = trial.suggest_float("dropout", 0.0, 0.5) if layers > 1 else 0.0
    cell = {"lstm": nn.LSTM, "gru": nn.GRU}[trial.suggest_categorical("cell", ["lstm", "gru"])]
    body = cell(6, hidden, layers, batch_first=True, bidirectional=both, dropout=dropout)
    head = nn.Linear(hidden * (1 + both), 1)
    model = nn.ModuleList([body, head])
    optimizer = optimizer_for(trial, model, ("Adam", "AdamW"))
    loss = torch.tensor(0.0)
    for _ in range(2):
        x = torch.randn(batch, length, 6).cumsum(1)
        optimizer.zero_grad()
        loss = functional.mse_loss(head(body(x[:, :-1])[0][:, -1])[:, 0], x[:, -1, 0])
        loss.backward()
        optimizer.step()
    return loss.item()


def conditional_mlp(trial: optuna.Trial) -> float:
    """Optuna's pytorch_simple: the units and the dropout of each layer are asked for one by one."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 28 * 28
    for i in range(trial.suggest_int("n_layers", 1, 5)):
        units = trial.suggest_int(f"n_units_l{i}", 4, 2048, log=True)
        layers += [nn.Linear(inputs, units), nn.ReLU(), nn.Dropout(trial.suggest_float(f"dropout_l{i}", 0.2, 0.5))]
        inputs = units
    model = nn.Sequential(*layers, nn.Linear(inputs, 10), nn.LogSoftmax(dim=1))
    optimizer = optimizer_for(trial, model, ("Adam", "RMSprop", "SGD"))
    batch = trial.suggest_categorical("batch", [64, 512, 4096])
    x, y = torch.randn(8192, 28 * 28), torch.randint(0, 10, (8192,))
    x[:, :10] += functional.one_hot(y, 10)
    for part in torch.arange(8192).split(batch)[:4]:
        optimizer.zero_grad()
        functional.nll_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x[:2000]).argmax(1) == y[:2000]).float().mean())


def transformer(trial: optuna.Trial) -> float:
    """A small language model with micro-batches, checkpointing and tied or untied weights."""
    torch.manual_seed(0)
    width = trial.suggest_categorical("d_model", [32, 64, 128, 256])
    heads = trial.suggest_categorical("heads", [2, 4, 8])
    depth = trial.suggest_int("depth", 1, 8)
    ratio = trial.suggest_categorical("ff_ratio", [1, 2, 4])
    length = trial.suggest_int("context", 16, 160)
    batch = trial.suggest_int("batch", 2, 48, log=True)
    vocabulary = trial.suggest_int("vocabulary", 256, 8192, log=True)
    again = trial.suggest_categorical("recompute", [False, True])
    embed = nn.Embedding(vocabulary, width)
    blocks = nn.ModuleList(
        nn.TransformerEncoderLayer(
            width, heads, ratio * width, dropout=0.1, batch_first=True, norm_first=True, activation="gelu"
        )
        for _ in range(depth)
    )
    head = nn.Linear(width, vocabulary, bias=False)
    if trial.suggest_categorical("tied", [False, True]):
        head.weight = embed.weight
    model = nn.ModuleList([embed, blocks, head])
    rate = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loss = torch.tensor(0.0)
    for _ in range(2):
        tokens = torch.randint(0, vocabulary, (batch, length + 1))
        x = embed(tokens[:, :-1])
        for block in blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if again else block(x)
        loss = functional.cross_entropy(head(x).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def autoencoder(trial: optuna.Trial) -> float:
    """A variational autoencoder over squares of a chosen side, in single or half precision."""
    torch.manual_seed(0)
    side = trial.suggest_categorical("side", [16, 32, 64])
    channels = trial.suggest_int("channels", 4, 48)
    latent = trial.suggest_int("latent", 2, 512, log=True)
    batch = trial.suggest_int("batch", 8, 128, log=True)
    half = trial.suggest_categorical("bfloat16", [False, True])
    flat = 2 * channels * (side // 4) ** 2
    down = nn.Sequential(
        nn.Conv2d(1, channels, 3, 2, 1), nn.SiLU(), nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.SiLU(), nn.Flatten()
    )
    mean, spread, back = nn.Linear(flat, latent), nn.Linear(flat, latent), nn.Linear(latent, flat)
    up = nn.Sequential(
        nn.Unflatten(1, (2 * channels, side // 4, side // 4)),
        nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1),
        nn.SiLU(),
        nn.ConvTranspose2d(channels, 1, 4, 2, 1),
    )
    model = nn.ModuleList([down, mean, spread, back, up])
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-2, log=True))
    weight = trial.suggest_float("beta", 0.1, 10, log=True)
    loss = torch.tensor(0.0)
    for _ in range(3):
        x = torch.rand(batch, 1, side, side).cumsum(2) / side
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = down(x)
            mu, log_var = mean(hidden), spread(hidden)
            out = up(back(mu + torch.randn_like(mu) * (log_var / 2).exp()))
            loss = functional.mse_loss(out, x) + weight * (mu**2 + log_var.exp() - 1 - log_var).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def recommender(trial: optuna.Trial) -> float:
    """Two embedding tables and a small head; hashed to a chosen size, dense or sparse gradients."""
    torch.manual_seed(0)
    users = trial.suggest_int("user_buckets", 1_000, 200_000, log=True)
    items = trial.suggest_int("item_buckets", 1_000, 50_000, log=True)
    width = trial.suggest_int("embedding", 4, 128, log=True)
    sparse = trial.suggest_categorical("sparse", [True, False])
    batch = trial.suggest_int("batch", 256, 16_384, log=True)
    tables = nn.ModuleList([nn.Embedding(users, width, sparse=sparse), nn.Embedding(items, width, sparse=sparse)])
    if trial.suggest_categorical("head", ["dot", "mlp"]) == "mlp":
        hidden = trial.suggest_int("hidden", 8, 256, log=True)
        head: nn.Module | None = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    else:
        head = None
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SparseAdam(list(tables.parameters())) if sparse else torch.optim.Adam(tables.parameters())
    ]
    if head is not None:
        optimizers.append(torch.optim.Adam(head.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))
    loss = torch.tensor(0.0)
    for _ in range(3):
        user, item = torch.randint(0, users, (batch,)), torch.randint(0, items, (batch,))
        left, right = tables[0](user), tables[1](item)
        score = (left * right).sum(1) if head is None else head(torch.cat([left, right], 1))[:, 0]
        loss = functional.mse_loss(score, ((user + item) % 5).float())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return loss.item()


def replay(trial: optuna.Trial) -> float:
    """Reinforcement learning's shape: a buffer that fills as it goes, and a network that learns from it."""
    torch.manual_seed(0)
    capacity = trial.suggest_int("capacity", 1_000, 200_000, log=True)
    steps = trial.suggest_int("steps", 2_000, 60_000, log=True)
    frames = trial.suggest_categorical("frames", [1, 2, 4])
    units = trial.suggest_int("units", 16, 512, log=True)
    batch = trial.suggest_categorical("batch", [32, 128, 512])
    every = trial.suggest_int("train_every", 50, 1_000, log=True)
    prioritised = trial.suggest_categorical("prioritised", [False, True])
    net = nn.Sequential(
        nn.Linear(64 * frames, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 4)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True))
    discount = trial.suggest_float("gamma", 0.8, 0.9999)
    buffer: list[torch.Tensor] = []
    priorities: list[float] = []
    state, total = torch.zeros(100, 64 * frames), 0.0
    for step in range(0, steps, 100):
        state = state.roll(1, 1) * 0.99 + torch.randn(100, 64 * frames) * 0.1
        for row in state:
            if len(buffer) < capacity:
                buffer.append(row.clone())
                if prioritised:
                    priorities.append(1.0 + step)
            else:
                buffer[step % capacity] = row.clone()
        if step % every < 100 and len(buffer) >= batch:
            if prioritised:
                index = torch.multinomial(torch.tensor(priorities), batch, replacement=True)
            else:
                index = torch.randint(0, len(buffer), (batch,))
            x = torch.stack([buffer[i] for i in index.tolist()])
            optimizer.zero_grad()
            value = net(x)
            target = x[:, :4] + discount * value.detach().max(1, keepdim=True)[0]
            functional.smooth_l1_loss(value, target).backward()
            optimizer.step()
            total += value.mean().item()
    return total
