# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""One optimizer for bf16 models: fp32 master weights, Muon for hidden matrices, AdamW for everything else, an EMA.

With torch.distributed it averages the gradients of the processes and shares out Muon's work among them.
"""

import torch
import torch.distributed as dist
from torch import nn


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration of Muon on a stack (K, rows, columns): singular values go to about 1."""
    flipped = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if flipped else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.transpose(1, 2) if flipped else x).float()


class HybridOptimizer:
    """Updates `model` (bf16) in place from its gradients.

    Args:
        model: the module to train; its parameters may have any dtype.
        is_hidden_matrix: tells by name which parameters Muon updates.
        muon_rate, adam_rate: learning rates at factor 1.
        ema_decay: decay of the exponential moving average of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        is_hidden_matrix,
        muon_rate: float = 0.02,
        adam_rate: float = 1e-3,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        self.weight_decay, self.ema_decay, self.step_number = weight_decay, ema_decay, 0
        self.stacks: dict[str, list[str]] = {}
        self.plain: list[str] = []
        for name, parameter in self.parameters.items():
            if is_hidden_matrix(name, parameter):
                key = "x".join(map(str, parameter.shape))
                self.stacks.setdefault(key, []).append(name)
            else:
                self.plain.append(name)
        self.master = {key: torch.stack([self._value(name) for name in names]) for key, names in self.stacks.items()}
        self.master["plain"] = torch.cat([self._value(name).flatten() for name in self.plain])
        self.first = {key: torch.zeros_like(value) for key, value in self.master.items()}
        self.second = torch.zeros_like(self.master["plain"])
        self.ema = {key: value.clone() for key, value in self.master.items()}

    def _value(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach().float().clone()

    def _gradient(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        return torch.zeros_like(parameter).float() if parameter.grad is None else parameter.grad.float()

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Stacked fp32 gradients, averaged over the processes."""
        stacks = {key: torch.stack([self._gradient(name) for name in names]) for key, names in self.stacks.items()}
        stacks["plain"] = torch.cat([self._gradient(name).flatten() for name in self.plain])
        if not dist.is_initialized():
            return stacks
        flat = torch.cat([stack.flatten() for stack in stacks.values()])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([stack.numel() for stack in stacks.values()])
        return {key: part.view(stack.shape) for (key, stack), part in zip(stacks.items(), parts)}

    def _orthogonalized(self, updates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`orthogonalize` of every stack; each process does its share of the matrices."""
        if not dist.is_initialized():
            return {key: orthogonalize(update) for key, update in updates.items()}
        rank, count = dist.get_rank(), dist.get_world_size()
        result = {key: torch.zeros_like(update) for key, update in updates.items()}
        for key, update in updates.items():
            if len(update) > rank:
                result[key][rank::count] = orthogonalize(update[rank::count])
        flat = torch.cat([stack.flatten() for stack in result.values()])
        dist.all_reduce(flat)
        parts = flat.split([stack.numel() for stack in result.values()])
        return {key: part.view(updates[key].shape) for key, part in zip(result, parts)}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with the learning rates times `factor`; clears the gradients."""
        self.step_number += 1
        gradients = self._gradients()
        plain = gradients.pop("plain")
        nesterov = {key: value.lerp(self.first[key].lerp_(value, 0.05), 0.95) for key, value in gradients.items()}
        rate = self.muon_rate * factor
        for key, update in self._orthogonalized(nesterov).items():
            rows, columns = update.shape[1:]
            self.master[key].mul_(1 - rate * self.weight_decay)
            self.master[key].add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
        plain = plain * min(1.0, 1.0 / (plain.norm().item() + 1e-6))
        self.first["plain"].lerp_(plain, 0.1)
        self.second.lerp_(plain.square(), 0.02)
        mean = self.first["plain"] / (1 - 0.9**self.step_number)
        spread = (self.second / (1 - 0.98**self.step_number)).sqrt() + 1e-8
        self.master["plain"].addcdiv_(mean, spread, value=-self.adam_rate * factor)
        decay = min(self.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        for key, value in self.master.items():
            self.ema[key].lerp_(value, 1 - decay)
        self.write_to_model(self.master)
        for parameter in self.parameters.values():
            parameter.grad = None

    def named(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Master or EMA weights by parameter name."""
        named = {name: values[key][i] for key, names in self.stacks.items() for i, name in enumerate(names)}
        sizes = [self.parameters[name].numel() for name in self.plain]
        for name, part in zip(self.plain, values["plain"].split(sizes)):
            named[name] = part.view(self.parameters[name].shape)
        return named

    @torch.no_grad()
    def write_to_model(self, values: dict[str, torch.Tensor]) -> None:
        """Copies master or EMA weights into the model's parameters."""
        for name, value in self.named(values).items():
            self.parameters[name].copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs besides the step number, as flat tensors."""
        tables = {"master": self.master, "first": self.first, "ema": self.ema, "second": {"plain": self.second}}
        return {f"{table}.{key}": value for table, values in tables.items() for key, value in values.items()}

    def load_state(self, state: dict[str, torch.Tensor], step_number: int) -> None:
        """Restores `state()` and the model's weights."""
        for name, value in self.state().items():
            value.copy_(state[name])
        self.step_number = step_number
        self.write_to_model(self.master)
