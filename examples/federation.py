"""The whole method in plain PyTorch: no Flower, no messages, no files."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedmask import magnitude_mask, sparsify
from fedmask.config import from_dict
from fedmask.models import load_backbone, task_model
from fedmask.rng import rng_for, seed_for
from fedmask.tasks import batches, collate, load_task, shards, tokenize


def federate(config):
    """What all clients share and each task's head, as changes from weights that everybody has."""
    plan, seed, base = config.train, config.seed, load_backbone(config.model)
    mask = magnitude_mask(base.model, config.density)  # needs no data: every client finds the same one
    models, heads, clients = {}, {}, []
    for task in config.tasks:
        data = load_task(task)
        model = task_model(base, task.name, len(data.labels), head="mean", seed=seed, dropout=plan.dropout)
        models[task.name] = sparsify(model, mask, bias_adapters=config.adapter.bottleneck, head=True)
        *parts, head = model.fedmask.trainables
        shared, heads[task.name] = np.zeros(sum(p.size for p in parts), np.float32), np.zeros(head.size)
        for rows in shards(task, data, config.partition, seed):
            clients.append((task.name, tokenize(data.train.select(rows), base.tokenizer, plan.max_tokens)))
    for round in range(1, config.rounds + 1):
        replies, total, s = [], dict.fromkeys(heads, 0), shared.size
        for client, (task, rows) in enumerate(clients):
            down = np.concatenate([shared, heads[task]], dtype=np.float32)  # the head of its own task alone
            up = train(models[task], rows, down, plan, base.pad_id, seed, round, client) - down
            replies.append((task, len(rows), up))
            total[task] += len(rows)
        shared = sum(n / total[task] / len(heads) * (shared + up[:s]) for task, n, up in replies)
        for name in heads:  # above, tasks weigh equally; a head is the mean over its own task's clients
            change = sum(n * up[s:].astype(float) for task, n, up in replies if task == name)
            heads[name] = (heads[name] + change / total[name]).astype(np.float32)
    return shared, heads


def train(model, rows, vector, plan, pad_id, seed, round, client):
    """One client's epoch: from the vector it received to the vector that it has then."""
    model.fedmask.begin(torch.from_numpy(vector), lambda name: rng_for(seed, round, -1, name))
    trained = [part.values for part in model.fedmask.trainables]  # masked entries, fresh adapters, head
    rates = zip(trained, [plan.lr, plan.adapter_lr, plan.head_lr or plan.lr], strict=True)
    optimizer = torch.optim.Adam([{"params": [values], "lr": rate} for values, rate in rates], fused=True)
    torch.manual_seed(seed_for(seed, round, client, "dropout"))
    for chosen in batches(rows, plan.batch_size, rng_for(seed, round, client, "batches")):
        inputs = collate(rows, chosen, pad_id)
        labels = inputs.pop("labels")
        optimizer.zero_grad()
        cross_entropy(model.train()(**inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.clip_norm)
        optimizer.step()
    return model.fedmask.vector().numpy()  # adapters folded into the biases: no factor ever travels


if __name__ == "__main__":
    bbc = {"tasks": [{"name": "bbc", "clients": 2}], "partition": {"held_out": 0.0}, "rounds": 1}
    print(*federate(from_dict(bbc)), sep="\n")
